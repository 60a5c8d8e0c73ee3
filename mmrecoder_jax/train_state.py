"""Parameters, optimizer and the jitted update.

A batch has a leading micro-batch axis; the update scans over it, adds up gradients and takes one optimizer step. Losses are plain
weighted sums with global denominators (`data.batching.loss_weights`), so adding gradients is exact whatever the micro-batch size.
What is trained is donated. Parameters that are not (`trained`: a frozen vision tower, the weights below adapters) have neither gradients
nor moments, and are passed through untouched.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from mmrecoder_jax.models.sharding import param_shardings
from mmrecoder_jax.models.trees import Chosen, everything, join, split

LossFn = Callable[[Any, dict[str, Array]], tuple[Array, dict[str, Array]]]


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds of the learner."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    rng: Array  # key data; every random number of step t comes from fold_in(rng, t)


def make_optimizer(optim: ConfigDict, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW after global-norm clipping, and its learning-rate schedule. Norms and biases are not decayed."""
    if optim.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, optim.lr, optim.warmup_steps, max(total_steps, optim.warmup_steps + 1), optim.lr / 10
        )
    elif optim.schedule == "constant":
        schedule = optax.join_schedules(
            [optax.linear_schedule(0.0, optim.lr, optim.warmup_steps), optax.constant_schedule(optim.lr)], [optim.warmup_steps]
        )
    else:
        raise ValueError(f"optim.schedule={optim.schedule!r}: use 'constant' or 'cosine'")

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "lora_a", "lora_b"), params)

    tx = optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.adamw(schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, mask=decayed),
    )
    return tx, schedule


def from_params(params: Any, tx: optax.GradientTransformation, mesh: Mesh, seed: int, trained: Chosen = everything) -> TrainState:
    """A fresh state around existing sharded parameters; the optimizer's moments, of `trained` ones alone, are sharded like them."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(params, tx, mesh, trained))
    with jax.set_mesh(mesh):
        return jax.jit(lambda p: _fresh(p, tx, seed, trained), out_shardings=shardings)(params)


def abstract_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh, trained: Chosen = everything) -> TrainState:
    """Shapes, types and shardings of `from_params`' state; `params` may be shapes alone."""
    abstract = jax.eval_shape(lambda p: _fresh(p, tx, 0, trained), params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, state_shardings(abstract, mesh))


def _fresh(params: Any, tx: optax.GradientTransformation, seed: int, trained: Chosen) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(split(params, trained)[0]), jax.random.key_data(jax.random.key(seed)))


def state_shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a whole state: the parameter rules apply to the optimizer's copies of the tree by their path's end."""
    return TrainState(
        step=NamedSharding(mesh, PartitionSpec()),
        params=param_shardings(abstract.params, mesh),
        opt_state=param_shardings(abstract.opt_state, mesh),
        rng=NamedSharding(mesh, PartitionSpec()),
    )


def make_update(loss_fn: LossFn, tx: optax.GradientTransformation, schedule: optax.Schedule, mesh: Mesh, trained: Chosen = everything):
    """`update(state, batch) -> (state, metrics)`, jitted; metrics are the sums of `loss_fn`'s over micro-batches, plus the rate and the
    norms of what is trained."""

    def update(state: TrainState, fixed: Any, batch: dict[str, Array]):
        gradient = jax.value_and_grad(lambda params, micro: loss_fn(join(params, fixed), micro), has_aux=True)

        def add(total, micro):
            (loss, metrics), grads = gradient(state.params, micro)
            return jax.tree.map(jnp.add, total, (grads, metrics | {"loss": loss})), None

        if next(iter(batch.values())).shape[0] == 1:
            (loss, metrics), grads = gradient(state.params, jax.tree.map(lambda x: x[0], batch))
            metrics = metrics | {"loss": loss}
        else:
            shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], batch))
            (loss_shape, metric_shapes), grad_shapes = shapes
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grad_shapes, metric_shapes | {"loss": loss_shape}))
            (grads, metrics), _ = jax.lax.scan(add, zeros, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
            "lr": schedule(state.step),
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    programs = []

    def program(state: TrainState):
        if not programs:  # the new state lies where the old one did, or the next step would compile again
            shardings = jax.tree.map(lambda x: x.sharding, state)
            programs.append(jax.jit(update, donate_argnums=0, out_shardings=(shardings, None)))
        return programs[0]

    def run(state: TrainState, batch: dict[str, Array]):
        params, fixed = split(state.params, trained)
        state = state.replace(params=params)
        with jax.set_mesh(mesh):
            state, metrics = program(state)(state, fixed, batch)
        return state.replace(params=join(state.params, fixed)), metrics

    def lower(state: TrainState, batch: dict[str, Array]):
        """The same program for shapes alone (`abstract_state`)."""
        params, fixed = split(state.params, trained)
        state = state.replace(params=params)
        with jax.set_mesh(mesh):
            return program(state).lower(state, fixed, batch)

    run.lower = lower
    run.compilations = lambda: sum(program._cache_size() for program in programs)
    return run


def count_params(params: Any) -> int:
    """Number of parameters."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))

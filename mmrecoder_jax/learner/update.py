"""Parameters, optimizer and the jitted update.

A batch has a leading micro-batch axis. It stays on the host: micro-batches go to the devices one
after the other, the next while one is computed, so that what a device holds does not grow with the
batch. Their gradients are added up, then one optimizer step is taken. Losses are plain weighted
sums with global denominators (`data.batching.loss_weights`), so adding gradients is exact whatever
the micro-batch size. What is trained is donated. Parameters that are not (`trained`: a frozen
vision tower, the weights below adapters) have neither gradients nor moments, and are passed through
untouched.
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

from mmrecoder_jax.learner.distributed import to_global
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


def make_optimizer(
    optim: ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW after global-norm clipping, and its learning-rate schedule. Norms and biases are not
    decayed.
    """
    if optim.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            optim.lr,
            optim.warmup_steps,
            max(total_steps, optim.warmup_steps + 1),
            optim.lr / 10,
        )
    elif optim.schedule == "constant":
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, optim.lr, optim.warmup_steps),
                optax.constant_schedule(optim.lr),
            ],
            [optim.warmup_steps],
        )
    else:
        raise ValueError(f"optim.schedule={optim.schedule!r}: use 'constant' or 'cosine'")

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key in ("kernel", "lora_a", "lora_b"), params
        )

    tx = optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.adamw(
            schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, mask=decayed
        ),
    )
    return tx, schedule


def from_params(
    params: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    trained: Chosen = everything,
) -> TrainState:
    """A fresh state around existing sharded parameters; the optimizer's moments, of `trained` ones
    alone, are sharded like them.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(params, tx, mesh, trained))
    with jax.set_mesh(mesh):
        return jax.jit(lambda p: _fresh(p, tx, seed, trained), out_shardings=shardings)(params)


def abstract_state(
    params: Any, tx: optax.GradientTransformation, mesh: Mesh, trained: Chosen = everything
) -> TrainState:
    """Shapes, types and shardings of `from_params`' state; `params` may be shapes alone."""
    abstract = jax.eval_shape(lambda p: _fresh(p, tx, 0, trained), params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        state_shardings(abstract, mesh),
    )


def _fresh(params: Any, tx: optax.GradientTransformation, seed: int, trained: Chosen) -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        tx.init(split(params, trained)[0]),
        jax.random.key_data(jax.random.key(seed)),
    )


def state_shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a whole state: the parameter rules apply to the optimizer's copies of the tree
    by their path's end.
    """
    return TrainState(
        step=NamedSharding(mesh, PartitionSpec()),
        params=param_shardings(abstract.params, mesh),
        opt_state=param_shardings(abstract.opt_state, mesh),
        rng=NamedSharding(mesh, PartitionSpec()),
    )


class Update:
    """`update(state, batch) -> (state, metrics)`: gradients of a batch and one optimizer step.

    `batch` holds this host's rows, NumPy arrays `[M, B, ...]`. One micro-batch is one program. More
    take two: one adds a micro-batch's gradients to the total, the other takes the step. Metrics are
    the sums of `loss_fn`'s over micro-batches, plus the loss, the learning rate, and the norms of
    what is trained.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        schedule: optax.Schedule,
        mesh: Mesh,
        trained: Chosen = everything,
    ):
        self._loss_fn, self._tx, self._schedule, self._mesh, self._trained = (
            loss_fn,
            tx,
            schedule,
            mesh,
            trained,
        )
        self._jitted: dict[str, Any] = {}

    def __call__(
        self, state: TrainState, batch: dict[str, np.ndarray]
    ) -> tuple[TrainState, dict[str, Array]]:
        state, fixed = self._trained_part(state)
        count = len(next(iter(batch.values())))
        micro_batches = (
            to_global({name: x[i] for name, x in batch.items()}, self._mesh) for i in range(count)
        )
        with jax.set_mesh(self._mesh):
            total, loss = None, None
            for micro in micro_batches:
                programs = self._programs(state, fixed, micro)
                if count == 1:
                    state, metrics = programs["whole"](state, fixed, micro)
                    break
                before = loss
                total, loss = programs["gradients"](
                    state.params, fixed, programs["zeros"]() if total is None else total, micro
                )
                # the devices hold no more than this micro-batch and the next
                jax.block_until_ready(before)
            else:
                state, metrics = programs["step"](state, total)
        return state.replace(params=join(state.params, fixed)), metrics

    def lower(self, program: str, state: TrainState, micro: dict[str, Any]) -> jax.stages.Lowered:
        """A program for shapes alone (`abstract_state`, a micro-batch): "whole" of a batch of one,
        "gradients" or "step".
        """
        state, fixed = self._trained_part(state)
        with jax.set_mesh(self._mesh):
            jitted = self._programs(state, fixed, micro)[program]
            total = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                *self._total(state, fixed, micro),
            )
            arguments = {
                "whole": (state, fixed, micro),
                "gradients": (state.params, fixed, total, micro),
                "step": (state, total),
            }
            return jitted.lower(*arguments[program])

    def compilations(self) -> int:
        """Programs compiled so far."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())

    def _trained_part(self, state: TrainState) -> tuple[TrainState, Any]:
        params, fixed = split(state.params, self._trained)
        return state.replace(params=params), fixed

    def _gradients(self, params: Any, fixed: Any, micro: dict[str, Array]):
        (loss, metrics), grads = jax.value_and_grad(
            lambda p: self._loss_fn(join(p, fixed), micro), has_aux=True
        )(params)
        return grads, metrics | {"loss": loss}

    def _add_gradients(self, params: Any, fixed: Any, total: Any, micro: dict[str, Array]):
        found = self._gradients(params, fixed, micro)
        return jax.tree.map(jnp.add, total, found), found[1]["loss"]

    def _step(self, state: TrainState, total: Any):
        grads, metrics = total
        updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = {"grad_norm": optax.global_norm(grads), "param_norm": optax.global_norm(params)}
        metrics = metrics | norms | {"lr": self._schedule(state.step)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def _whole(self, state: TrainState, fixed: Any, micro: dict[str, Array]):
        return self._step(state, self._gradients(state.params, fixed, micro))

    def _total(self, state: TrainState, fixed: Any, micro: dict[str, Any]) -> tuple[Any, Any]:
        """(shapes, shardings) of the sums over micro-batches: gradients lie where their parameters
        do.
        """
        shapes = jax.eval_shape(self._gradients, state.params, fixed, micro)
        copied = NamedSharding(self._mesh, PartitionSpec())
        return shapes, (
            jax.tree.map(lambda x: x.sharding, state.params),
            jax.tree.map(lambda _: copied, shapes[1]),
        )

    def _programs(self, state: TrainState, fixed: Any, micro: dict[str, Any]) -> dict[str, Any]:
        """The jitted functions. What they return lies where it lay before, or the next call would
        compile again.
        """
        if not self._jitted:
            where = jax.tree.map(lambda x: x.sharding, state)
            shapes, total = self._total(state, fixed, micro)
            self._jitted = {
                "whole": jax.jit(self._whole, donate_argnums=0, out_shardings=(where, None)),
                "zeros": jax.jit(
                    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
                    out_shardings=total,
                ),
                "gradients": jax.jit(
                    self._add_gradients, donate_argnums=2, out_shardings=(total, None)
                ),
                "step": jax.jit(self._step, donate_argnums=0, out_shardings=(where, None)),
            }
        return self._jitted


def count_params(params: Any) -> int:
    """Number of parameters."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))

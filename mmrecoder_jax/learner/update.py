"""Parameters, optimizer and the jitted update.

A batch has a leading micro-batch axis. It stays on the host: micro-batches go to the devices one
after the other, the next while one is computed, so that what a device holds does not grow with the
batch. Their gradients are added up, then one optimizer step is taken.

    batch [M, B, ...] on the host
        micro-batch 0 -> gradients   \\
        micro-batch 1 -> gradients    > sum -> clip, AdamW -> parameters
        micro-batch 2 -> gradients   /

Losses are plain weighted sums with global denominators (`data.batching.loss_weights`), so adding
gradients is exact whatever the micro-batch size.

A loss or gradient that is not finite, or a metric above its limit, skips the step: parameters,
moments and the optimizer's own count stay as they were, and the metric `skipped` is 1. Only
`TrainState.step` goes on, as it counts what was tried.

Gradients are summed in float32 also where parameters are kept in 16 bits. A bfloat16 weight has 8
bits of precision: added to one of 0.02, a step of 1e-5 is rounded away, every time. So what is
added to bfloat16 weights is rounded up or down by chance, in proportion to what is cut off
(`optim.rounding`, arXiv 2010.06192): the mean of many steps is right, and no float32 copy is kept.

What is trained is donated to the update. Parameters that are not trained (a frozen vision tower,
the weights below adapters) have neither gradients nor moments, and pass through untouched.
"""

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array
from ml_collections import ConfigDict

from mmrecoder_jax.learner.distributed import to_global
from mmrecoder_jax.models.sharding import batch_sharding, param_shardings, path_name
from mmrecoder_jax.models.trees import Chosen, everything, join, split

OPTIMIZERS = ("adamw", "adafactor", "muon")
ROUNDINGS = ("stochastic", "nearest")
SCHEDULES = ("constant", "cosine", "linear", "wsd")
LAST = 0.1  # of the rate, where a schedule that falls ends
PATCH_EMBED = "patch_embed"  # its name among the parameters of the vision tower

Params = Any  # a tree of parameters
Micro = dict[str, Array]  # a micro-batch on the devices
LossFn = Callable[[Params, Micro], tuple[Array, dict[str, Array]]]
Total = tuple[Params, dict[str, Array]]  # gradients and metrics, summed over micro-batches
Leaf = TypeVar("Leaf")


class TrainState(flax.struct.PyTreeNode, Generic[Leaf]):
    """The learner's state; a tree of arrays, or of their shapes or shardings (`Leaf`)."""

    step: Leaf  # int32 []; updates tried, the skipped ones too
    params: Params
    opt_state: Any
    rng: Leaf  # key data; every random number of step t comes from fold_in(rng, t)
    reference: Params = None  # what is trained, as it was when it last became the reference policy


def make_optimizer(
    optim: ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optimizer of optax after clipping by the global norm, and its learning-rate schedule.

        adamw      two moments for each parameter
        adafactor  the second moment by rows and columns (arXiv 1804.04235), without scaling by the
                   parameters; `b1` above 0 keeps a first moment, 0 saves its memory; `b2` is not
                   used, its decay follows the step
        muon       matrices of the layers step by an orthogonal matrix (`b1` of momentum), as far as
                   AdamW would (arXiv 2502.16982, 0.2 of rms); everything else has AdamW

    All decay what `decay` names by lr * weight_decay. The rate rises over `warmup_steps` steps;
    with 4 of them it is 1/4, 2/4, 3/4 and 4/4 of lr.

    `patch_embed_lr` is for models that are trained from scratch. Adam moves every weight by about
    lr, whatever the size of its gradient, so a step moves an output by lr times the sum of its
    inputs. The patch embedding reads 588 to 1176 pixels that mostly agree (white paper is near 2 in
    every one): at the rate of other layers one step can move a blank patch by more than its size,
    and what is drawn on it drowns. Freezing this layer is known to help (arXiv 2104.02057); a tenth
    of the rate learns better still, and starts to read hundreds of steps earlier.

    Args:
      optim: the section of the configuration.
      total_steps: where a schedule that falls ends.

    Raises:
      ValueError: there is no such optimizer or schedule.
    """
    warmup = optim.warmup_steps
    after = _after_warmup(optim, max(total_steps - warmup, 1))

    def schedule(count: ArrayLike) -> ArrayLike:
        # The first step has a rate already: at 0 its batch would be thrown away.
        warm = jnp.minimum((count + 1) / max(warmup, 1), 1.0)
        return warm * after(jnp.maximum(count - warmup, 0))

    steps = [optax.clip_by_global_norm(optim.clip), _by_name(optim, schedule)]
    if optim.patch_embed_lr != 1.0:
        slow = optax.scale(optim.patch_embed_lr)
        steps.append(optax.masked(slow, _is_patch_embedding))
    if optim.ema:
        steps.append(averaging(optim.ema))
    return optax.chain(*steps), schedule


class Average(NamedTuple):
    """The mean of what is trained over past steps, in float32 or more."""

    average: Params


def averaging(decay: float) -> optax.GradientTransformation:
    """Keeps `decay * average + (1 - decay) * parameters` after every step, beginning with the first
    parameters; updates pass through. The last of a chain.
    """

    def init(params: Params) -> Average:
        # A copy: the parameters themselves are donated.
        return Average(jax.tree.map(lambda p: jnp.array(p, sum_type(p.dtype)), params))

    def update(updates: Params, state: Average, params: Params = None) -> tuple[Params, Average]:
        def one(mean: Array, p: Array, u: Array) -> Array:
            return decay * mean + (1 - decay) * (p.astype(mean.dtype) + u.astype(mean.dtype))

        return updates, Average(jax.tree.map(one, state.average, params, updates))

    return optax.GradientTransformation(init, update)


def average_of(opt_state: Any) -> Params | None:
    """The average that an optimizer keeps (`optim.ema`); None where it keeps none."""

    def found(x: Any) -> bool:
        return isinstance(x, Average)

    averages = [x.average for x in jax.tree.leaves(opt_state, is_leaf=found) if found(x)]
    return averages[0] if averages else None


def usable(state: TrainState[Array]) -> Params:
    """The parameters that are evaluated and handed on: the average where one is kept."""
    average = average_of(state.opt_state)
    if average is None:
        return state.params
    return jax.tree.map(
        lambda mean, p: mean.astype(p.dtype), join(state.params, average), state.params
    )


def with_reference(state: TrainState[Array], policy: Params, trained: Chosen) -> TrainState[Array]:
    """A state whose reference is a policy; what is not trained is as in the state itself."""
    return state.replace(reference=split(policy, trained)[0])


def reference_of(state: TrainState[Array]) -> Params:
    """The whole reference policy of a state `with_reference`."""
    return join(state.params, state.reference)


def _by_name(optim: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    def decayed(params: Params) -> Any:
        # By default matrices alone: a norm pulled to 0 would silence its layer, and a row of a
        # table would fade while its token does not occur.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(re.search(optim.decay, path_name(path))), params
        )

    b1, b2, decay = optim.b1, optim.b2, optim.weight_decay
    match optim.name:
        case "adamw":
            return optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay, mask=decayed)
        case "adafactor":
            steps = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
            if b1:
                steps.append(optax.ema(b1, debias=False))
            steps += [optax.add_decayed_weights(decay, decayed), optax.scale_by_learning_rate(rate)]
            return optax.chain(*steps)
        case "muon":
            muon = optax.contrib.muon(
                rate,
                beta=b1,
                weight_decay=decay,
                weight_decay_mask=decayed,
                muon_weight_dimension_numbers=_matrices,
                consistent_rms=0.2,
            )
            # Its own AdamW would decay everything, and look a step ahead.
            adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=decay, mask=decayed)
            return optax.partition({True: muon, False: adamw}, _is_matrix)
    raise ValueError(f"optim.name={optim.name!r}: use {', '.join(OPTIMIZERS)}")


def _is_matrix(params: Params) -> Any:
    """Whether muon takes a parameter: the kernels inside layers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(re.search(r"(layers|blocks)/.*kernel$", path_name(path))), params
    )


def _matrices(params: Params) -> Any:
    """The axes of muon's matrices; layers are stacked in front."""

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers:
        if path_name(path).endswith("attn/qkv/kernel"):  # [..., in, 3, out]
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 3, (leaf.ndim - 2, leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _after_warmup(optim: ConfigDict, steps: int) -> optax.Schedule:
    """The rate over so many steps; what falls ends at a tenth of it (`LAST`)."""
    lr = optim.lr
    match optim.schedule:
        case "constant":
            return optax.constant_schedule(lr)
        case "cosine":
            return optax.cosine_decay_schedule(lr, steps, alpha=LAST)
        case "linear":
            return optax.linear_schedule(lr, LAST * lr, steps)
        case "wsd":  # warm up, stay, decay (arXiv 2404.06395)
            decay = max(1, round(optim.decay_share * steps))
            parts = [optax.constant_schedule(lr), optax.linear_schedule(lr, LAST * lr, decay)]
            return optax.join_schedules(parts, [steps - decay])
    raise ValueError(f"optim.schedule={optim.schedule!r}: use {', '.join(SCHEDULES)}")


def _is_patch_embedding(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(key.key == PATCH_EMBED for key in path), params
    )


def from_params(
    params: Params,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    trained: Chosen = everything,
) -> TrainState[Array]:
    """A fresh state around existing sharded parameters.

    The optimizer has moments for the `trained` parameters alone, sharded like them.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(params, tx, mesh, trained))
    # A seed inside the program would make it another one for every stage.
    rng = np.asarray(jax.random.key_data(jax.random.key(seed)))
    with jax.set_mesh(mesh):
        fresh = jax.jit(lambda p, rng: _fresh(p, tx, rng, trained), out_shardings=shardings)
        return fresh(params, rng)


def abstract_state(
    params: Params, tx: optax.GradientTransformation, mesh: Mesh, trained: Chosen = everything
) -> TrainState[jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of `from_params`' state; `params` may be shapes alone."""
    rng = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    abstract = jax.eval_shape(lambda p, rng: _fresh(p, tx, rng, trained), params, rng)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        _state_shardings(abstract, mesh),
    )


def _fresh(
    params: Params, tx: optax.GradientTransformation, rng: Array, trained: Chosen
) -> TrainState[Array]:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(split(params, trained)[0]), rng)


def _state_shardings(
    abstract: TrainState[jax.ShapeDtypeStruct], mesh: Mesh
) -> TrainState[NamedSharding]:
    """Shardings of a whole state.

    A moment is cut like its parameter, whose path its own path ends in. What has another shape
    (sums over rows or columns) is small and copied.
    """
    copied = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(abstract.params, mesh)
    of_parameters = {
        path_name(path): (leaf.shape, where)
        for (path, leaf), where in zip(
            jax.tree_util.tree_leaves_with_path(abstract.params),
            jax.tree.leaves(params),
            strict=True,
        )
    }

    def like_its_parameter(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            shape, where = of_parameters.get("/".join(parts[start:]), (None, copied))
            if shape is not None:
                return where if shape == leaf.shape else copied
        return copied

    return TrainState(
        step=copied,
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(like_its_parameter, abstract.opt_state),
        rng=copied,
    )


class Update:
    """`update(state, batch) -> (state, metrics)`: gradients of a batch and one optimizer step.

    A single micro-batch is one program. More micro-batches take two: one adds a micro-batch's
    gradients to the total, the other takes the step.

    Args:
      loss_fn: `loss_fn(params, micro_batch) -> (loss, metrics)`, both sums over tokens or rows.
      tx, schedule: the optimizer (`make_optimizer`).
      mesh: where the state is.
      trained: chooses the parameters that are trained.
      limits: metrics of `loss_fn` that skip the step where they are larger.
      rounding: one of `ROUNDINGS`, of what is added to bfloat16 parameters.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        schedule: optax.Schedule,
        mesh: Mesh,
        trained: Chosen = everything,
        limits: Mapping[str, float] = MappingProxyType({}),
        rounding: str = "stochastic",
    ):
        self._rounding = rounding
        self._loss_fn, self._tx, self._schedule = loss_fn, tx, schedule
        self._mesh, self._trained, self._limits = mesh, trained, dict(limits)
        self._jitted: dict[str, Any] = {}

    def __call__(
        self, state: TrainState[Array], batch: dict[str, np.ndarray]
    ) -> tuple[TrainState[Array], dict[str, Array]]:
        """Takes one step.

        Args:
          state: is consumed.
          batch: this host's rows, arrays `[M, B, ...]`.

        Returns:
          (the next state, metrics). Metrics are the sums of `loss_fn`'s over micro-batches (the
          largest, where a name ends in "_max"), plus the loss, the learning rate, the norms of the
          gradients and of what is trained, by part too (`grad_norm/vision`, and `step_size/vision`
          of what the optimizer adds), and `skipped`: 1 where the loss or a gradient was not
          finite, or a metric above its limit, and nothing was changed, else 0.
        """
        reference = state.reference  # updates neither read nor change it
        state, fixed = self._trained_part(state)
        count = len(next(iter(batch.values())))
        micro_batches = (
            to_global({name: x[i] for name, x in batch.items()}, self._mesh) for i in range(count)
        )
        with jax.set_mesh(self._mesh):
            total: Total | None = None
            loss: Array | None = None
            for micro in micro_batches:
                programs = self._programs(state, fixed, micro, count == 1)
                if count == 1:
                    state, metrics = programs["whole"](state, fixed, micro)
                    break
                before = loss
                total, loss = programs["gradients"](
                    state.params, fixed, programs["zeros"]() if total is None else total, micro
                )
                # wait for the micro-batch before: the devices then hold this one and the next alone
                jax.block_until_ready(before)
            else:
                state, metrics = programs["step"](state, total)
        return state.replace(params=join(state.params, fixed), reference=reference), metrics

    def lower(
        self,
        program: str,
        state: TrainState[jax.ShapeDtypeStruct],
        micro: dict[str, jax.ShapeDtypeStruct],
    ) -> jax.stages.Lowered:
        """Lowers a program for shapes alone.

        Args:
          program: "whole" for the step of a batch of one micro-batch, or "gradients" or "step".
          state: from `abstract_state`.
          micro: shapes and shardings of a micro-batch.
        """
        state, fixed = self._trained_part(state)
        with jax.set_mesh(self._mesh):
            jitted = self._programs(state, fixed, micro, program == "whole")[program]
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

    def compile(
        self,
        state: TrainState[Array],
        micro: dict[str, np.ndarray],
        micro_batches: int,
    ) -> None:
        """Compiles what an update by so many micro-batches like this one runs, side by side.

        Args:
          micro: a micro-batch of the only host.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        by_row = batch_sharding(self._mesh)
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row)
            for name, x in micro.items()
        }
        names = ("whole",) if micro_batches == 1 else ("gradients", "step")
        lowered = [self.lower(name, abstract, shapes) for name in names]
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(jax.stages.Lowered.compile, lowered))

    def compilations(self) -> int:
        """How many programs were compiled so far."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())

    def _trained_part(self, state: TrainState[Leaf]) -> tuple[TrainState[Leaf], Params]:
        """(the state of what is trained, the parameters that are not)."""
        params, fixed = split(state.params, self._trained)
        return state.replace(params=params, reference=None), fixed

    def _gradients(self, params: Params, fixed: Params, micro: Micro) -> Total:
        (loss, metrics), grads = jax.value_and_grad(
            lambda p: self._loss_fn(join(p, fixed), micro), has_aux=True
        )(params)
        return grads, metrics | {"loss": loss}

    def _add_gradients(
        self, params: Params, fixed: Params, total: Total, micro: Micro
    ) -> tuple[Total, Array]:
        grads, metrics = self._gradients(params, fixed, micro)
        joined = {
            name: (jnp.maximum if name.endswith("_max") else jnp.add)(total[1][name], value)
            for name, value in metrics.items()
        }
        return (jax.tree.map(jnp.add, total[0], grads), joined), metrics["loss"]

    def _step(
        self, state: TrainState[Array], total: Total
    ) -> tuple[TrainState[Array], dict[str, Array]]:
        grads, metrics = total
        grad_norm = optax.global_norm(grads)  # finite only where every gradient is
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        for name, limit in self._limits.items():
            good &= metrics[name] <= limit

        def taken(new: Any, old: Any) -> Any:
            # A choice per element, not `lax.cond`: it is fused, and donated buffers stay in place.
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        lr = self._schedule(_count(state.opt_state))
        # Sums are float32; moments have the type of what they are moments of.
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
        params = taken(self._added(state, updates), state.params)
        opt_state = taken(opt_state, state.opt_state)
        norms = {"grad_norm": grad_norm, "param_norm": optax.global_norm(params)}
        norms |= {f"grad_norm/{name}": x for name, x in _norms_of_parts(grads).items()}
        norms |= {f"step_size/{name}": x for name, x in _norms_of_parts(updates).items()}
        metrics = metrics | norms | {"lr": lr, "skipped": 1.0 - good.astype(jnp.float32)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def _added(self, state: TrainState[Array], updates: Params) -> Params:
        if self._rounding == "nearest":
            return optax.apply_updates(state.params, updates)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        leaves, tree = jax.tree.flatten(state.params)
        keys = jax.random.split(jax.random.fold_in(key, _ROUNDING), len(leaves))
        return jax.tree.map(added, state.params, updates, jax.tree.unflatten(tree, list(keys)))

    def _whole(
        self, state: TrainState[Array], fixed: Params, micro: Micro
    ) -> tuple[TrainState[Array], dict[str, Array]]:
        return self._step(state, self._gradients(state.params, fixed, micro))

    def _total(self, state: TrainState, fixed: Params, micro: dict[str, Any]) -> tuple[Any, Any]:
        """(shapes, shardings) of the sums over micro-batches.

        A gradient has the shape of its parameter, and is cut like it.
        """

        def forward(params: Params, fixed: Params, micro: Micro) -> tuple[Array, dict[str, Array]]:
            return self._loss_fn(join(params, fixed), micro)

        loss, metrics = jax.eval_shape(forward, state.params, fixed, micro)
        grads = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, sum_type(x.dtype)), state.params
        )
        shapes = grads, metrics | {"loss": loss}
        copied = NamedSharding(self._mesh, PartitionSpec())
        return shapes, (
            jax.tree.map(lambda x: x.sharding, state.params),
            jax.tree.map(lambda _: copied, shapes[1]),
        )

    def _programs(
        self, state: TrainState, fixed: Params, micro: dict[str, Any], whole: bool
    ) -> dict[str, Any]:
        """The jitted functions: of a single micro-batch, or of more.

        What they return keeps the shardings it had, or the next call would compile again.
        """
        if ("whole" if whole else "step") in self._jitted:
            return self._jitted
        where = jax.tree.map(lambda x: x.sharding, state)
        if whole:
            self._jitted["whole"] = jax.jit(
                self._whole, donate_argnums=0, out_shardings=(where, None)
            )
        else:
            shapes, total = self._total(state, fixed, micro)
            self._jitted |= {
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


_ROUNDING = 0x524F554E  # apart from the steps that rollouts fold into the same key


def sum_type(kind: Any) -> Any:
    """The type that gradients of parameters of a type are summed in."""
    return jnp.promote_types(kind, jnp.float32)


def added(parameter: Array, update: Array, key: Array) -> Array:
    """parameter + update. In bfloat16 it is rounded to one of its two neighbours, to the nearer one
    the more probably; their mean is the sum itself.
    """
    if parameter.dtype != jnp.bfloat16:
        return optax.apply_updates(parameter, update)
    total = parameter.astype(jnp.float32) + update.astype(jnp.float32)
    # bfloat16 is the upper half of float32: what the lower half adds to by chance carries over.
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
    bits = bits + jax.random.bits(key, total.shape, jnp.uint16).astype(jnp.uint32)
    upper = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return upper.astype(jnp.bfloat16)


def _norms_of_parts(tree: Params) -> dict[str, Array]:
    """Norms of the parts of the model that are trained: vision, decoder, tables."""
    squares: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path]
        part = "vision" if names[0] == "visual" else "decoder"
        part = "tables" if {"embed_tokens", "lm_head"} & set(names) else part
        squares.setdefault(part, []).append((leaf.astype(jnp.float32) ** 2).sum())
    return {part: jnp.sqrt(sum(found, jnp.zeros(()))) for part, found in squares.items()}


def _count(opt_state: Any) -> Array:
    """Steps that the optimizer took; its parts count alike."""
    (_, count), *_ = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return count

"""Sampling of many conversations at once: a fixed number of rows, each as far as it is.

A state holds rows and prefixes (`models.decoding`). A prompt is written to a prefix; rows start
from it and decode, in chunks, at a pace of one token a step; a row whose turn has ended is extended
by feedback, or given to another conversation. Which conversation is where is the caller's to know
(`rl.rollout`); the programs here have static shapes, whatever is where:

    prefill          prompts -> prefixes
    extend           feedback -> rows; or all that rows held before they were given away
    extend_prefix    feedback -> prefixes, before a group's rows part
    promote          what rows hold -> the ends of their prefixes
    decode           a chunk of tokens for every row that is live

Slots are filled without holes, a row's from its own length, so neither what a row costs nor what it
samples depends on its neighbours. Randomness is by row and by token,
`fold_in(fold_in(fold_in(key, turn), uid), t)`: any trajectory can be replayed alone.

Numbers of rows and prefixes that the caller passes count within the part of the device that holds
them (`Sampler.ways` parts a host); a number beyond the last means none.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.attention import MASKED
from mmrecoder_jax.models.config import Kernel
from mmrecoder_jax.models.decoding import (
    Bounds,
    Rows,
    Weights,
    by_layer,
    choose_cached,
    decode_step,
    decoding_weights,
    empty_cache,
)
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params, no_past, visual_tokens
from mmrecoder_jax.models.sharding import by_rows, host_ways, param_shardings

Params = Any
Prompts = dict[str, Array]  # the arrays of `batching.pad_prompts`, on the devices
Leaf = TypeVar("Leaf")

# Sizes of prefixes and rows that programs of decoding look at, at most, where no kernel counts
# slots; and slots of the smallest block. XLA copies a block before it reads it, which costs more
# than is spared where slots are few.
BOUNDS = (2, 4)
LEAST_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """Choices that are static under jit.

    Attributes:
      response_length: R, the longest response in tokens.
      forbidden: ids that are never sampled.
      eos_ids: ids that end a response.
      pad_id: stands behind the end of a response.
      temperature: 0 is greedy.
      chunk: tokens decoded between checks for finished rows.
      top_k: only so many most probable ids are sampled; 0: all.
      top_p: only the most probable ids that together have this probability.
      min_p: only ids that are at least this share as probable as the most probable one.
      stop: sequences of ids that end a response, beside `eos_ids`.
    """

    response_length: int
    forbidden: tuple[int, ...]
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float
    chunk: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Places:
    """How large a state is: rows and prefixes of a host, and their slots."""

    rows: int
    prefixes: int
    row_slots: int
    prefix_slots: int


class SamplerState(flax.struct.PyTreeNode, Generic[Leaf]):
    """Everything that a batch of half-written conversations needs.

    A tree of arrays that is donated from step to step, or of their shapes or shardings (`Leaf`).
    """

    prefix: Any  # layer by layer {"k", "v"}: [P, K, prefix_slots, F]
    prefix_lengths: Leaf  # int32 [P]: slots that hold something
    prefix_positions: Leaf  # int32 [P]: next M-RoPE position (text: the same on all three axes)
    prefix_logits: Leaf  # float32 [P, V]: of the token that follows
    own: Any  # layer by layer {"k", "v"}: [B, K, row_slots, F]
    lengths: Leaf  # int32 [B]
    positions: Leaf  # int32 [B]
    logits: Leaf  # float32 [B, V]
    tokens: Leaf  # int32 [B, R]: this turn's response so far
    logps: Leaf  # float32 [B, R]: its log-probabilities under the policy
    sampled_logps: Leaf  # float32 [B, R]: and under what it was sampled from (top_k, top_p, min_p)
    count: Leaf  # int32 [B]: tokens of the response
    live: Leaf  # bool [B]: the response goes on
    ended: Leaf  # bool [B]: by an end token or a stop sequence, not by the length limit


class Plan(flax.struct.PyTreeNode, Generic[Leaf]):
    """Which conversation is in which row while a chunk is decoded.

    Attributes:
      start: bool [B]: rows that begin a turn behind their prefix.
      prefix: int32 [B]: each row's.
      members, place: int32 [P, M] and [B]: see `models.decoding`.
      uid, turn: uint32 and int32 [B]: what decides a row's random numbers.
      limit: int32 [B]: tokens after which a response is cut; `spec.response_length` at most.
    """

    start: Leaf
    prefix: Leaf
    members: Leaf
    place: Leaf
    uid: Leaf
    turn: Leaf
    limit: Leaf


class Draft(flax.struct.PyTreeNode, Generic[Leaf]):
    """Responses as far as they are written: the fields of a `SamplerState`, of some rows."""

    tokens: Leaf  # int32 [N, R]
    logps: Leaf  # float32 [N, R]
    sampled_logps: Leaf  # float32 [N, R]
    count: Leaf  # int32 [N]


@dataclasses.dataclass(frozen=True)
class Response:
    """One sampled turn of one row; `finished` is False if the length limit cut it.

    `logps` are log-probabilities under the policy, `sampled_logps` under what it was sampled from.
    """

    ids: Int[np.ndarray, " R"]
    logps: Float[np.ndarray, " R"]
    finished: bool
    sampled_logps: Float[np.ndarray, " R"]


class Sampler:
    """Prefill, extend and decode for one model on one mesh."""

    def __init__(self, model: Qwen25VL, spec: SamplerSpec, mesh: Mesh):
        self.model, self.spec, self.mesh = model, spec, mesh
        self.ways = host_ways(mesh)
        platform = mesh.devices.flat[0].platform
        config = model.config
        kernel = choose_cached(config.attention, platform, config.dtype, config.head_dim)
        self._counts_slots = kernel is not Kernel.XLA
        # Programs are told the temperature: greedy ones are the same.
        self._programs = _programs(model, dataclasses.replace(spec, temperature=1.0), mesh)

    def begin(self, places: Places) -> SamplerState[Array]:
        """A state without conversations."""
        places = dataclasses.replace(
            places,
            rows=places.rows * jax.process_count(),
            prefixes=places.prefixes * jax.process_count(),
        )
        with jax.set_mesh(self.mesh):
            return self._programs.begin(places=places)

    def weights(self, params: Params) -> Weights:
        """What `decode` reads of the policy: a copy in the type of compute, layer by layer."""
        with jax.set_mesh(self.mesh):
            return self._programs.weights(params)

    def prefill(
        self,
        params: Params,
        state: SamplerState[Array],
        prompts: dict[str, np.ndarray],
        prefixes: Int[np.ndarray, " N"],
    ) -> SamplerState[Array]:
        """Writes prompts to prefixes. `state` is consumed, as by all that follow.

        Args:
          prompts: of `batching.pad_prompts`.
          prefixes: where each goes.
        """
        return self._filled(params, state, prompts, prefixes, True)

    def extend_prefix(
        self,
        params: Params,
        state: SamplerState[Array],
        prompts: dict[str, np.ndarray],
        prefixes: Int[np.ndarray, " N"],
    ) -> SamplerState[Array]:
        """Appends shown pieces (feedback) to prefixes."""
        return self._filled(params, state, prompts, prefixes, False)

    def _filled(
        self,
        params: Params,
        state: SamplerState[Array],
        prompts: dict[str, np.ndarray],
        prefixes: Int[np.ndarray, " N"],
        fresh: bool,
    ) -> SamplerState[Array]:
        with jax.set_mesh(self.mesh):
            arrays = distributed.to_global((prompts, prefixes.astype(np.int32)), self.mesh)
            return self._programs.fill(params, state, *arrays, fresh=fresh)

    def extend(
        self,
        params: Params,
        state: SamplerState[Array],
        prompts: dict[str, np.ndarray],
        rows: Int[np.ndarray, " N"],
        prefixes: Int[np.ndarray, " N"],
        lengths: Int[np.ndarray, " N"],
        drafts: Sequence[Response | None],
    ) -> SamplerState[Array]:
        """Appends pieces (feedback, or all that a row held) to rows, which then decode a turn.

        Args:
          prefixes: of the rows.
          lengths: slots of the rows that hold something; what lies behind them is forgotten.
          drafts: beginnings of the turns, which the pieces end with; None where there is none.
        """
        spec, n = self.spec, len(rows)
        draft = Draft(
            tokens=np.full((n, spec.response_length), spec.pad_id, np.int32),
            logps=np.zeros((n, spec.response_length), np.float32),
            sampled_logps=np.zeros((n, spec.response_length), np.float32),
            count=np.zeros(n, np.int32),
        )
        for i, begun in enumerate(drafts):
            if begun is not None:
                draft.count[i] = count = len(begun.ids)
                draft.tokens[i, :count], draft.logps[i, :count] = begun.ids, begun.logps
                draft.sampled_logps[i, :count] = begun.sampled_logps
        numbers = tuple(x.astype(np.int32) for x in (rows, prefixes, lengths))
        with jax.set_mesh(self.mesh):
            arrays = distributed.to_global((prompts, *numbers, draft), self.mesh)
            return self._programs.extend(params, state, *arrays)

    def promote(
        self,
        state: SamplerState[Array],
        rows: Int[np.ndarray, " N"],
        prefixes: Int[np.ndarray, " N"],
    ) -> SamplerState[Array]:
        """Moves what rows hold to the ends of prefixes: a turn that a group has in common."""
        with jax.set_mesh(self.mesh):
            arrays = rows.astype(np.int32), prefixes.astype(np.int32)
            return self._programs.promote(state, *distributed.to_global(arrays, self.mesh))

    def decode(
        self,
        weights: Weights,
        state: SamplerState[Array],
        plan: Plan[Any],
        key: jax.Array,
        longest: tuple[int, int],
    ) -> SamplerState[Array]:
        """Samples up to `spec.chunk` tokens of every live row, and of those that start.

        Args:
          weights: of `weights`.
          plan: this host's, of NumPy arrays.
          key: decides random numbers, together with the rows' uids and turns.
          longest: most valid slots of a prefix and of a live row, over all hosts.
        """
        bounds = self.bounds(longest, (state.prefix[0]["k"].shape[2], state.own[0]["k"].shape[2]))
        with jax.set_mesh(self.mesh):
            there = distributed.to_global(plan, self.mesh)
            temperature = np.float32(self.spec.temperature)
            return self._programs.decode(weights, state, there, key, temperature, bounds=bounds)

    def bounds(self, longest: tuple[int, int], slots: tuple[int, int]) -> Bounds:
        """What a chunk may look at; all slots where a kernel counts them."""
        if self._counts_slots:
            longest = slots
        sizes = [
            min(most, -(-count // LEAST_BLOCK)) for most, count in zip(BOUNDS, slots, strict=True)
        ]
        of_prefixes = bounded(longest[0], slots[0], sizes[0])
        return of_prefixes, bounded(longest[1] + self.spec.chunk, slots[1], sizes[1])

    def responses(self, state: SamplerState[Array], rows: Sequence[int]) -> list[Response]:
        """The responses of this host's rows as they are now."""
        if not rows:
            return []
        fields = state.tokens, state.logps, state.sampled_logps, state.count, state.ended
        tokens, logps, sampled, count, ended = (distributed.to_host(x) for x in fields)
        return [
            Response(
                tokens[row, : count[row]],
                logps[row, : count[row]],
                bool(ended[row]),
                sampled[row, : count[row]],
            )
            for row in rows
        ]

    def answer(
        self,
        params: Params,
        prompts: dict[str, np.ndarray],
        uids: Sequence[int],
        key: jax.Array,
    ) -> list[Response]:
        """One turn to each prompt, all at once."""
        rows, length = prompts["tokens"].shape
        own = np.arange(rows) % (rows // self.ways)
        state = self.begin(Places(rows, rows, self.spec.response_length, length))
        state = self.prefill(params, state, prompts, own)
        weights, start = self.weights(params), np.ones(rows, bool)
        for done in range(0, self.spec.response_length, self.spec.chunk):
            plan = Plan(
                start=start & (done == 0),
                prefix=own.astype(np.int32),
                members=own[:, None].astype(np.int32),
                place=own.astype(np.int32),
                uid=np.asarray(uids, np.uint32),
                turn=np.ones(rows, np.int32),
                limit=np.full(rows, self.spec.response_length, np.int32),
            )
            state = self.decode(weights, state, plan, key, (length, done))
            # all hosts leave the loop together, or their programs would no longer match
            if not distributed.global_max(np.array([distributed.to_host(state.live).any()]))[0]:
                break
        return self.responses(state, range(rows))

    def abstract_state(self, places: Places) -> SamplerState[jax.ShapeDtypeStruct]:
        """Shapes and shards of what `begin` returns."""
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(functools.partial(self._programs.begin, places=places))
        return jax.tree.map(
            lambda s, part: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), part
            ),
            _state_shardings(self.mesh, self.model.config.num_kv_heads),
            shapes,
        )

    def abstract_weights(self) -> Weights:
        """Shapes and shards of what `weights` returns."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            *_abstract_weights(self.model, self.mesh),
        )

    def lower(self, program: str, *args: Any, **static: Any) -> jax.stages.Lowered:
        """Lowers a program for shapes alone.

        Args:
          program: "fill", "extend", "promote", "decode" or "weights".
        """
        with jax.set_mesh(self.mesh):
            return getattr(self._programs, program).lower(*args, **static)

    def compilations(self) -> int:
        """How many programs were compiled so far, by this sampler and those that are alike."""
        return sum(program._cache_size() for program in self._programs)


class _Programs(NamedTuple):
    """The jitted functions of samplers that are alike."""

    begin: Any
    weights: Any
    fill: Any
    extend: Any
    promote: Any
    decode: Any


@functools.lru_cache(maxsize=8)
def _programs(model: Qwen25VL, spec: SamplerSpec, mesh: Mesh) -> _Programs:
    """Made once for all samplers that are alike: what one has traced and compiled, the next runs
    (a pipeline evaluates after every stage).

    Every program leaves the state where the others expect it; otherwise each pair of programs would
    compile once more.
    """
    config = model.config
    forbidden = np.zeros(config.vocab_size, bool)
    forbidden[list(spec.forbidden)] = True
    where = _state_shardings(mesh, config.num_kv_heads)

    def jitted(function: Callable[..., Any], donated: int, *static: str) -> Any:
        return jax.jit(
            function, donate_argnums=donated, static_argnames=static, out_shardings=where
        )

    return _Programs(
        begin=jax.jit(
            functools.partial(_begin, model, spec), static_argnames="places", out_shardings=where
        ),
        weights=jax.jit(
            functools.partial(decoding_weights, config=config),
            out_shardings=_abstract_weights(model, mesh)[1],
        ),
        fill=jitted(functools.partial(_fill, model), 1, "fresh"),
        extend=jitted(functools.partial(_extend, model), 1),
        promote=jitted(_promote, 0),
        decode=jitted(functools.partial(_decode, model, spec, forbidden), 1, "bounds"),
    )


def bounded(length: int, slots: int, sizes: int) -> tuple[int, int]:
    """(the smallest of so many sizes, equal steps up to all `slots`, that holds `length`; a step).

    >>> [bounded(length, 264, 4)[0] for length in (1, 66, 67, 300)]
    [66, 66, 132, 264]
    """
    block = -(-slots // sizes)
    return min(slots, -(-max(length, 1) // block) * block), block


def _abstract_weights(model: Qwen25VL, mesh: Mesh) -> tuple[Any, Any]:
    """(shapes, shards) of the weights of decoding: cut as the parameters they are made of."""
    config = model.config
    shapes = jax.eval_shape(
        lambda: decoding_weights(init_params(config, jax.random.key(0)), config)
    )
    return shapes, param_shardings(shapes, mesh)


def _state_shardings(mesh: Mesh, kv_heads: int) -> SamplerState[NamedSharding]:
    """Cuts rows over `data` and `fsdp`, and key-value heads over `tensor` if it divides them."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    heads = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    cache = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), heads))
    names = [field.name for field in dataclasses.fields(SamplerState)]
    return SamplerState(**{name: cache if name in ("prefix", "own") else rows for name in names})


def _begin(model: Qwen25VL, spec: SamplerSpec, places: Places) -> SamplerState[Array]:
    b, p, size = places.rows, places.prefixes, model.config.vocab_size
    return SamplerState(
        prefix=empty_cache(model.config, p, places.prefix_slots),
        prefix_lengths=jnp.zeros(p, jnp.int32),
        prefix_positions=jnp.zeros(p, jnp.int32),
        prefix_logits=jnp.zeros((p, size), jnp.float32),
        own=empty_cache(model.config, b, places.row_slots),
        lengths=jnp.zeros(b, jnp.int32),
        positions=jnp.zeros(b, jnp.int32),
        logits=jnp.zeros((b, size), jnp.float32),
        tokens=jnp.full((b, spec.response_length), spec.pad_id, jnp.int32),
        logps=jnp.zeros((b, spec.response_length), jnp.float32),
        sampled_logps=jnp.zeros((b, spec.response_length), jnp.float32),
        count=jnp.zeros(b, jnp.int32),
        live=jnp.zeros(b, bool),
        ended=jnp.zeros(b, bool),
    )


def _taken(tree: Any, index: Int[Array, " N"]) -> Any:
    """`x[index]` of every leaf, on each device's own rows."""
    return by_rows(lambda tree, index: jax.tree.map(lambda x: x[index], tree), tree, index)


def _put(tree: Any, index: Int[Array, " N"], new: Any) -> Any:
    """`x.at[index].set(new)` of every leaf, on each device's own rows."""

    def put(tree: Any, index: Array, new: Any) -> Any:
        return jax.tree.map(lambda x, y: x.at[index].set(y, mode="drop"), tree, new)

    return by_rows(put, tree, index, new)


def _append(
    caches: Any,
    index: Int[Array, " N"],
    starts: Int[Array, " N"],
    lengths: Int[Array, " N"],
    new: Any,
) -> Any:
    """Writes `lengths` slots of `new` (layer by layer `[N, K, L, F]`) from `starts` on."""

    def append(caches: Any, index: Array, starts: Array, lengths: Array, new: Any) -> Any:
        def one(cache: Array, new: Array) -> Array:
            at = jnp.arange(new.shape[2])
            slots = jnp.where(at < lengths[:, None], starts[:, None] + at, cache.shape[2])
            values = new.swapaxes(1, 2).astype(cache.dtype)
            return cache.at[index[:, None], :, slots].set(values, mode="drop")

        return jax.tree.map(one, caches, new)

    return by_rows(append, caches, index, starts, lengths, new)


def _shown(
    model: Qwen25VL, params: Params, prompts: Prompts, past: Any, past_valid: Bool[Array, "N slots"]
) -> tuple[Any, Array, Array]:
    """(keys and values layer by layer, logits behind the last token, position that follows)."""
    variables = {"params": params}
    features = visual_tokens(model, params, prompts)
    hidden, own = model.apply(
        variables,
        prompts["tokens"],
        prompts["positions"],
        prompts["vision_index"],
        features,
        prompts["lengths"],
        past,
        past_valid,
        method=Qwen25VL.extend,
    )
    last = jnp.maximum(prompts["lengths"] - 1, 0)
    hidden_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    # text continues behind the furthest of the three axes (after an image they differ)
    positions = prompts["positions"].max(axis=1)
    position = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0] + 1
    logits = model.apply(variables, hidden_last, method=Qwen25VL.logits)
    assert isinstance(logits, jax.Array)  # without `mutable`, flax returns the output alone
    return by_layer(own, model.config), logits, position


def _stacked(parts: Sequence[Sequence[Any]]) -> Any:
    """Caches one after the other along slots, stacked over layers: `[layers, N, K, slots, F]`."""
    layers = [
        jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *of_layer)
        for of_layer in zip(*parts, strict=True)
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def _fill(
    model: Qwen25VL,
    params: Params,
    state: SamplerState[Array],
    prompts: Prompts,
    prefixes: Int[Array, " N"],
    fresh: bool,
) -> SamplerState[Array]:
    if fresh:
        past, valid = no_past(model.config, len(prefixes))
        lengths = jnp.zeros_like(prefixes)
    else:
        lengths = _taken(state.prefix_lengths, prefixes)
        past = _stacked([_taken(state.prefix, prefixes)])
        valid = jnp.arange(past["k"].shape[3]) < lengths[:, None]
    layers, logits, position = _shown(model, params, prompts, past, valid)
    shown = prompts["lengths"]
    numbers = state.prefix_lengths, state.prefix_positions, state.prefix_logits
    new = lengths + shown, position, logits
    lengths_after, positions, all_logits = _put(numbers, prefixes, new)
    return state.replace(
        prefix=_append(state.prefix, prefixes, lengths, shown, layers),
        prefix_lengths=lengths_after,
        prefix_positions=positions,
        prefix_logits=all_logits,
    )


def _extend(
    model: Qwen25VL,
    params: Params,
    state: SamplerState[Array],
    prompts: Prompts,
    rows: Int[Array, " N"],
    prefixes: Int[Array, " N"],
    own: Int[Array, " N"],
    draft: Draft[Array],
) -> SamplerState[Array]:
    before = _taken(state.prefix_lengths, prefixes)
    past = _stacked([_taken(state.prefix, prefixes), _taken(state.own, rows)])
    slots = state.prefix[0]["k"].shape[2], state.own[0]["k"].shape[2]
    valid = jnp.concatenate(
        [
            jnp.arange(count) < lengths[:, None]
            for count, lengths in zip(slots, (before, own), strict=True)
        ],
        axis=1,
    )
    layers, logits, position = _shown(model, params, prompts, past, valid)
    shown, n = prompts["lengths"], len(rows)
    changed = {
        "lengths": own + shown,
        "positions": position,
        "logits": logits,
        "tokens": draft.tokens,
        "logps": draft.logps,
        "sampled_logps": draft.sampled_logps,
        "count": draft.count,
        "live": jnp.ones(n, bool),
        "ended": jnp.zeros(n, bool),
    }
    put = _put({name: getattr(state, name) for name in changed}, rows, changed)
    return state.replace(own=_append(state.own, rows, own, shown, layers), **put)


def _promote(
    state: SamplerState[Array], rows: Int[Array, " N"], prefixes: Int[Array, " N"]
) -> SamplerState[Array]:
    lengths, before = _taken(state.lengths, rows), _taken(state.prefix_lengths, prefixes)
    moved = _taken(state.own, rows)
    return state.replace(
        prefix=_append(state.prefix, prefixes, before, lengths, moved),
        prefix_lengths=_put(state.prefix_lengths, prefixes, before + lengths),
    )


def _decode(
    model: Qwen25VL,
    spec: SamplerSpec,
    forbidden: Bool[np.ndarray, " V"],
    weights: Weights,
    state: SamplerState[Array],
    plan: Plan[Any],
    key: jax.Array,
    temperature: Float[Array, ""],
    bounds: Bounds,
) -> SamplerState[Array]:
    """At most `spec.chunk` more tokens of every live row; stops early when none is left."""
    state = _started(spec, state, plan)
    keys = jax.vmap(lambda turn, uid: jax.random.fold_in(jax.random.fold_in(key, turn), uid))(
        plan.turn, plan.uid
    )
    each = jnp.arange(len(plan.uid))

    def more(carry: tuple[Array, SamplerState[Array]]) -> Bool[Array, ""]:
        step, s = carry
        return (step < spec.chunk) & s.live.any()

    def one(carry: tuple[Array, SamplerState[Array]]) -> tuple[Array, SamplerState[Array]]:
        step, s = carry
        token, logp, sampled_logp = sample(spec, temperature, forbidden, s.logits, keys, s.count)
        # what is written beyond the last place is dropped
        at = jnp.where(s.live, s.count, spec.response_length)
        tokens = s.tokens.at[each, at].set(token, mode="drop")
        rows = Rows(plan.members, plan.place, s.prefix_lengths, s.lengths)
        logits, own = decode_step(
            model, weights, token, s.positions, s.live, s.prefix, s.own, rows, bounds
        )
        ended = s.live & ends(spec, tokens, s.count, token)
        count = s.count + s.live
        return step + 1, s.replace(
            own=own,
            lengths=s.lengths + s.live,
            positions=s.positions + s.live,
            logits=logits,
            tokens=tokens,
            logps=s.logps.at[each, at].set(logp, mode="drop"),
            sampled_logps=s.sampled_logps.at[each, at].set(sampled_logp, mode="drop"),
            count=count,
            live=s.live & ~ended & (count < plan.limit),
            ended=s.ended | ended,
        )

    return jax.lax.while_loop(more, one, (jnp.int32(0), state))[1]


def _started(spec: SamplerSpec, state: SamplerState[Array], plan: Plan) -> SamplerState[Array]:
    """The state with empty turns in the rows that start behind their prefix."""
    position, logits = _taken((state.prefix_positions, state.prefix_logits), plan.prefix)
    start = plan.start
    return state.replace(
        lengths=jnp.where(start, 0, state.lengths),
        positions=jnp.where(start, position, state.positions),
        logits=jnp.where(start[:, None], logits, state.logits),
        tokens=jnp.where(start[:, None], spec.pad_id, state.tokens),
        count=jnp.where(start, 0, state.count),
        live=state.live | start,
        ended=state.ended & ~start,
    )


def sample(
    spec: SamplerSpec,
    temperature: Float[Array, ""],
    forbidden: Bool[np.ndarray, " V"],
    logits: Float[Array, "B V"],
    keys: Any,
    step: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """(token of each row, its log-probability under the policy, and under what it is drawn from).

    The policy is the model at `temperature` without forbidden ids. `top_k`, `top_p` and `min_p` cut
    it, in this order; the most probable id always stays.

    Args:
      temperature: in place of `spec.temperature`; 0 is greedy, and its policy the model as it is.
      keys: one per row; `step` is folded in.
    """
    greedy = temperature == 0
    logits = jnp.where(forbidden, MASKED, logits / jnp.where(greedy, 1.0, temperature))
    logps = jax.nn.log_softmax(logits, axis=-1)
    cut = _cut(spec, logps)
    row_keys = jax.vmap(jax.random.fold_in)(keys, step)
    drawn = jax.vmap(jax.random.categorical)(row_keys, logits if cut is None else cut)
    token = jnp.where(greedy, logps.argmax(axis=-1), drawn)
    logp = jnp.take_along_axis(logps, token[:, None], axis=1)[:, 0]
    sampled = logp
    if cut is not None:
        sampled = jax.nn.log_softmax(cut, axis=-1)
        sampled = jnp.take_along_axis(sampled, token[:, None], axis=1)[:, 0]
    return token.astype(jnp.int32), logp, sampled


def noise(key: jax.Array, turn: int, uid: int, token: int, vocab: int) -> Float[Array, " V"]:
    """What `sample` adds to the log-probabilities of a row's token, the first of which is 0, before
    it takes the largest (Gumbel's trick): the row's random numbers.
    """
    row = jax.random.fold_in(jax.random.fold_in(key, turn), uid)
    return jax.random.gumbel(jax.random.fold_in(row, token), (vocab,), jnp.float32)


def _cut(spec: SamplerSpec, logps: Float[Array, "B V"]) -> Float[Array, "B V"] | None:
    """Log-probabilities, MASKED where they are cut; None where nothing is cut."""
    cut = None
    if 0 < spec.top_k < logps.shape[-1]:
        least = jax.lax.top_k(logps, spec.top_k)[0][:, -1:]
        cut = jnp.where(logps >= least, logps, MASKED)
    if spec.top_p < 1.0:
        logps = logps if cut is None else jax.nn.log_softmax(cut, axis=-1)
        ordered = jnp.sort(logps, axis=-1, descending=True)
        before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
        least = jnp.where(before < spec.top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        cut = jnp.where(logps >= jnp.minimum(least, ordered[:, :1]), logps, MASKED)
    if spec.min_p > 0.0:
        logps = logps if cut is None else cut
        least = logps.max(axis=-1, keepdims=True) + jnp.log(spec.min_p)
        cut = jnp.where(logps >= least, logps, MASKED)
    return cut


def ends(
    spec: SamplerSpec,
    tokens: Int[Array, "B R"],
    at: Int[Array, " B"],
    token: Int[Array, " B"],
) -> Bool[Array, " B"]:
    """Whether the token at place `at` of each response is an end token or completes a stop
    sequence.
    """
    ended = (token[:, None] == jnp.array(spec.eos_ids)).any(axis=1)
    for stop in spec.stop:
        places = at[:, None] - jnp.arange(len(stop))[::-1]
        window = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1)
        ended |= ((window == jnp.array(stop)) & (places >= 0)).all(axis=1)
    return ended

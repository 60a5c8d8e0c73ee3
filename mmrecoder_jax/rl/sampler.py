"""Turn-by-turn sampling with one live key-value cache.

The prompt is prefilled, a turn is decoded, the cache is extended with the feedback, and the next
turn is decoded. Rows of a batch have different lengths, but all write the same cache slots. Holes
(right padding of a prompt, slots after a row has ended) are marked invalid and never attended;
positions are carried per row:

    slot      0 1 2 3 4 | 5 6 7 8 | 9 10 11 | 12 13 ...
    row 0     p p p p - | r r r - | f  f  -  | r  r        p prompt, r response, f feedback, - hole
    row 1     p p p p p | r r r r | f  f  f  | r  r

All programs have static shapes; `Sampler.compilations()` counts them. The sampler reads the
trainer's own parameters, so there is nothing to synchronise.

Randomness is per row and per step, `fold_in(fold_in(fold_in(key, turn), uid), t)`: a row's tokens
do not depend on its batch or device, so any trajectory can be replayed alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_cache, visual_tokens

Params = Any
Prompts = dict[str, Array]  # the arrays of `batching.pad_prompts`, on the devices
Leaf = TypeVar("Leaf")

BY_ROW = ("valid", "position", "logits", "tokens", "logps", "done", "length")  # B is axis 0


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """Choices that are static under jit.

    Attributes:
      response_length: R, the longest response in tokens.
      forbidden: ids that are never sampled.
      eos_ids: ids that end a response.
      pad_id: fills the response of a row that has ended.
      temperature: 0 is greedy.
      chunk: tokens decoded between checks for finished rows.
    """

    response_length: int
    forbidden: tuple[int, ...]
    eos_ids: tuple[int, ...]
    pad_id: int
    temperature: float
    chunk: int


class SamplerState(flax.struct.PyTreeNode, Generic[Leaf]):
    """Everything that a batch of half-written conversations needs.

    A tree of arrays that is donated from step to step, or of their shapes or shardings (`Leaf`).
    """

    cache: Any  # {"k", "v"}: [layers, B, K, S, F]
    valid: Leaf  # bool [B, S]: slots that may be attended
    slot: Leaf  # int32 []: next slot to write
    position: Leaf  # int32 [B]: next M-RoPE position (text: the same on all three axes)
    logits: Leaf  # float32 [B, V]: of the next token
    tokens: Leaf  # int32 [B, R]: this turn's response so far
    logps: Leaf  # float32 [B, R]: and its log-probabilities
    step: Leaf  # int32 []: tokens written in this turn
    done: Leaf  # bool [B]
    length: Leaf  # int32 [B]: response length including the end token


@dataclasses.dataclass(frozen=True)
class Response:
    """One sampled turn of one row; `finished` is False if the length limit cut it."""

    ids: Int[np.ndarray, " R"]
    logps: Float[np.ndarray, " R"]
    finished: bool


class Sampler:
    """Prefill, decode and extend for one model on one mesh."""

    def __init__(self, model: Qwen25VL, spec: SamplerSpec, mesh: Mesh):
        self.model, self.spec, self.mesh = model, spec, mesh
        forbidden = np.zeros(model.config.vocab_size, bool)
        forbidden[list(spec.forbidden)] = True

        # The jitted functions are made per sampler, so that each sampler counts its own programs.
        # Every program leaves the state where the others expect it; otherwise each pair of programs
        # would compile once more.
        where = _state_shardings(mesh, model.config.num_kv_heads)
        self._prefill = jax.jit(
            functools.partial(_prefill, model, spec), static_argnames="slots", out_shardings=where
        )
        self._extend = jax.jit(
            functools.partial(_extend, model, spec), donate_argnums=1, out_shardings=where
        )
        self._decode = jax.jit(
            functools.partial(_decode, model, spec, forbidden),
            donate_argnums=1,
            out_shardings=where,
        )
        self._repeat = jax.jit(
            functools.partial(_repeat), static_argnames="times", out_shardings=where
        )

    def prefill(
        self, params: Params, prompts: dict[str, np.ndarray], slots: int
    ) -> SamplerState[Array]:
        """Starts B conversations from the arrays of `batching.pad_prompts`.

        Args:
          slots: size of the cache: prompt, responses and feedback of all turns.
        """
        with jax.set_mesh(self.mesh):
            return self._prefill(params, distributed.to_global(prompts, self.mesh), slots=slots)

    def extend(
        self, params: Params, state: SamplerState[Array], prompts: dict[str, np.ndarray]
    ) -> SamplerState[Array]:
        """Appends shown pieces (feedback) to the live cache. `state` is consumed."""
        with jax.set_mesh(self.mesh):
            return self._extend(params, state, distributed.to_global(prompts, self.mesh))

    def repeat(self, state: SamplerState[Array], times: int) -> SamplerState[Array]:
        """Repeats each row in place: with `times=2`, rows (a, b) become (a, a, b, b)."""
        with jax.set_mesh(self.mesh):
            return self._repeat(state, times=times)

    def decode(
        self,
        params: Params,
        state: SamplerState[Array],
        uids: Sequence[int],
        key: jax.Array,
        on_finished: Callable[[int, Response], None] | None = None,
    ) -> tuple[SamplerState[Array], list[Response]]:
        """Samples one turn of every row. `state` is consumed.

        Args:
          uids: identify this host's rows to the random numbers.
          key: of this turn.
          on_finished: `on_finished(row, response)` is called as soon as a row has ended, while the
            others still decode. The host checks every `spec.chunk` tokens.

        Returns:
          (state, this host's responses in row order).
        """
        rows = len(uids)
        responses: dict[int, Response] = {}
        with jax.set_mesh(self.mesh):
            ids = distributed.to_global(np.asarray(uids, np.uint32), self.mesh)
            for start in range(0, self.spec.response_length, self.spec.chunk):
                state = self._decode(params, state, ids, key)
                done = distributed.to_host(state.done)
                last = start + self.spec.chunk >= self.spec.response_length
                ready = [row for row in range(rows) if row not in responses and (done[row] or last)]
                if ready:
                    tokens, logps, length = (
                        distributed.to_host(x) for x in (state.tokens, state.logps, state.length)
                    )
                    for row in ready:
                        n = int(length[row])
                        responses[row] = Response(tokens[row, :n], logps[row, :n], bool(done[row]))
                        if on_finished is not None:
                            on_finished(row, responses[row])
                # all hosts leave the loop together, or their programs would no longer match
                if distributed.global_max(np.array([not done.all()]))[0] == 0:
                    break
        return state, [responses[row] for row in range(rows)]

    def abstract_state(
        self, params: Params, prompts: dict[str, Any], slots: int
    ) -> SamplerState[jax.ShapeDtypeStruct]:
        """Shapes and shards of what `prefill` returns, from shapes alone."""
        prefill = functools.partial(self._prefill, slots=slots)
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(prefill, params, prompts)
        return jax.tree.map(
            lambda s, part: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), part
            ),
            _state_shardings(self.mesh, self.model.config.num_kv_heads),
            shapes,
        )

    def lower(self, program: str, *args: Any, **static: Any) -> jax.stages.Lowered:
        """Lowers the program of a method for shapes alone.

        Args:
          program: "prefill", "extend", "decode" or "repeat".
        """
        programs = {
            "prefill": self._prefill,
            "extend": self._extend,
            "decode": self._decode,
            "repeat": self._repeat,
        }
        with jax.set_mesh(self.mesh):
            return programs[program].lower(*args, **static)

    def compilations(self) -> int:
        """How many programs were compiled so far."""
        programs: list[Any] = [self._prefill, self._extend, self._decode, self._repeat]
        return sum(program._cache_size() for program in programs)


def _state_shardings(mesh: Mesh, kv_heads: int) -> SamplerState[NamedSharding]:
    """Cuts rows over `data` and `fsdp`, and key-value heads over `tensor` if it divides them."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    heads = "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None
    cache = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), heads))
    whole = NamedSharding(mesh, PartitionSpec())
    return SamplerState(cache=cache, slot=whole, step=whole, **dict.fromkeys(BY_ROW, rows))


def _prefill(
    model: Qwen25VL, spec: SamplerSpec, params: Params, prompts: Prompts, slots: int
) -> SamplerState[Array]:
    rows = prompts["tokens"].shape[0]
    state = SamplerState(
        cache=init_cache(model.config, rows, slots),
        valid=jnp.zeros((rows, slots), bool),
        slot=jnp.int32(0),
        position=jnp.zeros(rows, jnp.int32),
        logits=jnp.zeros((rows, model.config.vocab_size), jnp.float32),
        tokens=jnp.zeros((rows, spec.response_length), jnp.int32),
        logps=jnp.zeros((rows, spec.response_length), jnp.float32),
        step=jnp.int32(0),
        done=jnp.zeros(rows, bool),
        length=jnp.zeros(rows, jnp.int32),
    )
    return _extend(model, spec, params, state, prompts)


def _extend(
    model: Qwen25VL, spec: SamplerSpec, params: Params, state: SamplerState[Array], prompts: Prompts
) -> SamplerState[Array]:
    rows, length = prompts["tokens"].shape
    variables = {"params": params}
    features = visual_tokens(model, params, prompts)
    shown = jnp.arange(length) < prompts["lengths"][:, None]
    valid = jax.lax.dynamic_update_slice(state.valid, shown, (0, state.slot))
    hidden, cache = model.apply(
        variables,
        prompts["tokens"],
        prompts["positions"],
        prompts["vision_index"],
        features,
        state.cache,
        state.slot,
        valid,
        method=Qwen25VL.extend,
    )
    last = prompts["lengths"] - 1
    hidden_last = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    # text continues behind the furthest of the three axes (after an image they differ)
    positions = prompts["positions"].max(axis=1)
    position_last = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0]
    return state.replace(
        cache=cache,
        valid=valid,
        slot=state.slot + length,
        position=position_last + 1,
        logits=model.apply(variables, hidden_last, method=Qwen25VL.logits),
        tokens=jnp.full((rows, spec.response_length), spec.pad_id, jnp.int32),
        logps=jnp.zeros((rows, spec.response_length), jnp.float32),
        step=jnp.int32(0),
        done=jnp.zeros(rows, bool),
        length=jnp.zeros(rows, jnp.int32),
    )


def _decode(
    model: Qwen25VL,
    spec: SamplerSpec,
    forbidden: Bool[np.ndarray, " V"],
    params: Params,
    state: SamplerState[Array],
    uids: UInt[Array, " B"],
    key: jax.Array,
) -> SamplerState[Array]:
    """Decodes at most `spec.chunk` more tokens of the turn; stops early when every row is done."""
    variables = {"params": params}
    row_keys = jax.vmap(lambda uid: jax.random.fold_in(key, uid))(uids)
    eos = jnp.array(spec.eos_ids)
    stop = jnp.minimum(state.step + spec.chunk, spec.response_length)

    def more(s: SamplerState[Array]) -> Bool[Array, ""]:
        return (s.step < stop) & ~s.done.all()

    def one(s: SamplerState[Array]) -> SamplerState[Array]:
        logits = jnp.where(forbidden, -1e30, s.logits / (spec.temperature or 1.0))
        if spec.temperature == 0:
            chosen = logits.argmax(axis=-1)
        else:
            step_keys = jax.vmap(lambda k: jax.random.fold_in(k, s.step))(row_keys)
            chosen = jax.vmap(jax.random.categorical)(step_keys, logits)
        logps = jax.nn.log_softmax(logits, axis=-1)
        logp = jnp.take_along_axis(logps, chosen[:, None], axis=1)[:, 0]
        token = jnp.where(s.done, spec.pad_id, chosen).astype(jnp.int32)
        valid = jax.lax.dynamic_update_slice(s.valid, ~s.done[:, None], (0, s.slot))
        hidden, cache = model.apply(
            variables,
            token[:, None],
            jnp.broadcast_to(s.position[:, None, None], (*token.shape, 3, 1)),
            None,
            None,
            s.cache,
            s.slot,
            valid,
            method=Qwen25VL.extend,
        )
        return s.replace(
            cache=cache,
            valid=valid,
            slot=s.slot + 1,
            position=s.position + ~s.done,
            logits=model.apply(variables, hidden[:, 0], method=Qwen25VL.logits),
            tokens=jax.lax.dynamic_update_slice(s.tokens, token[:, None], (0, s.step)),
            logps=jax.lax.dynamic_update_slice(
                s.logps, jnp.where(s.done, 0.0, logp)[:, None], (0, s.step)
            ),
            step=s.step + 1,
            done=s.done | (token[:, None] == eos).any(axis=1),
            length=s.length + ~s.done,
        )

    return jax.lax.while_loop(more, one, state)


def _repeat(state: SamplerState[Array], times: int) -> SamplerState[Array]:
    changes = {name: jnp.repeat(getattr(state, name), times, axis=0) for name in BY_ROW}
    return state.replace(
        cache=jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), state.cache), **changes
    )

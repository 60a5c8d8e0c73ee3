"""One token a row over a cache: the part of the model that rollouts spend their time in.

A row's keys and values are in two places, both filled from slot 0 without holes:

    prefix   [P, K, slots, F]   what several rows have in common: a prompt, or all that came before
                                a group's rows part. Held once, read once a step for all its rows.
    own      [B, K, slots, F]   what the row alone has seen and written since

A row's mean over both is put together from two means and their log-sum-exps, so a row costs what
is valid in it and does not depend on its neighbours. Queries go to their prefix and come back;
keys never move:

    members [P, M]   rows of a prefix, M at most; -1 where there are fewer
    place [B]        where a row is in `members`, flat

Layers are a Python loop over arrays of their own, not a scan over stacked ones: a scan copies the
layer's weights and its keys and values in every step (on a GPU, half of the time of a step).
"""

import operator
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

# `jax.nn.dot_product_attention` rounds log-sum-exps to 16 bits: shares would be wrong by per cents.
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mmrecoder_jax.models.attention import MASKED
from mmrecoder_jax.models.config import Kernel, ModelConfig
from mmrecoder_jax.models.language import DecoderLayer, KeysValues, mrope
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.sharding import activation_spec, mesh_platform

Params = Any
Leaf = TypeVar("Leaf")
# (slots that are looked at, slots of a block) of prefixes, of rows: no live row has more, its token
# counted. They matter where no kernel counts slots (`choose_cached`).
Bounds = tuple[tuple[int, int], tuple[int, int]]


class Weights(flax.struct.PyTreeNode):
    """What a step of decoding reads, in the type of compute: layer by layer, and the rest."""

    layers: tuple[Params, ...]
    rest: Params


class Rows(flax.struct.PyTreeNode, Generic[Leaf]):
    """Which rows read which prefix; see the top of this module. Counted within a device's part.

    Attributes:
      members: int32 [P, M].
      place: int32 [B].
      prefix_lengths, own_lengths: int32 [P] and [B]: valid slots.
    """

    members: Leaf
    place: Leaf
    prefix_lengths: Leaf
    own_lengths: Leaf


def decoding_weights(params: Params, config: ModelConfig) -> Weights:
    """The parameters of the decoder, layer by layer and in the type of compute."""
    model = dict(params["model"])
    stacked = model.pop("layers")
    rest = {"model": model} | {name: params[name] for name in ("lm_head",) if name in params}
    rest, stacked = jax.tree.map(lambda x: x.astype(config.dtype), (rest, stacked))
    return Weights(by_layer(stacked, config), rest)


def by_layer(stacked: Any, config: ModelConfig) -> tuple[Any, ...]:
    """A tree of arrays stacked along axis 0, layer by layer."""
    return tuple(jax.tree.map(operator.itemgetter(i), stacked) for i in range(config.num_layers))


def empty_cache(config: ModelConfig, rows: int, slots: int) -> tuple[KeysValues, ...]:
    """Keys and values of nothing, layer by layer."""
    shape = (rows, config.num_kv_heads, slots, config.head_dim)
    return tuple(
        {name: jnp.zeros(shape, config.dtype) for name in ("k", "v")}
        for _ in range(config.num_layers)
    )


def decode_step(
    model: Qwen25VL,
    weights: Weights,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    live: Bool[Array, " B"],
    prefix: Sequence[KeysValues],
    own: Sequence[KeysValues],
    rows: Rows[Any],
    bounds: Bounds,
) -> tuple[Float[Array, "B V"], tuple[KeysValues, ...]]:
    """(float32 scores of each row's next token, own keys and values with the token's).

    Args:
      position: M-RoPE position of the token; text has one for all axes.
      live: rows that have a token; the others write nothing.
      rows: lengths are those before the token.
      bounds: of prefixes and of rows.
    """
    config = model.config
    everywhere = jnp.broadcast_to(position[:, None, None], (*position.shape, 3, 1))
    rope = mrope(everywhere, config)
    x = _of(model.apply({"params": weights.rest}, token[:, None], method=Qwen25VL.embed))
    layer = DecoderLayer(config)
    written: list[Any] = []
    for params, shared, mine in zip(weights.layers, prefix, own, strict=True):

        def look(
            q: Array, k: Array, v: Array, shared: KeysValues = shared, mine: KeysValues = mine
        ) -> tuple[Array, KeysValues]:
            return cached_attention(q, k, v, live, shared, mine, rows, bounds, config.attention)

        x, kept = layer.apply({"params": params}, x, rope, look, method=DecoderLayer.with_look)
        written.append(kept)
    hidden = model.apply({"params": weights.rest}, x, method=Qwen25VL.finish)
    logits = model.apply({"params": weights.rest}, _of(hidden)[:, 0], method=Qwen25VL.logits)
    return _of(logits), tuple(written)


def _of(output: Any) -> Array:
    assert isinstance(output, jax.Array)  # without `mutable`, flax returns the output alone
    return output


def cached_attention(
    q: Float[Array, "B 1 H F"],
    k: Float[Array, "B 1 K F"],
    v: Float[Array, "B 1 K F"],
    live: Bool[Array, " B"],
    prefix: KeysValues,
    own: KeysValues,
    rows: Rows[Any],
    bounds: Bounds,
    implementation: str = Kernel.AUTO,
) -> tuple[Float[Array, "B 1 H F"], KeysValues]:
    """(mean of the values before and at the token, own keys and values with the token's)."""
    kernel = choose_cached(implementation, mesh_platform(), q.dtype, q.shape[-1])

    def local(
        q: Array,
        k: Array,
        v: Array,
        live: Array,
        prefix: KeysValues,
        own: KeysValues,
        rows: Rows[Any],
    ) -> tuple[Array, KeysValues]:
        return _cached_attention(q, k, v, live, prefix, own, rows, bounds, kernel)

    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, live, prefix, own, rows)
    heads = activation_spec(k.shape, "batch", "length", "heads", None)
    by_row = activation_spec(live.shape, "batch")
    cached = PartitionSpec(heads[0], heads[2])
    keys = {"k": cached, "v": cached}
    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, by_row, keys, keys, Rows(by_row, by_row, by_row, by_row)),
        out_specs=(heads, keys),
        check_vma=False,
    )(q, k, v, live, prefix, own, rows)


def choose_cached(implementation: str, platform: str, dtype: Any, features: int) -> Kernel:
    """What computes attention of one query a row over the valid slots of a cache.

    cuDNN, given lengths and no mask, reads what is valid and no more (forward alone; nothing is
    known to be wrong with it there); it takes 16-bit types and heads of up to 128. Elsewhere XLA
    reads the slots below a bound that the caller gives.
    """
    kernel = Kernel(implementation)
    wanted = kernel in (Kernel.AUTO, Kernel.CUDNN) and platform in ("gpu", "cuda")
    fits = features % 8 == 0 and features <= 128 and jnp.dtype(dtype).itemsize == 2
    return Kernel.CUDNN if wanted and fits else Kernel.XLA


def _cached_attention(
    q: Array,
    k: Array,
    v: Array,
    live: Array,
    prefix: KeysValues,
    own: KeysValues,
    rows: Rows[Any],
    bounds: Bounds,
    kernel: Kernel,
) -> tuple[Array, KeysValues]:
    b, _, h, f = q.shape
    kv_heads, slots = own["k"].shape[1:3]
    sharing = h // kv_heads
    q = q.reshape(b, kv_heads, sharing, f)
    # a slot beyond the last is written nowhere
    where = jnp.where(live, rows.own_lengths, slots)
    # Every dimension before the features has an index: else a TPU lays the whole cache out anew for
    # the program, and back behind it.
    at = jnp.arange(b)[:, None], jnp.arange(kv_heads)[None], where[:, None]
    own = {
        name: own[name].at[at].set(new[:, 0].astype(own[name].dtype), mode="drop")
        for name, new in (("k", k), ("v", v))
    }
    mean, total = _partial(q, own, rows.own_lengths + live, *bounds[1], kernel)

    prefixes, most = rows.members.shape
    asked = q[jnp.maximum(rows.members, 0)]  # [P, M, K, sharing, F]
    asked = asked.swapaxes(1, 2).reshape(prefixes, kv_heads, most * sharing, f)
    mean_before, total_before = _partial(asked, prefix, rows.prefix_lengths, *bounds[0], kernel)

    def back(x: Array) -> Array:  # [P, K, M * sharing, ...] -> [B, K, sharing, ...]
        x = x.reshape(prefixes, kv_heads, most, sharing, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(prefixes * most, kv_heads, sharing, *x.shape[4:])[rows.place]

    mean_before, total_before = back(mean_before), back(total_before)
    share = jax.nn.sigmoid(total - total_before)[..., None]  # of the own slots in the whole sum
    y = share * mean.astype(jnp.float32) + (1.0 - share) * mean_before.astype(jnp.float32)
    return y.astype(v.dtype).reshape(b, 1, h, f), own


def _partial(
    q: Float[Array, "N K R F"],
    cache: KeysValues,
    lengths: Int[Array, " N"],
    bound: int,
    block: int,
    kernel: Kernel,
) -> tuple[Float[Array, "N K R F"], Float[Array, "N K R"]]:
    """(mean of the values in the first `lengths` slots, float32 log-sum-exp of the scores).

    Where there are none the mean is of no meaning and the log-sum-exp hugely negative.
    """
    n, kv_heads, queries, f = q.shape
    if kernel is Kernel.CUDNN:
        # Each key head is a row of one key head: `[N, K, S, F]` is read as it lies.
        keys, values = (cache[name].reshape(n * kv_heads, -1, 1, f) for name in ("k", "v"))
        mean, total = cudnn.dot_product_attention(
            q.reshape(n * kv_heads, 1, queries, f),
            keys,
            values,
            q_seqlen=jnp.ones(n * kv_heads, jnp.int32),
            kv_seqlen=jnp.repeat(jnp.maximum(lengths, 1), kv_heads),
            scale=f**-0.5,
            mask_type=cudnn.MaskType.PADDING,
            return_residual=True,
        )
        mean = mean.reshape(n, kv_heads, queries, f)
        total = total.reshape(n, kv_heads, queries)
        return mean, jnp.where(lengths[:, None, None] > 0, total, MASKED)
    # Block by block, each of one size whatever the bound: a row's numbers are the same to the bit,
    # however many empty blocks follow its last one.
    found = None
    for start in range(0, bound, block):
        part = _block(q, cache, lengths, slice(start, start + block))
        found = part if found is None else _joined(found, part)
    assert found is not None, "there is a slot"
    most, total, sums = found
    return sums / total[..., None], most + jnp.log(total)


def _block(q: Array, cache: KeysValues, lengths: Array, part: slice) -> tuple[Array, Array, Array]:
    """(largest score, sum of weights, weighted sum of values) of the valid slots of a block."""
    keys, values = cache["k"][:, :, part], cache["v"][:, :, part]
    scores = jnp.einsum(
        "nkrf,nksf->nkrs", q * q.shape[-1] ** -0.5, keys, preferred_element_type=jnp.float32
    )
    valid = part.start + jnp.arange(keys.shape[2]) < lengths[:, None]
    scores = jnp.where(valid[:, None, None], scores, MASKED)
    most = scores.max(axis=-1)
    weights = jnp.exp(scores - most[..., None])
    sums = jnp.einsum(
        "nkrs,nksf->nkrf", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return most, weights.sum(axis=-1), sums


def _joined(
    a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Of two blocks together; one without a valid slot adds exactly nothing to another."""
    most = jnp.maximum(a[0], b[0])
    shares = jnp.exp(a[0] - most), jnp.exp(b[0] - most)
    total = a[1] * shares[0] + b[1] * shares[1]
    return most, total, a[2] * shares[0][..., None] + b[2] * shares[1][..., None]

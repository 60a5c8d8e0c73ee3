"""Softmax attention among equal segments: one function for both towers and for the cache.

Scores and softmax are float32.

Which keys a query sees, with segments [1 1 2 2 0] and `causal_from=0` (row = query):

    1 0 0 0 0
    1 1 0 0 0
    0 0 1 0 0
    0 0 1 1 0
    0 0 0 0 1     padding (0) sees padding: finite, and nobody reads it

`choose` decides what computes it:

    xla      plain matmuls, in chunks if there are many queries; on every platform, and always over
             the cache and in windows
    splash   the Pallas kernel that ships with JAX, on TPU; interpreted elsewhere, for tests
    cudnn    cuDNN's fused kernel through `jax.nn.dot_product_attention`, on CUDA, in 16-bit types

Either kernel gets only queries and keys in multiples of 128. On Hopper, cuDNN's backward pass fills
the rest of a tile of 128 rows with zeros; with a mask and a row whose log-sum-exp is below -88.7
(one that sees nothing, but real rows get there too) the rest enters as exp(0 - LSE), which
overflows: dQ is NaN, while the output, dK and dV are right (NVIDIA/cudnn-frontend pull request 628,
pytorch issue 196678). No version of cuDNN is known to be free of it, so none is asked for.
`learner.selfcheck` compares the kernels with plain matmuls on the machine itself.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mmrecoder_jax.models.config import Kernel
from mmrecoder_jax.models.sharding import activation_spec, local_shape, mesh_platform

# Causal queries from a start that is known are cut into at most so many parts, none much shorter
# than LEAST_PART; each looks at no later slot than its last query may: four parts compute five
# eighths of the scores.
MOST_PARTS = 4
LEAST_PART = 48
# More queries than this are attended chunk by chunk: [chunk, S] scores instead of [L, S].
QUERY_CHUNK = 1024
# Chunks are halved until a device's scores fit into so many bytes, down to LEAST_CHUNK queries.
SCORE_BYTES = 2**29
LEAST_CHUNK = 8
MASKED = -1e30  # finite: a query that sees nothing gets the mean of all values, never a NaN
LANES = (
    128  # kernels get lengths in multiples of this: what splash asks, and cuDNN computes rightly
)
BLOCK = 512  # the Pallas kernel walks them in blocks of at most this

Start = int | Int[Array, ""] | None


def attend(
    q: Float[Array, "B L H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    q_segments: Int[Array, "B L"],
    kv_segments: Int[Array, "B S"],
    causal_from: Start = None,
    implementation: str = Kernel.AUTO,
    query_chunk: int | None = None,
) -> Float[Array, "B L H F"]:
    """The weighted mean of values that each query sees.

    H query heads share K key heads: query head h reads key head h // (H // K).

    Args:
      q_segments, kv_segments: a query sees the keys of its own segment.
      causal_from: slot of the first query; query i then sees only slots <= causal_from + i. With
        None a query sees all slots of its segment.
      implementation: `config.attention`, a value of `Kernel`; see `choose`.
      query_chunk: more queries than this are scanned in chunks, each recomputed in the backward
        pass. None chooses by the size of the scores.
    """
    platform, causal = mesh_platform(), causal_from is not None
    arrays = q, k, v, q_segments, kv_segments
    match choose(implementation, platform, q.shape, k.shape, q.dtype, causal_from):
        case Kernel.SPLASH:
            interpret = platform != "tpu"
            return _on_each_device(
                functools.partial(_splash, causal=causal, interpret=interpret), *arrays
            )
        case Kernel.CUDNN:
            return _on_each_device(functools.partial(_cudnn, causal=causal), *arrays)
    return _xla(*arrays, causal_from, query_chunk or choose_chunk(q.shape, k.shape))


def choose(
    implementation: str,
    platform: str,
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    dtype: DTypeLike,
    causal_from: Start,
) -> Kernel:
    """What computes an attention of these shapes; never `Kernel.AUTO`.

    "auto" is splash on TPU, cuDNN on GPU and XLA elsewhere; a kernel asked for by name is used
    wherever it applies. Neither kernel takes queries that begin in the middle of the slots
    (decoding, and prefill on a cache), nor lengths that 128 does not divide, such as windows:
    splash refuses those, and cuDNN's gradients of them can be NaN (see the top of this module).
    cuDNN also takes neither float32 nor heads larger than 128. XLA computes everything else.

    Callers see to it that no query is without a key: padding is a segment of its own.
    """
    kernel = Kernel(implementation)
    if kernel is Kernel.AUTO:
        by_platform = {"tpu": Kernel.SPLASH, "gpu": Kernel.CUDNN, "cuda": Kernel.CUDNN}
        kernel = by_platform.get(platform, Kernel.XLA)
    (_, length, _, features), slots = q_shape, k_shape[1]
    # a traced start may be anything at run time, so only a Python number can be told to be 0
    whole = causal_from is None or (
        isinstance(causal_from, int) and causal_from == 0 and length == slots
    )
    tiles = length % LANES == 0 and slots % LANES == 0
    applies = {
        Kernel.SPLASH: True,
        Kernel.CUDNN: features % 8 == 0 and features <= 128 and jnp.dtype(dtype).itemsize == 2,
    }
    return kernel if whole and tiles and applies.get(kernel, False) else Kernel.XLA


def _on_each_device(
    kernel: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array,
    kv_segments: Array,
) -> Array:
    """Runs a kernel, which knows nothing of meshes, on each device's rows and heads.

    Key heads decide how far heads are cut: there are fewer of them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v, q_segments, kv_segments)
    heads, rows = (
        activation_spec(k.shape, "batch", "length", "heads", None),
        activation_spec(q_segments.shape, "batch", "length"),
    )
    return jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False
    )(q, k, v, q_segments, kv_segments)


def _splash(
    q: Float[Array, "B L H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    q_segments: Int[Array, "B L"],
    kv_segments: Int[Array, "B S"],
    *,
    causal: bool,
    interpret: bool,
) -> Float[Array, "B L H F"]:
    """Pallas on TPU. Features are padded with zeros to whole lanes, which changes nothing."""
    (_, length, h, f), slots = q.shape, k.shape[1]

    def lanes(x: Array) -> Array:  # [B, L, H, F] -> [B, H, L, F padded]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -f % LANES))).swapaxes(1, 2)

    mask = (
        splash_mask.CausalMask((length, slots)) if causal else splash_mask.FullMask((length, slots))
    )
    rows, columns = (
        next(block for block in (BLOCK, BLOCK // 2, LANES) if size % block == 0)
        for size in (length, slots)
    )
    blocks = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([mask] * h), block_sizes=blocks, interpret=interpret
    )
    segments = splash.SegmentIds(q_segments.astype(jnp.int32), kv_segments.astype(jnp.int32))
    y = jax.vmap(kernel)(lanes(q * f**-0.5), lanes(k), lanes(v), segments)
    return y.swapaxes(1, 2)[..., :f]


def _cudnn(
    q: Float[Array, "B L H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    q_segments: Int[Array, "B L"],
    kv_segments: Int[Array, "B S"],
    *,
    causal: bool,
) -> Float[Array, "B L H F"]:
    """Segments reach cuDNN as a mask, which it takes as a bias `[B, 1, L, S]` in the type of q."""
    mask = q_segments[:, None, :, None] == kv_segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation="cudnn"
    )


def choose_chunk(q_shape: Sequence[int], k_shape: Sequence[int]) -> int:
    """How many queries have scores of at most SCORE_BYTES on a device of the mesh."""
    rows, _, heads, _ = local_shape(
        (q_shape[0], 1, k_shape[2], 1), "batch", "length", "heads", None
    )
    scores = rows * heads * (q_shape[2] // k_shape[2]) * k_shape[1] * 4
    chunk = QUERY_CHUNK
    while chunk > LEAST_CHUNK and chunk * scores > SCORE_BYTES:
        chunk //= 2
    return chunk


def _xla(
    q: Float[Array, "B L H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    q_segments: Int[Array, "B L"],
    kv_segments: Int[Array, "B S"],
    causal_from: Start,
    query_chunk: int,
) -> Float[Array, "B L H F"]:
    """Plain matmuls, part by part where queries are causal, and no part beyond its last query."""
    length = q.shape[1]
    if not isinstance(causal_from, int) or length < 2 * LEAST_PART:
        return _in_chunks(q, k, v, q_segments, kv_segments, causal_from, query_chunk)
    each = -(-length // min(MOST_PARTS, length // LEAST_PART))
    found = []
    for first in range(0, length, each):
        queries, start = slice(first, min(first + each, length)), causal_from + first
        keys = slice(0, causal_from + queries.stop)
        found.append(
            _in_chunks(
                *(q[:, queries], k[:, keys], v[:, keys]),
                *(q_segments[:, queries], kv_segments[:, keys]),
                *(start, query_chunk),
            )
        )
    return jnp.concatenate(found, axis=1)


def _in_chunks(
    q: Float[Array, "B L H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    q_segments: Int[Array, "B L"],
    kv_segments: Int[Array, "B S"],
    causal_from: Start,
    query_chunk: int,
) -> Float[Array, "B L H F"]:
    """All queries with all keys; more than `query_chunk` queries are scanned in chunks."""
    b, length, h, f = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(b, length, kv_heads, h // kv_heads, f)
    if length <= query_chunk:
        mask = _mask(q_segments, kv_segments, causal_from)
        return _softmax_average(q, k, v, mask).reshape(b, length, h, f)

    count = -(-length // query_chunk)
    pad = count * query_chunk - length

    def chunks(x: Array) -> Array:  # [B, L, ...] -> [count, B, query_chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, count, query_chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(chunk: tuple[Array, Array, Array]) -> Array:
        index, q_part, segments = chunk
        first = None if causal_from is None else causal_from + index * query_chunk
        return _softmax_average(q_part, k, v, _mask(segments, kv_segments, first))

    out = jax.lax.map(one, (jnp.arange(count), chunks(q), chunks(q_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(b, count * query_chunk, h, f)[:, :length]


def _mask(
    q_segments: Int[Array, "B L"], kv_segments: Int[Array, "B S"], causal_from: Start
) -> Bool[Array, "B L S"]:
    mask = q_segments[:, :, None] == kv_segments[:, None, :]
    if causal_from is not None:
        last = causal_from + jnp.arange(q_segments.shape[1])
        mask &= jnp.arange(kv_segments.shape[1])[None, None, :] <= last[None, :, None]
    return mask


def _softmax_average(
    q: Float[Array, "B L K sharing F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    mask: Bool[Array, "B L S"],
) -> Float[Array, "B L K sharing F"]:
    """The query heads that share a key head are rows of one matmul: few large ones are faster.

    The mask is added, which is faster than a choice and the same number: what is finite is lost
    beside MASKED. The sum of weights divides last, on [L, F] instead of [L, S].
    """
    b, length, kv_heads, sharing, f = q.shape
    q = (q * f**-0.5).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, sharing * length, f)
    scores = jnp.einsum("bkrf,bskf->bkrs", q, k, preferred_element_type=jnp.float32).reshape(
        b, kv_heads, sharing, length, -1
    )
    scores = scores + jnp.where(mask, jnp.float32(0), MASKED)[:, None, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(b, kv_heads, sharing * length, -1)
    y = jnp.einsum("bkrs,bskf->bkrf", weights, v, preferred_element_type=jnp.float32).reshape(
        b, kv_heads, sharing, length, f
    )
    return (y / total).astype(v.dtype).transpose(0, 3, 1, 2, 4)

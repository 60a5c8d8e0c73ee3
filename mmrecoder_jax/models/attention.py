"""Softmax attention among equal segments, for both towers and for the cache. One function; scores
and softmax are float32.

Which keys a query sees, with segments [1 1 2 2 0] and `causal_from=0` (row = query):

    1 0 0 0 0
    1 1 0 0 0
    0 0 1 0 0
    0 0 1 1 0
    0 0 0 0 1     padding (0) sees padding: finite, and read by nobody

`choose` alone decides what computes it:

    xla      plain matmuls, in chunks of queries when they are many; everywhere, and always over the cache and in windows
    splash   the Pallas kernel that ships with JAX, on TPU; interpreted where there is none, for tests
    cudnn    cuDNN's fused kernel through `jax.nn.dot_product_attention`, on CUDA, in 16-bit types
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, Int

from mmrecoder_jax.models.sharding import activation_spec, local_shape, mesh_platform

QUERY_CHUNK = (
    1024  # more queries than this are attended chunk by chunk: [chunk, S] scores instead of [L, S]
)
# chunks are halved until a device's scores fit here, down to LEAST_CHUNK queries
SCORE_BYTES = 2**29
LEAST_CHUNK = 8
MASKED = -1e30  # finite: a query that sees nothing gets the mean of all values, never a NaN
LANES = 128  # the Pallas kernel wants lengths in multiples of this
BLOCK = 512  # and walks them in blocks of at most this


def attend(
    q: Float[Array, "B L H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    q_segments: Int[Array, "B L"],
    kv_segments: Int[Array, "B S"],
    causal_from: int | Int[Array, ""] | None = None,
    implementation: str = "auto",
    query_chunk: int | None = None,
) -> Float[Array, "B L H F"]:
    """H query heads share K key heads: query head h reads key head h // (H // K).

    Args:
      q_segments, kv_segments: a query sees the keys of its own segment.
      causal_from: slot of the first query; query i then sees slots <= causal_from + i only. None:
        both ways.
      implementation: `config.attention`, see `choose`.
      query_chunk: more queries than this are scanned in chunks, each recomputed in the backward
        pass. None: by the size of the scores.
    """
    platform = mesh_platform()
    match choose(implementation, platform, q.shape, k.shape, q.dtype, causal_from):
        case "splash":
            kernel = functools.partial(
                _splash, causal=causal_from is not None, interpret=platform != "tpu"
            )
            return _on_each_device(kernel, q, k, v, q_segments, kv_segments)
        case "cudnn":
            return _on_each_device(
                functools.partial(_cudnn, causal=causal_from is not None),
                q,
                k,
                v,
                q_segments,
                kv_segments,
            )
    return _xla(
        q, k, v, q_segments, kv_segments, causal_from, query_chunk or _query_chunk(q.shape, k.shape)
    )


def choose(implementation: str, platform: str, q_shape, k_shape, dtype, causal_from) -> str:
    """What computes an attention of these shapes: "xla", "splash" or "cudnn".

    "auto" is splash on TPU, cuDNN on GPU and XLA elsewhere; a kernel that is asked for by name is
    used wherever it applies. Neither takes queries that begin in the middle of the slots (decoding
    and prefill on a cache), splash no length that 128 does not divide (windows), cuDNN no float32
    and no head larger than 128: those are XLA's.
    """
    kernel = (
        {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
        if implementation == "auto"
        else implementation
    )
    (_, length, _, features), slots = q_shape, k_shape[1]
    whole = causal_from is None or (
        isinstance(causal_from, int) and causal_from == 0 and length == slots
    )
    if kernel == "splash" and whole and length % LANES == 0 and slots % LANES == 0:
        return "splash"
    if (
        kernel == "cudnn"
        and whole
        and length > 1
        and features % 8 == 0
        and features <= 128
        and jnp.dtype(dtype).itemsize == 2
    ):
        return "cudnn"
    return "xla"


def _on_each_device(kernel, q, k, v, q_segments, kv_segments):
    """Runs a kernel, which knows nothing of meshes, on each device's rows and heads. Key heads
    decide how far heads are cut.
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


def _splash(q, k, v, q_segments, kv_segments, causal: bool, interpret: bool):
    """Pallas on TPU. Features are padded with zeros to whole lanes, which changes nothing."""
    (_, length, h, f), slots = q.shape, k.shape[1]

    def lanes(x):  # [B, L, H, F] -> [B, H, L, F']
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -f % LANES))).swapaxes(1, 2)

    mask = (
        splash_mask.CausalMask((length, slots)) if causal else splash_mask.FullMask((length, slots))
    )
    rows, columns = (
        next(block for block in (BLOCK, BLOCK // 2, LANES) if size % block == 0)
        for size in (length, slots)
    )
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    blocks = splash.BlockSizes(**{name: rows if "_q" in name else columns for name in names})
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([mask] * h), block_sizes=blocks, interpret=interpret
    )
    segments = splash.SegmentIds(q_segments.astype(jnp.int32), kv_segments.astype(jnp.int32))
    return jax.vmap(kernel)(lanes(q * f**-0.5), lanes(k), lanes(v), segments).swapaxes(1, 2)[
        ..., :f
    ]


def _cudnn(q, k, v, q_segments, kv_segments, causal: bool):
    """Segments reach cuDNN as a mask, which it takes as a bias [B, 1, L, S] in the type of q."""
    mask = q_segments[:, None, :, None] == kv_segments[:, None, None, :]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation="cudnn"
    )


def _query_chunk(q_shape, k_shape) -> int:
    """Queries whose scores take at most SCORE_BYTES on a device of the mesh."""
    rows, _, heads, _ = local_shape(
        (q_shape[0], 1, k_shape[2], 1), "batch", "length", "heads", None
    )
    scores = rows * heads * (q_shape[2] // k_shape[2]) * k_shape[1] * 4
    chunk = QUERY_CHUNK
    while chunk > LEAST_CHUNK and chunk * scores > SCORE_BYTES:
        chunk //= 2
    return chunk


def _xla(q, k, v, q_segments, kv_segments, causal_from, query_chunk: int):
    """Plain matmuls; more than `query_chunk` queries are scanned in chunks."""
    b, length, h, f = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(b, length, kv_heads, h // kv_heads, f)
    if length <= query_chunk:
        mask = _mask(q_segments, kv_segments, causal_from)
        return _softmax_average(q, k, v, mask).reshape(b, length, h, f)

    count = -(-length // query_chunk)
    pad = count * query_chunk - length

    def chunks(x):
        """[B, L, ...] -> [count, B, query_chunk, ...]"""
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, count, query_chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(chunk):
        index, q_part, segments = chunk
        first = None if causal_from is None else causal_from + index * query_chunk
        return _softmax_average(q_part, k, v, _mask(segments, kv_segments, first))

    out = jax.lax.map(one, (jnp.arange(count), chunks(q), chunks(q_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(b, count * query_chunk, h, f)[:, :length]


def _mask(
    q_segments: Int[Array, "B L"], kv_segments: Int[Array, "B S"], causal_from
) -> Bool[Array, "B L S"]:
    mask = q_segments[:, :, None] == kv_segments[:, None, :]
    if causal_from is not None:
        last = causal_from + jnp.arange(q_segments.shape[1])
        mask &= jnp.arange(kv_segments.shape[1])[None, None, :] <= last[None, :, None]
    return mask


def _softmax_average(
    q: Float[Array, "B L K G F"], k, v, mask: Bool[Array, "B L S"]
) -> Float[Array, "B L K G F"]:
    """The G queries that share a key head are rows of one matmul; the sum of weights divides last,
    on [L, F] instead of [L, S].
    """
    b, length, kv_heads, group, f = q.shape
    q = (q * f**-0.5).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, group * length, f)
    scores = jnp.einsum("bkrf,bskf->bkrs", q, k, preferred_element_type=jnp.float32).reshape(
        b, kv_heads, group, length, -1
    )
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(b, kv_heads, group * length, -1)
    y = jnp.einsum("bkrs,bskf->bkrf", weights, v, preferred_element_type=jnp.float32).reshape(
        b, kv_heads, group, length, f
    )
    return (y / total).astype(v.dtype).transpose(0, 3, 1, 2, 4)

"""Softmax attention among equal segments, for both towers and for the cache. One function; scores and softmax are float32.

Which keys a query sees, with segments [1 1 2 2 0] and `causal_from=0` (row = query):

    1 0 0 0 0
    1 1 0 0 0
    0 0 1 0 0
    0 0 1 1 0
    0 0 0 0 1     padding (0) sees padding: finite, and read by nobody
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_CHUNK = 1024  # more queries than this are attended chunk by chunk: [chunk, S] scores instead of [L, S]
MASKED = -1e30  # finite: a query that sees nothing gets the mean of all values, never a NaN


def attend(
    q: Float[Array, "B L H F"],
    k: Float[Array, "B S K F"],
    v: Float[Array, "B S K F"],
    q_segments: Int[Array, "B L"],
    kv_segments: Int[Array, "B S"],
    causal_from: int | Int[Array, ""] | None = None,
    query_chunk: int = QUERY_CHUNK,
) -> Float[Array, "B L H F"]:
    """H query heads share K key heads: query head h reads key head h // (H // K).

    Args:
      q_segments, kv_segments: a query sees the keys of its own segment.
      causal_from: slot of the first query; query i then sees slots <= causal_from + i only. None: both ways.
      query_chunk: more queries than this are scanned in chunks, each recomputed in the backward pass.
    """
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


def _mask(q_segments: Int[Array, "B L"], kv_segments: Int[Array, "B S"], causal_from) -> Bool[Array, "B L S"]:
    mask = q_segments[:, :, None] == kv_segments[:, None, :]
    if causal_from is not None:
        last = causal_from + jnp.arange(q_segments.shape[1])
        mask &= jnp.arange(kv_segments.shape[1])[None, None, :] <= last[None, :, None]
    return mask


def _softmax_average(q: Float[Array, "B L K G F"], k, v, mask: Bool[Array, "B L S"]) -> Float[Array, "B L K G F"]:
    """The G queries that share a key head are rows of one matmul; the sum of weights divides last, on [L, F] instead of [L, S]."""
    b, length, kv_heads, group, f = q.shape
    q = (q * f**-0.5).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, group * length, f)
    scores = jnp.einsum("bkrf,bskf->bkrs", q, k, preferred_element_type=jnp.float32).reshape(b, kv_heads, group, length, -1)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(b, kv_heads, group * length, -1)
    y = jnp.einsum("bkrs,bskf->bkrf", weights, v, preferred_element_type=jnp.float32).reshape(b, kv_heads, group, length, f)
    return (y / total).astype(v.dtype).transpose(0, 3, 1, 2, 4)

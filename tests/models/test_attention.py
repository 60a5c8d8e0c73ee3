"""Attention by hand: masks, grouped heads, chunks of queries, queries that see nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models.attention import attend


def arrays(length=7, slots=7, heads=4, kv_heads=2, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, length, heads, 6), np.float32)
    k, v = rng.standard_normal((2, 2, slots, kv_heads, 6), np.float32)
    return q, k, v


def by_hand(q, k, v, mask):
    """One query and one head at a time, in float64."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        scores = k[b, :, h // group].astype(np.float64) @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.where(mask[b, i], np.exp(scores), 0.0)
        out[b, i, h] = weights @ v[b, :, h // group] / weights.sum()
    return out


def test_causal_segments():
    q, k, v = arrays()
    segments = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    mask = (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((7, 7), bool))
    np.testing.assert_allclose(attend(q, k, v, segments, segments, 0), by_hand(q, k, v, mask), atol=1e-6)


def test_queries_that_begin_in_the_middle_of_the_slots():
    q, k, v = arrays(length=2, slots=7)
    valid = np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1]])
    mask = np.array([[[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]]) * valid[:, None] > 0
    np.testing.assert_allclose(attend(q, k, v, np.ones((2, 2)), valid, jnp.int32(3)), by_hand(q, k, v, mask), atol=1e-6)


def test_both_ways():
    q, k, v = arrays(kv_heads=4)
    valid = np.array([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    mask = np.repeat(valid[:, None] > 0, 7, axis=1)
    np.testing.assert_allclose(attend(q, k, v, np.ones((2, 7)), valid), by_hand(q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("causal_from", [None, 0, 3])
def test_chunks_of_queries_change_no_value_and_no_gradient(causal_from):
    q, k, v = arrays(length=7, slots=10)
    segments, slots = np.array([[1] * 4 + [2] * 3] * 2), np.array([[1] * 5 + [2] * 5] * 2)

    def value(qkv, chunk):
        return jnp.sum(jnp.sin(attend(*qkv, segments, slots, causal_from, query_chunk=chunk)))

    both = jax.jit(jax.value_and_grad(value), static_argnums=1)
    for a, b in zip(jax.tree.leaves(both((q, k, v), 7)), jax.tree.leaves(both((q, k, v), 3)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


def test_a_chunked_program_never_holds_all_scores():
    shape = jax.ShapeDtypeStruct((1, 512, 1, 8), np.float32)
    segments = jax.ShapeDtypeStruct((1, 512), np.int32)

    def largest(chunk):
        compiled = jax.jit(lambda q, s: jax.grad(lambda q: attend(q, q, q, s, s, 0, query_chunk=chunk).sum())(q)).lower(shape, segments)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert largest(64) < 0.5 * largest(512)


def test_a_query_that_sees_nothing_gets_the_mean_and_finite_gradients():
    q, k, v = arrays()
    nothing = np.zeros((2, 7), np.int32)
    out = attend(q, k, v, nothing + 1, nothing)
    np.testing.assert_allclose(out[:, :, 0], np.broadcast_to(v[:, :, 0].mean(1, keepdims=True), (2, 7, 6)), atol=1e-6)
    gradient = jax.grad(lambda q: attend(q, k, v, nothing + 1, nothing).sum())(q)
    assert np.isfinite(gradient).all()

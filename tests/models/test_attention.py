"""Attention by hand: masks, grouped heads, chunks of queries, queries that see nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models import vision as vision_module
from mmrecoder_jax.models.attention import SCORE_BYTES, attend, choose, choose_chunk
from tests.models.conversation import small_config


def arrays(length=7, slots=7, heads=4, kv_heads=2, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, length, heads, 6), np.float32)
    k, v = rng.standard_normal((2, 2, slots, kv_heads, 6), np.float32)
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


def by_hand(q, k, v, mask):
    """One query and one head at a time, in float64."""
    q, k, v, mask = (np.asarray(x) for x in (q, k, v, mask))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        scores = k[b, :, h // group].astype(np.float64) @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.where(mask[b, i], np.exp(scores), 0.0)
        out[b, i, h] = weights @ v[b, :, h // group] / weights.sum()
    return out


def test_causal_segments():
    q, k, v = arrays()
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    mask = (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((7, 7), bool))
    np.testing.assert_allclose(
        attend(q, k, v, segments, segments, 0), by_hand(q, k, v, mask), atol=1e-6
    )


def test_queries_that_begin_in_the_middle_of_the_slots():
    q, k, v = arrays(length=2, slots=7)
    valid = jnp.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1]])
    seen = jnp.ones((2, 2), jnp.int32)
    mask = np.array([[[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]]) * valid[:, None] > 0
    np.testing.assert_allclose(
        attend(q, k, v, seen, valid, jnp.int32(3)), by_hand(q, k, v, mask), atol=1e-6
    )


def test_both_ways():
    q, k, v = arrays(kv_heads=4)
    valid = jnp.array([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    mask = np.repeat(valid[:, None] > 0, 7, axis=1)
    np.testing.assert_allclose(
        attend(q, k, v, jnp.ones_like(valid), valid), by_hand(q, k, v, mask), atol=1e-6
    )


@pytest.mark.parametrize("causal_from", [None, 0, 3])
def test_chunks_of_queries_change_no_value_and_no_gradient(causal_from):
    q, k, v = arrays(length=7, slots=10)
    segments, slots = jnp.array([[1] * 4 + [2] * 3] * 2), jnp.array([[1] * 5 + [2] * 5] * 2)

    def value(qkv, chunk):
        return jnp.sum(jnp.sin(attend(*qkv, segments, slots, causal_from, query_chunk=chunk)))

    both = jax.jit(jax.value_and_grad(value), static_argnums=1)
    for a, b in zip(
        jax.tree.leaves(both((q, k, v), 7)), jax.tree.leaves(both((q, k, v), 3)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("length, causal_from", [(112, 0), (264, 0), (200, 30)])
def test_parts_of_causal_queries_change_no_value_and_no_gradient(length, causal_from):
    slots = length + causal_from
    q, k, v = arrays(length=length, slots=slots)
    held = jnp.where(jnp.arange(slots) < slots - 40, 1, 0)[None].repeat(2, axis=0)
    segments = held[:, causal_from:]
    weights = segments[..., None, None]  # nobody reads what padding sees

    def value(qkv, start):
        return jnp.sum(weights * jnp.sin(attend(*qkv, segments, held, start)))

    parts = jax.jit(lambda qkv: jax.value_and_grad(value)(qkv, causal_from))
    whole = jax.jit(jax.value_and_grad(value))  # a start that is not known: no parts
    found, expected = parts((q, k, v)), whole((q, k, v), jnp.int32(causal_from))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


def test_parts_of_causal_queries_compute_no_scores_that_none_may_see():
    q, k, v = arrays(length=264, slots=264)
    segments = jnp.ones((2, 264), jnp.int32)

    def flops(start):
        compiled = jax.jit(lambda q: attend(q, k, v, segments, segments, start)).lower(q).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(0) < 0.68 * flops(None)


def test_a_chunked_program_never_holds_all_scores():
    shape = jax.ShapeDtypeStruct((1, 512, 1, 8), np.float32)
    segments = jax.ShapeDtypeStruct((1, 512), np.int32)

    def largest(chunk):
        compiled = jax.jit(
            lambda q, s: jax.grad(lambda q: attend(q, q, q, s, s, 0, query_chunk=chunk).sum())(q)
        ).lower(shape, segments)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert largest(64) < 0.5 * largest(512)


def test_a_query_that_sees_nothing_gets_the_mean_and_finite_gradients():
    q, k, v = arrays()
    nothing = jnp.zeros((2, 7), jnp.int32)
    out = attend(q, k, v, nothing + 1, nothing)
    np.testing.assert_allclose(
        out[:, :, 0], np.broadcast_to(v[:, :, 0].mean(1, keepdims=True), (2, 7, 6)), atol=1e-6
    )
    gradient = jax.grad(lambda q: attend(q, k, v, nothing + 1, nothing).sum())(q)
    assert np.isfinite(gradient).all()


def both(implementation, q, k, v, segments, causal_from, read):
    """(value, output, gradients) of what `read` queries attend; the rest is padding and means
    nothing.
    """

    def value(qkv):
        queries = jnp.ones_like(segments) if causal_from is None else segments
        out = attend(*qkv, queries, segments, causal_from, implementation)
        return jnp.sum(jnp.sin(out) * read[:, :, None, None]), out * read[:, :, None, None]

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(value, has_aux=True))((q, k, v))


@pytest.mark.parametrize(
    "causal_from, kv_heads, features",
    [(0, 2, 128), (None, 4, 80)],
    ids=["packed causal GQA", "both ways, 80 features"],
)
def test_the_pallas_kernel_interpreted_equals_plain_matmuls(causal_from, kv_heads, features):
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 256, 4, features), np.float32)
    k, v = rng.standard_normal((2, 2, 256, kv_heads, features), np.float32)
    segments = np.zeros((2, 256), np.int32)
    # two packed rows and padding; one row and padding
    segments[0, :100], segments[0, 100:180], segments[1, :200] = 1, 2, 1
    q, k, v, segments = (jnp.asarray(x) for x in (q, k, v, segments))
    plain, kernel = (
        both(name, q, k, v, segments, causal_from, segments > 0) for name in ("xla", "splash")
    )
    # gradients
    for a, b in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(kernel[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(plain[0][1], kernel[0][1], atol=2e-6)


def choice(implementation, platform, length, slots=None, start=0, dtype="bfloat16", features=128):
    """What computes `length` queries over `slots` keys (as many, where none are given)."""
    q, k = (8, length, 28, features), (8, slots or length, 4, features)
    return choose(implementation, platform, q, k, dtype, start)


def test_what_computes_it():
    assert choice("auto", "cpu", 1024) == "xla"
    assert choice("auto", "tpu", 1024) == "splash"
    assert choice("auto", "gpu", 1024) == choice("auto", "cuda", 1024) == "cudnn"
    assert choice("xla", "tpu", 1024) == "xla"
    assert choice("splash", "cpu", 1024, dtype="float32") == "splash"
    assert choice("auto", "gpu", 1024, dtype="float32") == "xla"
    assert choice("auto", "gpu", 1024, features=192) == "xla"
    assert choice("auto", "gpu", 1024, features=36) == "xla"
    assert choice("auto", "gpu", 6144, start=None, features=80) == "cudnn"  # a full layer
    assert choice("auto", "tpu", 6144, start=None, features=80) == "splash"


@pytest.mark.parametrize("kernel, platform", [("cudnn", "gpu"), ("splash", "tpu")])
@pytest.mark.parametrize("implementation", ["auto", "by name"])
@pytest.mark.parametrize("start", [0, None], ids=["causal", "both ways"])
def test_no_kernel_gets_lengths_that_128_does_not_divide(kernel, platform, implementation, start):
    """Windows of 64 keys above all: cuDNN's gradients of them are NaN."""
    name = kernel if implementation == "by name" else "auto"
    for length in (1, 16, 64, 127, 129, 192, 1000):
        assert choice(name, platform, length, start=start) == "xla"
    for length in (128, 256, 384, 12288):
        assert choice(name, platform, length, start=start) == kernel
    if start is None:  # queries and keys of different lengths
        assert choice(name, platform, 128, 192, start=None) == "xla"
        assert choice(name, platform, 64, 256, start=None) == "xla"
        assert choice(name, platform, 128, 256, start=None) == kernel


@pytest.mark.parametrize("kernel, platform", [("cudnn", "gpu"), ("splash", "tpu")])
def test_no_kernel_begins_in_the_middle_of_the_slots(kernel, platform):
    """A prompt over a cache, and a token of decoding."""
    assert choice(kernel, platform, 1024, 2048, start=jnp.int32(0)) == "xla"
    assert choice(kernel, platform, 1, 2048, start=jnp.int32(7)) == "xla"
    assert choice(kernel, platform, 1024, 2048, start=0) == "xla"
    assert choice(kernel, platform, 1024, 1024, start=128) == "xla"


def test_in_the_tower_every_query_sees_a_key(monkeypatch):
    """Windows that are all padding, and padding beside patches, attend to padding."""
    config = small_config()
    vision, seen = config.vision, []

    def recorded(q, k, v, q_segments, kv_segments, *how):
        seen.append((q_segments.shape[1], q_segments is kv_segments))
        return attend(q, k, v, q_segments, kv_segments, *how)

    monkeypatch.setattr(vision_module, "attend", recorded)
    patches = jnp.zeros((1, 3, vision.window_patches, vision.patch_dim))
    position = jnp.zeros((1, 3, vision.window_patches, 2), jnp.int32)
    valid = jnp.zeros((1, 3, vision.window_patches), bool).at[0, 0, :4].set(True)
    jax.eval_shape(
        lambda: vision_module.VisionTransformer(config).init(
            jax.random.key(0), patches, position, valid
        )
    )
    lengths = {vision.window_patches, 3 * vision.window_patches}
    assert {length for length, _ in seen} == lengths and all(same for _, same in seen)


def test_cudnn_lowers_for_cuda_forward_and_backward(monkeypatch):
    """No GPU here: the lowered program calls cuDNN's kernels; what they compute is not run."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000
    )
    shape = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 256), np.int32)

    def value(q, k, v, s):
        return attend(q, k, v, s, s, 0, "cudnn").astype(jnp.float32).sum()

    program = (
        jax.jit(jax.grad(value, argnums=(0, 1, 2)))
        .trace(shape, keys, keys, segments)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert (
        "__cudnn$fmhaScaleBiasSoftmax" in program
        and "__cudnn$fmhaScaleBiasSoftmaxBackward" in program
    )


def test_many_scores_are_cut_into_smaller_chunks():
    assert choose_chunk((1, 4096, 28, 128), (1, 4096, 4, 128)) == 1024
    assert choose_chunk((64, 2048, 28, 128), (64, 12288, 4, 128)) == 8
    small = choose_chunk((8, 2048, 28, 128), (8, 12288, 4, 128))
    assert small * 8 * 28 * 12288 * 4 <= SCORE_BYTES < 2 * small * 8 * 28 * 12288 * 4

"""The model against itself: cached = uncached, packed = separate, padded = alone, remat = none;
images are seen, and only by their rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params, no_past
from tests.models.conversation import conversation, model_inputs, small_config, stack_images

CONFIG = small_config()
SIZES = [(56, 84), (112, 56)]


@pytest.fixture(scope="module")
def params():
    """Random, the zero biases and unit norms of a fresh model included."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32),
        init_params(CONFIG, jax.random.key(0)),
    )


@functools.partial(jax.jit, static_argnames=("method", "config"))
def call(params, *args, method=None, config=CONFIG):
    return Qwen25VL(config).apply({"params": params}, *args, method=method)


def encode(params, segments, config=CONFIG):
    arrays, rows = stack_images([image for segment in segments for image in segment.images])
    return call(params, *arrays, method="encode_images", config=config), rows


def run(params, segments, length, left=False, config=CONFIG):
    features, rows = encode(params, segments, config)
    inputs = model_inputs(segments, length, left, rows)
    return call(params, *inputs.values(), features, config=config), inputs


def test_right_and_left_padding_leave_the_tokens_as_they_are(params):
    segments = [conversation(CONFIG, SIZES), conversation(CONFIG, SIZES[:1], seed=1)]
    right, inputs = run(params, segments, 120)
    left, shifted = run(params, segments, 120, left=True)
    for b, segment in enumerate(segments):
        alone, _ = run(params, [segment], len(segment.ids))
        np.testing.assert_allclose(right[b][inputs["segment_ids"][b] > 0], alone[0], atol=2e-5)
        np.testing.assert_allclose(left[b][shifted["segment_ids"][b] > 0], alone[0], atol=2e-5)
    assert np.isfinite(right).all() and np.isfinite(left).all()


def test_packed_rows_equal_separate_rows(params):
    segments = [conversation(CONFIG, SIZES), conversation(CONFIG, SIZES[:1], seed=1)]
    separate, inputs = run(params, segments, 120)
    real = [inputs["segment_ids"][b] > 0 for b in range(2)]
    packed = {
        name: np.concatenate([x[b][..., real[b]] for b in range(2)], -1)[None]
        for name, x in inputs.items()
    }
    packed["segment_ids"] = np.repeat([1, 2], [real[0].sum(), real[1].sum()])[None]
    features, _ = encode(params, segments)
    together = call(params, *packed.values(), features)
    np.testing.assert_allclose(
        together[0], np.concatenate([separate[b][real[b]] for b in range(2)]), atol=2e-5
    )


def stacked(kept):
    """Keys and values with room: layers, rows, heads, slots, features."""
    return {name: np.asarray(x) for name, x in kept.items()}


def test_prefill_and_the_second_turn_behind_it_equal_the_full_forward(params):
    """Rows hold different lengths, and what is in slots that are not valid is not seen."""
    segments = [conversation(CONFIG, SIZES), conversation(CONFIG, SIZES, seed=2)]
    length = len(segments[0].ids)
    full, inputs = run(params, segments, length)
    features, _ = encode(params, segments)

    def part(start, size):
        names = ("tokens", "positions", "vision_index")
        return [inputs[name][..., start : start + size] for name in names]

    first, second = 20, length - 20
    out, kept = call(
        params, *part(0, first), features, np.full(2, first), *no_past(CONFIG, 2), method="extend"
    )
    np.testing.assert_allclose(out, full[:, :first], atol=2e-5)
    # room behind what is held, full of what must not be seen
    past = {
        name: np.pad(x, [(0, 0)] * 3 + [(0, 5), (0, 0)], constant_values=9.0)
        for name, x in stacked(kept).items()
    }
    valid = np.arange(first + 5)[None].repeat(2, 0) < first
    out, kept = call(
        params, *part(first, second), features, np.full(2, second), past, valid, method="extend"
    )
    np.testing.assert_allclose(out, full[:, first:], atol=2e-5)
    assert kept["k"].shape == (CONFIG.num_layers, 2, CONFIG.num_kv_heads, second, CONFIG.head_dim)


def test_every_image_is_seen_and_none_sees_another(params):
    segments = [conversation(CONFIG, SIZES)]
    hidden, inputs = run(params, segments, len(segments[0].ids))
    features, rows = encode(params, segments)
    for i, image in enumerate(segments[0].images):
        arrays, (own,) = stack_images([image])
        np.testing.assert_allclose(
            call(params, *arrays, method="encode_images")[own], features[rows[i]], atol=1e-5
        )
        changed = call(params, *inputs.values(), features.at[rows[i]].set(0.0))
        moved = np.abs(changed - hidden).max(-1)[0] > 1e-3
        first = np.flatnonzero(np.isin(inputs["vision_index"][0], rows[i]))[0]
        assert not moved[:first].any() and moved[first:].all()


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_and_unrolling_change_no_gradient(params, remat):
    segment = conversation(CONFIG, SIZES[:1])
    arrays, rows = stack_images(list(segment.images))
    inputs = model_inputs([segment], len(segment.ids), rows=rows)
    arrays = [jnp.asarray(x) for x in arrays]
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}

    def loss(params, config):
        apply = functools.partial(Qwen25VL(config).apply, {"params": params})
        hidden = apply(*inputs.values(), apply(*arrays, method="encode_images"))
        return jnp.mean(jax.nn.log_softmax(apply(hidden, method="logits"))[..., 5])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, other = (
        gradient(params, CONFIG),
        gradient(params, small_config(remat=remat, scan_unroll=3)),
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * float(np.abs(a).max()))


def test_bfloat16_compute_keeps_float32_parameters_and_logits(params):
    config = small_config(dtype="bfloat16")
    segment = conversation(CONFIG, SIZES[:1])
    hidden, _ = run(params, [segment], len(segment.ids), config=config)
    exact, _ = run(params, [segment], len(segment.ids))
    logits = call(params, hidden, method="logits", config=config)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert 1e-4 < np.abs(logits - call(params, exact, method="logits")).max() < 0.2
    assert {leaf.dtype for leaf in jax.tree.leaves(init_params(config, jax.random.key(0)))} == {
        jnp.dtype("float32")
    }


def test_an_image_of_padding_alone_is_finite_and_so_is_its_gradient(params):
    arrays, _ = stack_images(list(conversation(CONFIG, SIZES).images))
    patches, position, valid = map(jnp.asarray, arrays)
    empty = jnp.zeros_like(valid)

    def total(params):
        return (
            Qwen25VL(CONFIG)
            .apply({"params": params}, patches, position, empty, method="encode_images")
            .sum()
        )

    assert all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(params))
    )

"""The model gives what the reference gave (golden/parity.npz), and each known mistake of a port
would be seen.
"""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from mmrecoder_jax.models import vision
from mmrecoder_jax.models.processor import window_patches
from mmrecoder_jax.models.weights import from_tensors
from tests.models.conversation import model_inputs, pictures, small_config, stack_images
from tests.models.parity import (
    ATOL,
    CASES,
    CONFIG,
    GOLDEN,
    LENGTH,
    compact,
    inputs_of,
    our_side,
    random_tensors,
    thin,
)

SEVERAL = "images of several sizes in several turns"
side = functools.partial(jax.jit, static_argnums=3)(our_side)


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    return from_tensors(random_tensors(), CONFIG)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def error(golden, name: str, features, logits) -> float:
    ours = thin(compact(CASES[name], features, logits))
    return max(float(np.abs(ours[what] - golden[f"{name}/{what}"]).max()) for what in ours)


@pytest.mark.parametrize("name", CASES)
def test_features_and_logits_are_those_of_the_reference(params, golden, name):
    assert np.abs(golden[f"{name}/logits"]).max() > 1.5
    assert error(golden, name, *side(params, *inputs_of(CASES[name]), CONFIG)) < ATOL


def axes_swapped(patches, position, valid):
    return patches, position[..., ::-1], valid


def columns_only(patches, position, valid):
    return patches, np.stack([position[..., 1], position[..., 1]], -1), valid


def raster_order(patches, position, valid):
    """Positions counted row by row over the whole image, though the patches come window by
    window.
    """
    out = np.zeros_like(position)
    for i, real in enumerate(valid):
        out[i][real] = np.stack(np.divmod(np.arange(real.sum()), position[i, ..., 1].max() + 1), -1)
    return patches, out, valid


def neighbours_seen(patches, position, valid):
    """The padding of windows is attended."""
    return patches, position, np.ones_like(valid)


@pytest.mark.parametrize("mistake", [axes_swapped, columns_only, raster_order, neighbours_seen])
def test_a_mistake_in_the_patches_is_seen(params, golden, mistake):
    arrays, inputs = inputs_of(CASES[SEVERAL])
    assert error(golden, SEVERAL, *side(params, mistake(*arrays), inputs, CONFIG)) > 10 * ATOL


def flat(positions):
    return np.broadcast_to(np.arange(positions.shape[-1], dtype=np.int32), positions.shape)


def rows_for_columns(positions):
    return positions[:, [0, 2, 1]]


def late_after_the_image(positions):
    return positions + 5 * (np.arange(positions.shape[-1]) > 40).astype(np.int32)


@pytest.mark.parametrize("mistake", [flat, rows_for_columns, late_after_the_image])
def test_a_mistake_in_the_text_positions_is_seen(params, golden, mistake):
    arrays, inputs = inputs_of(CASES[SEVERAL])
    assert (
        error(
            golden,
            SEVERAL,
            *side(params, arrays, inputs | {"positions": mistake(inputs["positions"])}, CONFIG),
        )
        > 10 * ATOL
    )


def test_visual_tokens_in_window_order_are_seen(params, golden):
    arrays, inputs = inputs_of(CASES[SEVERAL])
    index = inputs["vision_index"].copy()
    index[index >= 0] = np.sort(index[index >= 0])
    assert (
        error(golden, SEVERAL, *side(params, arrays, inputs | {"vision_index": index}, CONFIG))
        > 10 * ATOL
    )


@pytest.mark.parametrize(
    "leaf",
    [
        "q_proj/bias",
        "k_proj/bias",
        "v_proj/bias",
        "qkv/bias",
        "norm1/weight",
        "ln_q/weight",
        "gate_proj/bias",
    ],
)
def test_a_dropped_bias_or_norm_is_seen(params, golden, leaf):
    def drop(path, x):
        name = "/".join(key.key for key in path)
        return x * 0 + (not name.endswith("bias")) if name.endswith(leaf) else x

    dropped = jax.tree_util.tree_map_with_path(drop, params)
    assert error(golden, SEVERAL, *side(dropped, *inputs_of(CASES[SEVERAL]), CONFIG)) > 10 * ATOL


@pytest.mark.parametrize(
    "changes", [{"rms_norm_eps": 1e-5}, {"rope_theta": 1e4}, {"mrope_section": (2, 2, 2)}]
)
def test_a_wrong_size_in_the_config_is_seen(params, golden, changes):
    assert (
        error(golden, SEVERAL, *side(params, *inputs_of(CASES[SEVERAL]), small_config(**changes)))
        > 5 * ATOL
    )


@pytest.mark.parametrize(
    "where, name, value",
    [
        (vision, "EPS", 1e-5),
        (vision, "THETA", 1e6),
        (nn, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=True)),
    ],
)
def test_a_wrong_constant_in_the_tower_is_seen(params, golden, monkeypatch, where, name, value):
    monkeypatch.setattr(where, name, value)
    assert (
        error(
            golden,
            SEVERAL,
            *jax.jit(lambda *args: our_side(*args))(params, *inputs_of(CASES[SEVERAL])),
        )
        > 5 * ATOL
    )


@pytest.mark.parametrize("window_size", [28, 112])
def test_windows_of_another_size_are_seen(params, golden, window_size):
    """112 holds each of these images whole: full attention everywhere."""
    case = CASES["one image"]
    towers = small_config().vision
    other = type(towers)(**{**vars(towers), "window_size": window_size})
    images = [window_patches(pixels, other) for pixels in pictures(list(case.conversations[0]), 0)]
    arrays, rows = stack_images(images)
    features, _ = jax.jit(our_side)(params, arrays, model_inputs(case.segments, LENGTH, rows=rows))
    ours = np.asarray(features)[np.concatenate(rows)]
    assert (
        np.abs(thin({"features": ours})["features"] - golden["one image/features"]).max()
        > 10 * ATOL
    )


def test_images_that_see_each_other_are_seen(params, golden):
    (patches, position, valid), inputs = inputs_of(CASES[SEVERAL])
    joined = tuple(x.reshape(1, -1, *x.shape[2:]) for x in (patches, position, valid))
    assert error(golden, SEVERAL, *jax.jit(our_side)(params, joined, inputs)) > 10 * ATOL

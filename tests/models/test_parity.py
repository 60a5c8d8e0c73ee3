"""Against the reference itself, where torch is installed: every case and measure of docs/parity.md,
positions, tied embeddings.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models.processor import rope_positions
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.weights import from_tensors
from tests.models.conversation import small_config
from tests.models.parity import (
    ATOL,
    CASES,
    CONFIG,
    GRADIENT_RTOL,
    IMAGE_TOKEN,
    greedy,
    inputs_of,
    random_tensors,
)

torch = pytest.importorskip("torch")
reference = pytest.importorskip("tests.models.reference")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    return from_tensors(random_tensors(), CONFIG)


@pytest.fixture(scope="module")
def model():
    return reference.reference_model()


@pytest.mark.parametrize("name", CASES)
def test_features_logits_gradients_continuations_cache_and_packing(params, model, name):
    errors = reference.compare(model, params, CASES[name])
    assert errors.pop("greedy") == 1.0
    assert errors.pop("gradients") < GRADIENT_RTOL
    assert set(errors) == {"logits", "cached", "packed"} | (
        {"features"} if name != "text only" else set()
    )
    assert all(error < ATOL for error in errors.values()), errors


@pytest.mark.parametrize("name", CASES)
def test_positions(model, name):
    case = CASES[name]
    inputs = reference.reference_inputs(case)
    mask = inputs["attention_mask"]
    theirs, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs.get("image_grid_thw"),
        attention_mask=mask,
    )
    for b, segment in enumerate(case.segments):
        ours = rope_positions(segment.ids, segment.grids, IMAGE_TOKEN)
        np.testing.assert_array_equal(ours, theirs[:, b][:, mask[b].bool()].numpy())


def test_every_parameter_but_none_has_a_gradient(model):
    """What `gradient_error` compares is not zero on both sides, the tiny gradients of key biases
    included.
    """
    theirs = reference.reference_gradients(model, CASES["right-padded batch"])
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(theirs))
    assert max(np.abs(x).max() for x in jax.tree.leaves(theirs)) > 0.1


def test_greedy_continuations_with_tied_embeddings():
    config = small_config(tie_word_embeddings=True)
    tensors = {name: x for name, x in random_tensors(config).items() if name != "lm_head.weight"}
    params = from_tensors(tensors, config)
    case = dataclasses.replace(CASES["left-padded batch"], left=True)
    arrays, inputs = inputs_of(case)
    arrays = jax.tree.map(jnp.asarray, arrays)
    features = Qwen25VL(config).apply({"params": params}, *arrays, method="encode_images")
    theirs = reference.reference_greedy(reference.reference_model(config), case)
    np.testing.assert_array_equal(greedy(params, features, inputs, config), theirs)

"""Adapters: nothing at first, the same merged as apart, only where they are asked for; trees taken
apart and put together.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models.config import LORA_TARGETS, LoraConfig
from mmrecoder_jax.models.layers import Dense
from mmrecoder_jax.models.lora import is_adapter, merge
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL, init_params
from mmrecoder_jax.models.trees import everything, join, split
from mmrecoder_jax.models.weights import from_tensors
from tests.models.conversation import conversation, model_inputs, small_config, stack_images
from tests.models.parity import random_tensors

LORA = LoraConfig(3, 6.0)
CONFIG = small_config(lora=LORA)
PLAIN = small_config()


def abstract(config):
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def with_adapters(deviation: float):
    """The weights of the parity tests, the first half of each adapter random, the second with
    `deviation`.
    """
    rng = np.random.default_rng(0)

    def draw(path, x):
        return jnp.asarray(
            (deviation if path[-1].key == "lora_b" else 0.2)
            * rng.standard_normal(x.shape, np.float32)
        )

    return join(
        from_tensors(random_tensors(), PLAIN),
        jax.tree_util.tree_map_with_path(draw, split(abstract(CONFIG), is_adapter)[0]),
    )


@pytest.fixture(scope="module")
def fresh():
    return with_adapters(0.0)


@pytest.fixture(scope="module")
def adapted():
    return with_adapters(0.2)


def logits(params, config):
    segment = conversation(PLAIN, [(56, 84)])
    arrays, rows = stack_images(list(segment.images))
    inputs = model_inputs([segment], len(segment.ids), rows=rows)
    arrays = [jnp.asarray(x) for x in arrays]
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    net = Qwen25VL(config)

    @jax.jit
    def run(params):
        features = net.apply({"params": params}, *arrays, method="encode_images")
        return net.apply(
            {"params": params},
            net.apply({"params": params}, *inputs.values(), features),
            method="logits",
        )

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params))


def test_fresh_adapters_change_nothing_and_merged_ones_what_they_changed_apart(fresh, adapted):
    plain = logits(split(fresh, is_adapter)[1], PLAIN)
    np.testing.assert_allclose(logits(fresh, CONFIG), plain, atol=1e-6)
    apart, merged = logits(adapted, CONFIG), merge(adapted, LORA)
    assert np.abs(apart - plain).max() > 0.1
    assert jax.tree.structure(merged) == jax.tree.structure(abstract(PLAIN))
    np.testing.assert_allclose(logits(merged, PLAIN), apart, atol=2e-5)


def test_adapters_start_with_a_second_half_of_zeros():
    layer = Dense(5, False, "float32", "float32", LORA, name="q_proj").init(
        jax.random.key(0), jnp.ones((1, 4))
    )["params"]
    assert not layer["lora_b"].any() and np.abs(layer["lora_a"]).min() > 0


def test_the_scale_is_alpha_over_rank(adapted):
    layer, whole = (
        adapted["model"]["layers"]["mlp"]["up_proj"],
        merge(adapted, LORA)["model"]["layers"]["mlp"]["up_proj"]["kernel"],
    )
    for i in range(CONFIG.num_layers):
        by_hand = layer["kernel"][i] + 2.0 * np.asarray(layer["lora_a"][i]) @ np.asarray(
            layer["lora_b"][i]
        )
        np.testing.assert_allclose(whole[i], by_hand, atol=1e-6)


def test_weights_in_bfloat16_keep_their_type_and_adapters_stay_float32():
    config = small_config(lora=LORA, param_dtype="bfloat16")
    adapters = split(abstract(config), is_adapter)[0]
    assert {x.dtype.name for x in jax.tree.leaves(adapters)} == {"float32"}
    merged = jax.eval_shape(lambda params: merge(params, LORA), abstract(config))
    assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"bfloat16"}


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "down_proj"), LORA_TARGETS])
def test_only_targets_of_the_decoder_have_adapters(targets):
    config = dataclasses.replace(PLAIN, lora=LoraConfig(2, 2.0, targets))
    adapters = split(abstract(config), is_adapter)[0]
    paths = [
        "/".join(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(adapters)
    ]
    assert {path.split("/")[-2] for path in paths} == set(targets) and len(paths) == 2 * len(
        targets
    )
    assert all(path.startswith("model/layers/") for path in paths)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1,), "lora.rank=-1"),
        ((2, 4.0, ("qkv",)), r"lora.targets=\('qkv',\).*q_proj"),
        ((2, 4.0, ()), "targets"),
    ],
)
def test_what_is_no_adapter_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(*arguments)


def test_a_tree_is_taken_apart_and_put_together():
    tree = {"a": {"x": 1, "y": 2}, "b": {"c": {"x": 3}}, "z": 4}
    chosen, others = split(tree, lambda name: name.endswith("/x"))
    assert chosen == {"a": {"x": 1}, "b": {"c": {"x": 3}}} and others == {"a": {"y": 2}, "z": 4}
    assert join(chosen, others) == join(others, chosen) == tree
    assert split(tree, everything) == (tree, {}) and join(tree, {}) == tree
    assert join(tree, {"a": {"x": 9}})["a"] == {"x": 9, "y": 2} and tree["a"]["x"] == 1

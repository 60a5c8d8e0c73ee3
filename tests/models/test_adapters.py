"""Adapters in PEFT's form: what is written is read back, and what PEFT would compute otherwise is
refused by name. That PEFT reads them is tested in tests/test_export.py.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mmrecoder_jax.models import adapters as peft
from mmrecoder_jax.models.config import LoraConfig
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.lora import is_adapter
from mmrecoder_jax.models.qwen2_5_vl import init_params
from mmrecoder_jax.models.safetensors import open_file, write_file
from mmrecoder_jax.models.trees import split
from tests.models.conversation import small_config

LORA = LoraConfig(3, 4.5, ("q_proj", "down_proj"))
CONFIG = small_config()


def random_adapters(lora: LoraConfig):

    sizes = dataclasses.replace(CONFIG, lora=lora)
    abstract = jax.eval_shape(lambda: init_params(sizes, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), split(abstract, is_adapter)[0]
    )


@pytest.fixture
def written(tmp_path):
    tree = random_adapters(LORA)
    peft.write_adapters(tmp_path, tree, LORA, "Qwen/base")
    return tmp_path, tree


def test_what_is_written_is_read_back(written):
    directory, tree = written
    assert peft.holds_adapters(directory) and peft.base_of(directory) == "Qwen/base"
    found = peft.read_adapters(directory)
    assert (found.base, found.lora) == ("Qwen/base", LORA)
    again = peft.to_tree(found, CONFIG)
    peft.check_shapes(again, tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_names_shapes_and_fields_are_those_of_peft(written):
    directory, tree = written
    tensors = open_file(directory / peft.WEIGHTS)
    name = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"
    ours = tree["model"]["layers"]["self_attn"]["q_proj"]["lora_a"]
    np.testing.assert_array_equal(tensors[name], ours[1].T)
    assert tensors[name].shape == (3, CONFIG.hidden_size)
    assert len(tensors) == 2 * 2 * CONFIG.num_layers
    fields = json.loads((directory / peft.CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"], fields["peft_type"]) == (3, 4.5, "LORA")


def test_earlier_names_of_the_decoder_are_read(written):
    directory, tree = written
    tensors = open_file(directory / peft.WEIGHTS)
    renamed = {n.replace("language_model.", ""): np.array(x) for n, x in tensors.items()}
    write_file(directory / peft.WEIGHTS, renamed)
    again = peft.to_tree(peft.read_adapters(directory), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_bfloat16_halves_the_file(written, tmp_path):
    directory, tree = written
    peft.write_adapters(tmp_path / "half", tree, LORA, "x", "bfloat16")
    again = peft.to_tree(peft.read_adapters(tmp_path / "half"), CONFIG)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), again, tree)
    whole = (directory / peft.WEIGHTS).stat().st_size
    assert (tmp_path / "half" / peft.WEIGHTS).stat().st_size < 0.6 * whole


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_rslora", True),
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("r", 0),
        ("lora_alpha", None),
        ("base_model_name_or_path", None),
    ],
)
def test_what_peft_computes_otherwise_is_refused_by_name(written, field, value):
    directory, _ = written
    fields = json.loads((directory / peft.CONFIG).read_text()) | {field: value}
    (directory / peft.CONFIG).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{field} is .*"):
        peft.read_adapters(directory)


LAST = "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_B.weight"
FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop(LAST), "down_proj has adapters in some layers alone"),
        (lambda t: t.update({FIRST: t[FIRST][:2]}), r"shape \[2, \d+\], which is not of rank 3"),
        (lambda t: t.update({FIRST: t[FIRST] * np.nan}), "NaN or infinite"),
        (
            lambda t: t.update(
                {"base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight": t[FIRST]}
            ),
            "visual.* adapters of the decoder",
        ),
        (lambda t: t.clear(), "no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(written, change, said):
    directory, _ = written
    tensors = {n: np.array(x) for n, x in open_file(directory / peft.WEIGHTS).items()}
    change(tensors)
    write_file(directory / peft.WEIGHTS, tensors)
    with pytest.raises(CheckpointError, match=said):
        peft.read_adapters(directory)


def test_another_model_is_refused(written):

    directory, tree = written
    found = peft.read_adapters(directory)
    with pytest.raises(CheckpointError, match="give base_model_name_or_path the model"):
        peft.to_tree(found, dataclasses.replace(CONFIG, num_layers=5))
    wide = jax.tree.map(lambda x: np.zeros((*x.shape[:-1], 7)), tree)
    with pytest.raises(CheckpointError, match="the weights need"):
        peft.check_shapes(tree, wide)


def test_weights_beside_adapters_are_no_directory_of_peft(written):
    directory, _ = written
    (directory / "config.json").write_text("{}")
    assert not peft.holds_adapters(directory)

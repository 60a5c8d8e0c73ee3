"""Published directories in and out: both generations of names, shards into shards, and what is
wrong with a damaged one.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mmrecoder_jax.models import safetensors, weights
from mmrecoder_jax.models.config import PRESETS, VisionConfig
from mmrecoder_jax.models.qwen2_5_vl import init_params
from mmrecoder_jax.models.sharding import make_mesh, param_shardings
from tests.models.conversation import small_config
from tests.models.parity import CONFIG, IMAGE_TOKEN, random_tensors


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    params = weights.from_tensors(random_tensors(), CONFIG)
    weights.save_pretrained(
        path, params, CONFIG, "float32", {"image_token_id": IMAGE_TOKEN}, shard_bytes=100_000
    )
    return path


def leaf(tree, path):
    return functools.reduce(lambda branch, key: branch[key], path, tree)


def copy_of(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_what_is_saved_is_loaded(directory):
    config, params = weights.load_pretrained(directory, dtype="float32", remat="none")
    assert config == CONFIG and len(list(directory.glob("model-*.safetensors"))) > 3
    jax.tree.map(
        np.testing.assert_array_equal, params, weights.from_tensors(random_tensors(), CONFIG)
    )


def test_the_files_are_safetensors(directory):
    from safetensors.numpy import load_file

    tensors = {
        name: x
        for file in sorted(directory.glob("*.safetensors"))
        for name, x in load_file(file).items()
    }
    ours = dict(random_tensors())
    patch = "visual.patch_embed.proj.weight"
    np.testing.assert_allclose(tensors.pop(patch).sum(2), ours.pop(patch).sum(2), atol=1e-6)
    assert tensors.keys() == ours.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(tensors[name], x)


def test_bfloat16_on_disk_becomes_the_master_dtype(tmp_path):
    params = weights.from_tensors(random_tensors(), CONFIG)
    weights.save_pretrained(tmp_path, params, CONFIG)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 2.2 * sum(
        x.size for x in random_tensors().values()
    )
    _, loaded = weights.load_pretrained(tmp_path, param_dtype="float32")
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=2**-8)


def test_names_as_transformers_5_holds_them():
    names = {"visual": "model.visual", "model": "model.language_model", "lm_head": "lm_head"}
    renamed = {
        names[first] + "." + rest: x
        for (first, rest), x in ((n.split(".", 1), x) for n, x in random_tensors().items())
    }
    old, new = weights.from_tensors(random_tensors(), CONFIG), weights.from_tensors(renamed, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_a_device_reads_its_own_part(directory):
    """One device here: the callback path, which on a mesh cuts each part out of the files (see
    test_sharding for eight).
    """
    mesh = make_mesh()
    _, params = weights.load_pretrained(directory, lambda abstract: param_shardings(abstract, mesh))
    jax.tree.map(
        np.testing.assert_array_equal, params, weights.from_tensors(random_tensors(), CONFIG)
    )
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(params)} == {mesh}


def test_a_part_of_a_stacked_parameter():
    layers = {
        (i, j): np.arange(12).reshape(3, 4) + 100 * i + 10 * j for i in range(2) for j in range(3)
    }
    leaf = jax.ShapeDtypeStruct((2, 3, 3, 4), np.float32)
    whole = np.stack([np.stack([layers[i, j] for j in range(3)]) for i in range(2)])
    index = (slice(1, 2), slice(None), slice(0, 2), slice(1, 4))
    np.testing.assert_array_equal(weights.read_part(layers, leaf, index), whole[index])


def test_large_parts_are_put_together_on_the_device(directory, monkeypatch):
    """In chunks of a few rows, within the caller's mesh too: the same arrays."""
    mesh = make_mesh()
    whole = weights.load_pretrained(directory)[1]
    monkeypatch.setattr(weights, "CHUNK_BYTES", 3000)
    with jax.set_mesh(mesh):
        _, chunked = weights.load_pretrained(
            directory, lambda abstract: param_shardings(abstract, mesh)
        )
    jax.tree.map(np.testing.assert_array_equal, chunked, whole)
    jax.tree.map(np.testing.assert_array_equal, weights.load_pretrained(directory)[1], whole)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda d: next(d.glob("model-00002*")).unlink(),
            FileNotFoundError,
            "model-00002.*missing",
        ),
        (lambda d: _cut(next(d.glob("model-00002*")), 100), ValueError, "model-00002.*cut short"),
        (lambda d: _cut(next(d.glob("model-00002*")), 10**9), ValueError, "no safetensors file"),
        (
            lambda d: next(d.glob("model-00002*")).write_bytes(
                b"\x08" + bytes(7) + b"no JSON!" * 3
            ),
            ValueError,
            "header is no JSON",
        ),
        (lambda d: (d / safetensors.INDEX).unlink(), FileNotFoundError, "neither"),
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "config.json"),
        (lambda d: _edit(d, model_type="llama"), ValueError, "'llama'"),
        (lambda d: _edit(d, hidden_act="relu"), ValueError, "hidden_act='relu'"),
        (lambda d: _edit(d, rope_scaling=None), ValueError, "incomplete, 'mrope_section'"),
        (lambda d: _edit(d, num_hidden_layers=4), ValueError, r"lacks model.layers.3.* and 7 more"),
        (
            lambda d: _edit(d, num_hidden_layers=2),
            ValueError,
            r"has not: model.layers.2.* and 7 more",
        ),
        (
            lambda d: _edit(d, intermediate_size=81),
            ValueError,
            r"down_proj.weight \[48, 80\] \(expected \[48, 81\]\)",
        ),
    ],
)
def test_what_is_wrong_with_a_damaged_directory_is_said(
    directory, tmp_path, damage, error, message
):
    damaged = copy_of(directory, tmp_path)
    damage(damaged)
    with pytest.raises(error, match=message):
        weights.load_pretrained(damaged)


def _cut(path, count):
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - count)])


def _edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_is_not_written_over(directory):
    with pytest.raises(FileExistsError, match="holds a model already"):
        weights.save_pretrained(directory, {}, CONFIG)


def test_the_nested_config_of_transformers_5(directory, tmp_path):
    flat = json.loads((directory / "config.json").read_text())
    text = {
        name: flat.pop(name)
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    }
    rope = flat.pop("rope_scaling") | {"rope_theta": flat.pop("rope_theta")}
    (tmp_path / "config.json").write_text(
        json.dumps(flat | {"text_config": text | {"rope_parameters": rope}})
    )
    assert weights.load_config(tmp_path) == weights.load_config(directory)


def test_a_host_holds_less_than_one_shard_beside_the_arrays(tmp_path):
    """170 MB in four shards onto four simulated devices; memory beside the arrays is that of the
    parameter being made.
    """
    config = small_config(
        vocab_size=16384,
        hidden_size=512,
        num_layers=6,
        num_heads=8,
        intermediate_size=2048,
        head_dim=64,
        mrope_section=(8, 12, 12),
        vision=dataclasses.replace(CONFIG.vision, out_hidden_size=512),
    )
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def tensors():
        for entry in weights.entries(config):
            shape = leaf(abstract, entry.path).shape[len(entry.place) :]
            shape = jax.eval_shape(
                entry.conversion.to_published, jax.ShapeDtypeStruct(shape, np.float32)
            ).shape
            yield entry.name, np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    shard = 60 * 10**6
    safetensors.write_directory(tmp_path, tensors(), shard)
    (tmp_path / "config.json").write_text(json.dumps(weights.published_config(config, "float32")))
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.models.loading_main", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    print(measured)
    assert measured["arrays"] > 2.5 * shard and measured["anonymous"] < shard


# As published: (vocab, hidden, layers, heads, kv heads, intermediate, tied), parameters in all
PUBLISHED = {
    "3b": ((151936, 2048, 36, 16, 2, 11008, True), 3_754_622_976),
    "7b": ((152064, 3584, 28, 28, 4, 18944, False), 8_292_166_656),
    "32b": ((152064, 5120, 64, 40, 8, 27648, False), None),
    "72b": ((152064, 8192, 80, 64, 8, 29568, False), None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_sizes(name):
    config, (sizes, total) = PRESETS[name], PUBLISHED[name]
    text = (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "intermediate_size",
        "tie_word_embeddings",
    )
    assert tuple(getattr(config, field) for field in text) == sizes
    assert (config.head_dim, config.rope_theta, config.mrope_section, config.rms_norm_eps) == (
        128,
        1e6,
        (16, 24, 24),
        1e-6,
    )
    tower = (
        1280,
        32,
        16,
        3420 if name in ("3b", "7b") else 3456,
        config.hidden_size,
        (7, 15, 23, 31),
        14,
        2,
        3,
        2,
        112,
    )
    assert dataclasses.astuple(config.vision) == tower
    published = weights.published_config(config, "bfloat16")
    assert (
        published["vision_config"]["fullatt_block_indexes"] == (7, 15, 23, 31)
        and published["image_token_id"] == 151655
    )
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    # the second temporal slice of the patch embedding
    folded = config.vision.patch_dim * config.vision.hidden_size
    if total:
        assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) + folded == total
    assert len(weights.entries(config)) == 12 * (config.num_layers + 32) + 6 + (
        2 if config.tie_word_embeddings else 3
    )


@pytest.mark.parametrize("indexes", [(), (0, 3), (1, 2), (3, 1), (1,)])
def test_full_attention_layers_that_end_no_equal_groups_are_refused(indexes):
    with pytest.raises(ValueError, match="must end equal groups"):
        dataclasses.replace(CONFIG.vision, fullatt_block_indexes=indexes)
    assert isinstance(dataclasses.replace(CONFIG.vision, fullatt_block_indexes=(3,)), VisionConfig)

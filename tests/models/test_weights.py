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
from mmrecoder_jax.models.config import PRESETS
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.published import published_config
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


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
        (i, j): weights.Layer(f"{i} {j}", np.arange(12).reshape(3, 4) + 100 * i + 10 * j)
        for i in range(2)
        for j in range(3)
    }
    leaf = jax.ShapeDtypeStruct((2, 3, 3, 4), np.float32)
    whole = np.stack([np.stack([layers[i, j].values for j in range(3)]) for i in range(2)])
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


def test_a_model_is_not_written_over(directory):
    with pytest.raises(FileExistsError, match="holds a model already"):
        weights.save_pretrained(directory, {}, CONFIG)


def files_of(directory):
    """The published tensors in a directory's files."""
    return {name: np.array(x) for name, x in safetensors.open_directory(directory).items()}


def rewrite(directory, tensors):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    safetensors.write_directory(directory, tensors.items(), 10**9)


def change(**tensors):
    """Damage: other tensors of these names ("__" for "."); None takes one away."""

    def damage(directory):
        new = files_of(directory) | {name.replace("__", "."): x for name, x in tensors.items()}
        rewrite(directory, {name: x for name, x in new.items() if x is not None})

    return damage


def rename(how):
    return lambda d: rewrite(d, {how(name): x for name, x in files_of(d).items()})


def resize_vocabulary(directory):
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        change(**{name.replace(".", "__"): np.zeros((308, CONFIG.hidden_size), np.float32)})(
            directory
        )


def spoil(name, value):
    """Damage: one value of a tensor."""

    def damage(directory):
        x = files_of(directory)[name]
        x.flat[x.size // 2] = value
        rewrite(directory, files_of(directory) | {name: x})

    return damage


def blank(name, rows=slice(None)):
    """Damage: zeros in a tensor, or in these rows of it."""

    def damage(directory):
        x = files_of(directory)[name]
        x[rows] = 0.0
        rewrite(directory, files_of(directory) | {name: x})

    return damage


GATE = "model.layers.1.mlp.gate_proj"
TENSORS_OF_OTHERS = [
    (lambda d: edit(d, num_hidden_layers=4), "lacks model.layers.3.* and 7 more: a shard is miss"),
    (lambda d: edit(d, num_hidden_layers=2), "model has not: model.layers.2.* and 7 more; config"),
    (
        lambda d: edit(d, intermediate_size=81),
        r"down_proj.weight \[48, 80\] \(expected \[48, 81\]\).*config.json is of another model",
    ),
    (resize_vocabulary, r"embed_tokens.weight \[308, 48\].*set vocab_size in config.json to 308"),
    (change(model__norm__weight=np.zeros(0, np.float32)), r"norm.weight \[0\].*zero_to_fp32.py"),
    (rename("base_model.model.{}".format), "'base_model.model.'.*merge_and_unload"),
    (rename("module.{}".format), "'module.'.*save its `.module`"),
    (rename("_orig_mod.{}".format), "'_orig_mod.'.*save its `._orig_mod`"),
    (rename("policy.{}".format), "'policy.'.*save the model inside its wrapper"),
    (
        rename(lambda name: "module." + name.replace("model.", "model.language_model.", 1)),
        "'module.'",
    ),
    (
        change(model__language_model__norm__weight=np.ones(CONFIG.hidden_size, np.float32)),
        "model.norm.weight is there twice",
    ),
    (
        change(v_head__summary__weight=np.ones(4, np.float32)),
        "not: v_head.summary.weight.*save the Qwen2.5-VL alone",
    ),
    (change(visual__merger__ln_q__weight=None), "lacks visual.merger.ln_q.weight: a shard"),
    (
        rename(lambda name: name.replace(f"{GATE}.weight", f"{GATE}.qweight")),
        "gate_proj.qweight: quantised",
    ),
    (change(**{f"{GATE}.weight_scale_inv": np.ones(4, np.float32)}), "weight_scale_inv: quantised"),
    (
        change(**{f"{GATE}.weight": np.ones((80, 48), np.uint8)}),
        "gate_proj.weight is of type uint8: quantised",
    ),
    (
        rename(lambda name: name.replace(f"{GATE}.", f"{GATE}.base_layer.")),
        "base_layer.weight: adapters beside",
    ),
    (
        change(**{f"{GATE}.lora_A.default.weight": np.ones(4, np.float32)}),
        "lora_A.*merge_and_unload",
    ),
    (spoil("model.norm.weight", np.nan), "model.norm.weight holds NaN"),
    (spoil(f"{GATE}.weight", np.inf), f"{GATE}.weight holds NaN or infinite"),
    (spoil("visual.blocks.2.attn.qkv.bias", -np.inf), "visual.blocks.2.attn.qkv.bias holds NaN"),
    (spoil("visual.patch_embed.proj.weight", np.nan), "visual.patch_embed.proj.weight holds NaN"),
    (blank(f"{GATE}.weight"), f"{GATE}.weight holds only zeros"),
    (blank("model.embed_tokens.weight"), "model.embed_tokens.weight holds only zeros"),
    (blank("visual.merger.ln_q.weight"), "visual.merger.ln_q.weight holds only zeros"),
    (change(lm_head__weight=None), "lacks lm_head.weight although tie_word_embeddings.* is false"),
    (
        lambda d: edit(d, tie_word_embeddings=True),
        "lm_head.weight differs from model.embed_tokens.weight although.* is true",
    ),
]


@pytest.mark.parametrize("damage, message", TENSORS_OF_OTHERS)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_tensors_that_are_not_this_models_are_refused(
    directory, tmp_path, damage, message, param_dtype
):
    odd = copy_of(directory, tmp_path)
    damage(odd)
    with pytest.raises(CheckpointError, match=message) as refusal:
        weights.load_pretrained(odd, param_dtype=param_dtype)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith(str(odd))


def test_zeros_that_a_model_can_have_are_read(directory, tmp_path, monkeypatch):
    """Biases, and the last rows of a vocabulary, which come in chunks of their own."""
    monkeypatch.setattr(weights, "CHUNK_BYTES", 10_000)
    odd = copy_of(directory, tmp_path)
    blank("visual.blocks.2.attn.qkv.bias")(odd)
    blank("model.embed_tokens.weight", slice(100, None))(odd)
    weights.load_pretrained(odd)


def test_values_beyond_the_parameters_type_are_refused(directory, tmp_path):
    """1e6 is finite on disk and infinite in float16."""
    odd = copy_of(directory, tmp_path)
    spoil("model.norm.weight", 1e6)(odd)
    weights.load_pretrained(odd)
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds .* \(as float16\)"):
        weights.load_pretrained(odd, param_dtype="float16")


def test_a_head_that_equals_the_tied_embedding_is_accepted(directory, tmp_path):
    same = copy_of(directory, tmp_path)
    edit(same, tie_word_embeddings=True)
    change(lm_head__weight=files_of(same)["model.embed_tokens.weight"])(same)
    config, params = weights.load_pretrained(same)
    assert config.tie_word_embeddings and "lm_head" not in params


def test_directories_with_the_newer_names_are_read(directory, tmp_path):
    new = copy_of(directory, tmp_path)
    names = {"visual": "model.visual", "model": "model.language_model", "lm_head": "lm_head"}
    rename(lambda name: ".".join([names[name.split(".")[0]], *name.split(".")[1:]]))(new)
    a, b = weights.load_pretrained(new)[1], weights.load_pretrained(directory)[1]
    jax.tree.map(np.testing.assert_array_equal, a, b)


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
    (tmp_path / "config.json").write_text(json.dumps(published_config(config, "float32")))
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
    published = published_config(config, "bfloat16")
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

"""Starting from a published directory: the trainer reads what `models.weights` wrote."""

import dataclasses
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmrecoder_jax import sft
from mmrecoder_jax.config import ConfigError, load, model_config
from mmrecoder_jax.data import pipeline, synthetic
from mmrecoder_jax.data.batching import BatchShape, Collate
from mmrecoder_jax.learner.init import source_digest
from mmrecoder_jax.models.tokenizer import train_sentencepiece
from mmrecoder_jax.models.weights import from_tensors, save_pretrained
from mmrecoder_jax.prepare import find_source
from mmrecoder_jax.stage import build
from tests.models.parity import random_tensors


@pytest.fixture
def published(policy, tmp_path):
    stage = policy.stage
    save_pretrained(
        tmp_path,
        policy.params,
        stage.model.config,
        "float32",
        {"image_token_id": stage.tokenizer.image_pad_id},
    )
    config = load("stage2", "smoke")
    config.init_from = str(tmp_path)
    return dataclasses.replace(stage, config=config)


def test_published_weights_are_read(published, policy):
    for a, b in zip(
        jax.tree.leaves(published.initial_params()), jax.tree.leaves(policy.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_another_size_is_an_error(published):
    other = dataclasses.replace(published.model.config, rope_theta=7.0)
    with pytest.raises(ConfigError, match=r"model\.preset"):
        dataclasses.replace(
            published, model=dataclasses.replace(published.model, config=other)
        ).initial_params()


def test_the_difference_and_the_remedy_are_named(published):
    config = dataclasses.replace(published.model.config, num_layers=5, rope_theta=7.0)
    other = dataclasses.replace(
        published, model=dataclasses.replace(published.model, config=config)
    )
    with pytest.raises(ConfigError, match=r"num_layers=3 \(not 5\), rope_theta=1.* \(not 7.0\)"):
        other.initial_params()
    with pytest.raises(ConfigError, match=r"set --config.model.preset=published"):
        other.initial_params()


def test_what_is_wrong_with_the_files_names_the_field(published, tmp_path):
    next(tmp_path.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^init_from: .*safetensors: an empty file"):
        published.initial_params()


@pytest.fixture
def without_preset(policy, tmp_path):
    """A stage on a published directory whose size is no preset."""
    sizes = dataclasses.replace(policy.stage.model.config, num_layers=2, intermediate_size=192)
    params = from_tensors(random_tensors(sizes), sizes)
    source = tmp_path / "hub"
    save_pretrained(source, params, sizes, "float32")
    policy.stage.tokenizer.save(source)
    config = load("sft_chart2code", "smoke")
    config.model.preset, config.init_from = "published", str(source)
    return build(config, str(tmp_path / "work")), params


def test_a_published_size_needs_no_preset(without_preset):
    stage, params = without_preset
    assert (stage.model.config.num_layers, stage.model.config.intermediate_size) == (2, 192)
    assert stage.model.config.dtype == stage.config.model.dtype
    for a, b in zip(jax.tree.leaves(stage.initial_params()), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # the patch kernel is halved and summed


def test_a_model_of_the_hub_is_found_by_its_name(without_preset, tmp_path, monkeypatch):
    """Through everything that reads `init_from`, from the check to the parameters."""
    stage, params = without_preset
    source = stage.config.init_from
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: source)
    config = stage.config.copy_and_resolve_references()
    config.init_from = f"org/{tmp_path.name}"
    find_source(config)
    assert config.init_from == source
    later = build(config, str(tmp_path / "later"))
    for a, b in zip(jax.tree.leaves(later.initial_params()), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_hub_out_of_reach_is_answered_with_what_to_run(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    config = load("stage2", "smoke")
    config.init_from = f"org/{tmp_path.name}-2"
    with pytest.raises(ConfigError, match=r"^init_from: 'org/.*offline.*`hf download org/"):
        find_source(config)


def test_a_work_directory_keeps_the_published_size(without_preset, tmp_path):
    """A later stage finds it there, without the directory that the first one started from."""
    stage, _ = without_preset
    stage.write_config()
    shutil.rmtree(tmp_path / "hub")
    config = load("stage2", "smoke")
    config.model.preset, config.init_from = "published", str(tmp_path / "work")
    later = build(config, str(tmp_path / "later"))
    assert later.model.config == stage.model.config


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "model.preset='published' with an empty config.init_from: .* tiny"),
        ("nowhere", "init_from: nowhere: no such directory"),
    ],
)
def test_a_published_size_needs_a_source(source, message):
    config = load("stage2", "smoke")
    config.model.preset, config.init_from = "published", source
    with pytest.raises(ConfigError, match=message):
        model_config(config)


def test_a_tokenizer_larger_than_the_table_is_refused(published, tmp_path):
    words = synthetic.words()
    texts = synthetic.tokenizer_texts(400, 0, ["Redraw this chart as Matplotlib code."])
    train_sentencepiece(texts, 560, words).save(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer: .* has 560 ids, .* has 512 rows"):
        build(published.config, str(tmp_path / "work"))


def test_the_first_gradients_from_scratch_are_of_one_size(policy):
    """Blank paper, most of every chart, must not come near zero before a norm: its part of the
    gradients would be a million times that of all others.
    """
    stage = policy.stage
    rows = [pipeline.single_turn_row(chart, stage.processor) for chart in policy.charts[:8]]
    shape = BatchShape(8, (112, 264), (12,), 8)
    batch = pipeline.learner_batch(rows, Collate(shape, stage.layout))
    loss = sft.make_loss(stage.token_logps())
    micro = {name: jnp.asarray(x[0]) for name, x in batch.items()}
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, batch)[0]))
    gradients = gradient(stage.initial_params(), micro)
    parts = gradients["visual"] | {"decoder": gradients["model"]}
    norms = {name: float(optax.global_norm(part)) for name, part in parts.items()}
    assert set(norms) == {"patch_embed", "blocks", "merger", "decoder"}
    assert max(norms.values()) < 10 * min(norms.values()), norms


def test_other_weights_of_the_same_size_have_another_digest(tmp_path):
    """Trained again, a policy has the same names and sizes."""
    path = tmp_path / "model.safetensors"
    digests = []
    for value in (1.0, 1.0, 1.001):
        path.write_bytes(np.full(1 << 18, value, np.float32).tobytes())
        digests.append(source_digest(str(tmp_path)))
    assert digests[0] == digests[1] != digests[2]

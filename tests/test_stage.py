"""The objects of a stage: what cannot be built is refused by name."""

import json

import pytest

from mmrecoder_jax import places, resume
from mmrecoder_jax.config import ConfigError, load, set_fields
from mmrecoder_jax.data import panels, synthetic
from mmrecoder_jax.stage import build, env_config


@pytest.mark.parametrize(
    "field, value, choices",
    [
        ("feedback.image", "sketch", "render, difference, both, signed"),
        ("reward.mode", "strict", "training, official"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(policy, field, value, choices):
    config = policy.stage_with({field: value}).config
    with pytest.raises(ConfigError, match=f"{field}='{value}': use one of {choices}"):
        build(config, policy.stage.workdir)


def test_a_stage_without_a_tokenizer_says_where_it_looked(tmp_path):
    config = load("stage2", "smoke")
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no tokenizer in .*nowhere"):
        build(config, str(tmp_path))


def test_charts_that_are_not_there_say_how_to_make_them(policy, tmp_path):
    stage = policy.stage_with({"data.dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"no charts at .*train.*mmrecoder_jax\.import_charts"):
        stage.charts("train")


def test_synthetic_charts_bring_their_house_style():
    config = load("stage2", "smoke")
    assert env_config(config).rc_params == synthetic.RC_PARAMS
    config.data.grammar = "panels"
    assert env_config(config).rc_params == panels.RC_PARAMS
    set_fields(config, {"data.kind": "directory"})
    assert env_config(config).rc_params == {}


def test_saved_settings_name_addresses_in_buckets(cloud, policy, tmp_path):
    cloud.store("bucket", "weights/config.json", b"{}")
    source = places.local("gs://bucket/weights")
    stage = policy.stage_with({"init_from": source}, workdir=str(tmp_path / "a"))
    stage.write_config()
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["init_from"] == "gs://bucket/weights"
    assert (
        resume.note_of(stage.config, {})["fields"]
        == resume.note_of(policy.stage.config, {})["fields"]
    )

"""Configurations whose numbers cannot work are refused, with field, value and remedy."""

import math

import pytest

from mmrecoder_jax.checks import check_config
from mmrecoder_jax.config import SIZES, STAGES, ConfigError, load, set_fields
from mmrecoder_jax.models.config import preset


def check(stage: str, size: str | None = "smoke", **fields) -> None:
    config = load(stage, size)
    set_fields(config, {name.replace("__", "."): value for name, value in fields.items()})
    check_config(config, preset(config.model.preset).vision)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_configurations_themselves_are_fine(stage, size):
    check(stage, size)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("optim.lr", -1e-5, "0 or more"),
        ("optim.lr", math.nan, "0 or more"),
        ("optim.b1", 1.0, "less than 1"),
        ("optim.b1", -0.1, "0 or more"),
        ("optim.b2", 1.5, "less than 1"),
        ("optim.b2", -0.5, "0 or more"),
        ("optim.weight_decay", -0.1, "use 0 for none"),
        ("optim.clip", 0.0, "above 0"),
        ("optim.clip", -1.0, "above 0"),
        ("optim.warmup_steps", -1, "use 0 for none"),
        ("optim.max_skipped", 0, "use 1"),
        ("train.batch_size", 0, "use 1 or more"),
        ("train.micro_batch_size", 0, "use 1 or more"),
        ("train.micro_batch_size", -8, "use 1 or more"),
        ("processor.max_pixels", 28 * 28 - 1, "use 784"),
        ("processor.min_pixels", 10**6, "is above processor.max_pixels"),
        ("data.windows", (2, 5), "takes 6 windows or more"),
    ],
)
def test_numbers_that_no_stage_can_use(stage, field, value, message):
    shown = value if field != "data.windows" else r"\(2, 5\)"
    with pytest.raises(ConfigError, match=f"{field}={shown}.*{message}"):
        check(stage, **{field.replace(".", "__"): value})


@pytest.mark.parametrize(
    "field, value", [("optim.lr", 0.0), ("optim.b1", 0.0), ("data.windows", (6,))]
)
def test_numbers_at_the_edge_are_allowed(field, value):
    check("stage2", **{field.replace(".", "__"): value})


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("rl.temperature", 0.0, "above 0"),
        ("rl.temperature", -1.0, "above 0"),
        ("rl.group", 1, "use 2 or more"),
        ("rl.group", 0, "use 2 or more"),
        ("rl.turns", 0, "use 1 or more"),
    ],
)
def test_options_that_no_group_can_learn_from(stage, field, value, message):
    with pytest.raises(ConfigError, match=f"{field}={value}.*{message}"):
        check(stage, **{field.replace(".", "__"): value})


def test_stage_1_has_two_turns_and_stage_2_may_have_one():
    with pytest.raises(ConfigError, match=r"rl\.turns=1 in stage1.*use 2 or more"):
        check("stage1", rl__turns=1)
    check("stage2", rl__turns=1)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_rows_hold_all_turns(stage):
    """40 of the prompt, 32 per turn, 80 of a feedback: 184 for two turns, 296 for three."""
    check(stage, data__lengths=(112, 184))
    with pytest.raises(
        ConfigError, match=r"data.lengths=\(112, 183\).*rl.turns=2.* a bucket of 184"
    ):
        check(stage, data__lengths=(112, 183))
    with pytest.raises(ConfigError, match=r"rl\.turns=3.* = 296"):
        check(stage, rl__turns=3)

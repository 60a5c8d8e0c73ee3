"""Configurations whose numbers cannot work are refused, with field, value and remedy."""

import dataclasses

import pytest

from mmrecoder_jax.checks import check_config, vanishing
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
        ("processor.max_pixels", 28 * 28 - 1, "use 784"),
        ("processor.min_pixels", 10**6, "is above processor.max_pixels"),
        ("data.windows", (2, 5), "takes 6 windows or more"),
    ],
)
def test_numbers_that_no_stage_can_use(stage, field, value, message):
    shown = value if field != "data.windows" else r"\(2, 5\)"
    with pytest.raises(ConfigError, match=f"{field}={shown}.*{message}"):
        check(stage, **{field.replace(".", "__"): value})


@pytest.mark.parametrize("stage", STAGES)
def test_a_device_has_room_for_the_longest_row(stage):
    longest = max(load(stage, "smoke").data.lengths)
    for enough in (0, longest):
        check(stage, train__micro_tokens=enough)
    with pytest.raises(ConfigError, match=rf"micro_tokens={longest - 1} cannot hold.*{longest}"):
        check(stage, train__micro_tokens=longest - 1)


def test_windows_that_just_hold_an_image_are_allowed():
    check("stage2", data__windows=(6,))


@pytest.mark.parametrize(
    "alpha, beta, judge, message",
    [
        (0.7, 0.4, "visual", r"reward\.alpha=0\.7 and reward\.beta=0\.4 leave -0\.1"),
        (0.5, 0.4, "none", r"reward\.beta=0\.4 needs a judge"),
    ],
)
def test_weights_of_a_reward(alpha, beta, judge, message):
    changes = {"reward__alpha": alpha, "reward__judge": judge}
    check("stage2", **changes, reward__beta=0.0)
    with pytest.raises(ConfigError, match=message):
        check("stage2", **changes, reward__beta=beta)


def test_stage_1_has_two_turns_and_stage_2_may_have_one():
    with pytest.raises(ConfigError, match=r"rl\.turns=1 in stage1.*use 2 or more"):
        check("stage1", rl__turns=1)
    check("stage2", rl__turns=1)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_options_of_the_loss_that_contradict_each_other(stage):
    gspo = {"rl__objective": "gspo"}
    check(stage, **gspo, rl__aggregation="sequence_mean")
    dual = {"rl__clip_dual": 3.0, "rl__updates_per_batch": 2}
    check(stage, **dual)
    for fields, said in (
        (gspo, "rl.objective='gspo'.*--config.rl.aggregation=sequence_mean"),
        (dual | {"rl__clip_dual": 1.1}, r"rl.clip_dual=1.1 must be above 1 \+ rl.clip_high=1.2"),
        (dual | {"rl__updates_per_batch": 1}, "rl.clip_dual=3.0 bounds a ratio, which is 1 in"),
        ({"rl__resample": 1, "rl__ahead": 1}, "rl.resample=1 draws .* rl.ahead=1, rl.partial=0"),
        ({"rl__resample": 2, "rl__partial": 9}, "rl.partial=9 draw over several steps"),
        ({"rl__credit": "turn", "reward__gamma": 0.5}, "rl.credit='turn' .* reward.gamma=0.5"),
        ({"rl__credit": "turn", "reward__eta": 0.1}, "reward.eta=0.1 make one of all turns"),
        (dual | {"rl__objective": "cispo"}, "rl.clip_dual=3.0 bounds a ratio, which is a weight"),
        ({"rl__overlong": 32}, "rl.overlong=32 must be below rl.response_length=32"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(stage, **fields)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_options_of_the_divergence_that_would_do_nothing(stage):
    some = {"rl__kl_coef": 0.1}
    check(stage, **some, rl__kl_in="reward", rl__kl="k1", rl__reference_every=2)
    check(stage, **some, rl__updates_per_batch=2, rl__reference_every=1)
    of_itself = "rl.reference_every=1 makes each step's own policy its reference"
    for fields, said in (
        ({"rl__kl_in": "reward"}, "rl.kl_in='reward' is of a divergence that rl.kl_coef=0 leaves"),
        ({"rl__reference_every": 5}, "rl.reference_every=5 is .*rl.kl_coef=0.*reference_every=0"),
        (some | {"rl__kl": "k1"}, "rl.kl='k1' in the loss has a gradient of 0.*rl.kl_in=reward"),
        (some | {"rl__reference_every": 1}, of_itself),
        (
            some | {"rl__reference_every": 1, "rl__kl_in": "reward", "rl__mini_batches": 2},
            of_itself,
        ),
    ):
        with pytest.raises(ConfigError, match=said) as refusal:
            check(stage, **fields)
        assert "\n" not in str(refusal.value)


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


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_server_decodes_what_our_sampler_would(stage, kind):
    check(stage, engine__kind=kind)
    for field, value in (("rl.top_k", 5), ("rl.top_p", 0.9), ("rl.min_p", 0.1)):
        changed = {field.replace(".", "__"): value}
        with pytest.raises(ConfigError, match=f"{field}={value} with engine.kind='{kind}'"):
            check(stage, engine__kind=kind, **changed)
        check(stage, **changed)
    with pytest.raises(ConfigError, match=r"processor\.min_pixels=784 .* enlarge .* 3136 pixels"):
        check(stage, engine__kind=kind, processor__min_pixels=784)
    check(stage, processor__min_pixels=784)


@pytest.mark.parametrize(
    "stage, best, message",
    [
        ("stage2", "eval/greedy/turn3/low_level", "mean eval/greedy/turn[12]/low_level"),
        ("stage2", "reward", "is no metric on held-out charts of stage2"),
        ("stage1", "-eval/greedy/improvment", "mean eval/greedy/improvement, "),
        ("stage1", "held_out_loss", "is no metric on held-out charts"),
        ("sft_chart2code", "held_out_los", "mean held_out_loss"),
        ("sft_self_correction", "-held_out_loss", "measures nothing"),
    ],
)
def test_a_best_that_no_row_can_have(stage, best, message):
    more = {"rl__eval_every": 2} if stage.startswith("stage") else {}
    with pytest.raises(ConfigError, match=f"checkpoint.best='{best}'.*{message}"):
        check(stage, checkpoint__best=best, **more)


@pytest.mark.parametrize(
    "stage, best, field",
    [
        ("stage2", "eval/greedy/turn2/low_level", "rl.eval_every"),
        ("sft_chart2code", "-held_out_loss", "train.eval_every"),
    ],
)
def test_a_best_needs_evaluations(stage, best, field):
    name = field.replace(".", "__")
    check(stage, checkpoint__best=best, **{name: 2})
    with pytest.raises(ConfigError, match=f"is never measured, because {field}=0"):
        check(stage, checkpoint__best=best, **{name: 0})


def test_a_rate_that_bfloat16_rounds_away_is_told():
    config = load("stage2", "paper")
    wide = dataclasses.replace(preset("7b"), param_dtype="bfloat16")
    assert vanishing(config, wide) == ""  # rounded by chance
    config.optim.rounding = "nearest"
    assert "optim.lr=1e-06 is below 3.3e-05" in vanishing(config, wide)
    assert vanishing(config, preset("7b")) == ""
    config.optim.lr = 1e-4
    assert vanishing(config, wide) == ""

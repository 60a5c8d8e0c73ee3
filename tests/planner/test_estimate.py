"""Times and prices: sums by hand, and beside what cards were measured to take."""

import dataclasses

import jax
import pytest

from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.planner import estimate, fits, topology
from mmrecoder_jax.planner.advice import part_of
from mmrecoder_jax.planner.estimate import Seconds, between
from mmrecoder_jax.planner.fits import GIB
from mmrecoder_jax.planner.programs import Program, Programs
from tests.planner.test_fits import report

H100 = topology.parse("h100:8")
CHIP = H100.generation.chip


def test_a_call_takes_its_longest_part_or_all_of_them():
    computing, receiving = 1.0, 0.25
    found = estimate.of_call(
        report(
            program=Program.GRADIENTS,
            flops=computing * estimate.MATMUL_SHARE * CHIP.flops,
            collectives={"all-gather": int(receiving * estimate.LINK_SHARE * CHIP.link)},
            params=0,
            gradients=0,
        ),
        CHIP,
    )
    assert found.low == pytest.approx(1.0) and found.high == pytest.approx(1.25)


def test_what_a_program_touches():
    decode = report(program=Program.DECODE, weights=3 * GIB, cache=4 * GIB)
    assert estimate.touched(decode) == 5 * GIB  # half of the slots hold a token
    assert estimate.touched(report(params=GIB, optimizer=2 * GIB, gradients=GIB)) == 7 * GIB


def rollout_config():
    config = load("stage2", "paper")
    config.train.batch_size, config.rl.group, config.rl.turns = 8, 4, 2
    config.rl.response_length = 1000
    return config


def reports():
    """Every call takes a second of computing, whatever hides."""
    second = estimate.MATMUL_SHARE * CHIP.flops
    base = report(flops=second, collectives={}, params=0, optimizer=0, batch=0)
    rows = {"prefill": 4, "extend": 8, "decode": 32, "gradients": 16, "update": 16}
    return [
        dataclasses.replace(
            base,
            program=Program(name),
            rows=count,
            calls=6 if name == "gradients" else 1,
            flops=0 if name == "update" else second,
        )
        for name, count in rows.items()
    ]


def test_a_step_is_the_calls_of_its_programs():
    config = rollout_config()
    found = estimate.step(config, reports(), H100)
    # 8 prompts by 4; 32 feedbacks by 8; 64 responses of 400 tokens in 32 rows, four fifths at work
    assert found.reading.low == pytest.approx(2 + 4)
    assert found.decoding.low == pytest.approx(64 * 400 / (0.8 * 32))
    assert found.decoding.high == pytest.approx(2 * 1000)  # one conversation may be as long
    assert found.scripts.low == pytest.approx(64 * estimate.SCRIPT_SECONDS / (26 * 8))
    assert found.update.low == pytest.approx(6)
    assert found.total.low == pytest.approx(6 + 1000 + 6)
    assert found.total.high == pytest.approx(6 + 2000 + 6 + found.scripts.high)


def test_every_mini_batch_ends_with_a_step_of_the_optimizer():
    """The report's calls are those of one mini-batch."""
    config = rollout_config()
    config.rl.mini_batches, config.rl.updates_per_batch = 2, 3
    learning = 6 * 2 * 3 + 6 * 2 / 4  # and once forward, for the ratio
    assert estimate.step(config, reports(), H100).update.low == pytest.approx(learning)
    paper = load("stage2", "paper")
    whole = Programs(paper, jax.devices()[:1]).micro_batches
    paper.rl.mini_batches = 4
    assert Programs(paper, jax.devices()[:1]).micro_batches == whole / 4


@pytest.mark.parametrize(
    "fields, remat, gradients",
    [
        ({"kl_coef": 0.1}, "full", 1 / 4),
        ({"kl_coef": 0.1}, "none", 1 / 3),
        ({"kl_coef": 0.1, "kl_in": "reward"}, "full", 2 / 4),
        ({"kl_in": "reward"}, "full", 0),
        ({"kl_coef": 0.1, "updates_per_batch": 2}, "full", 1 + 2 / 4),
        ({"kl_coef": 0.1, "kl_in": "reward", "mini_batches": 2}, "full", 1 + 2 * 2 / 4),
    ],
)
def test_passes_without_gradients_take_their_time(fields, remat, gradients):
    config = rollout_config()
    config.model.remat = remat
    for name, value in fields.items():
        config.rl[name] = value
    found = estimate.step(config, reports(), H100).update.low
    assert found == pytest.approx(6 * (1 + gradients))


def test_a_shared_first_turn_is_read_once_a_group():
    config = rollout_config()
    config.stage = "stage1"
    found = estimate.step(config, reports(), H100)
    # 8 first turns and 32 second ones; one feedback a prompt
    assert found.reading.low == pytest.approx(2 + 1)
    assert found.decoding.low == pytest.approx(2 * 400)  # 40 in 32 rows, two turns after another


def test_slices_share_the_prompts_and_exchange_gradients():
    config = part_of(rollout_config(), 4)
    assert config.train.batch_size == 2
    four = dataclasses.replace(H100, slices=4)
    found = estimate.step(config, reports(), four)
    # 16 responses in 32 rows: no shorter than two turns, one after the other
    assert found.decoding.low == pytest.approx(2 * 400)
    assert found.decoding.high == pytest.approx(2 * 1000)
    assert found.update.low == pytest.approx(6)
    sums = [dataclasses.replace(each, gradients=GIB) for each in reports()]
    exchange = 2 * GIB * 3 / 4 / (estimate.LINK_SHARE * CHIP.network)
    longer = estimate.step(config, sums, four).update.low - found.update.low
    assert longer == pytest.approx(exchange, rel=0.1)


def test_slices_must_divide_the_prompts():
    config = rollout_config()
    with pytest.raises(ConfigError, match=r"train.batch_size=8 cannot be shared by 3 slices"):
        part_of(config, 3)
    config.rl.rows = 12
    with pytest.raises(ConfigError, match=r"rl.rows=12 cannot be shared by 8 slices"):
        part_of(config, 8)
    assert part_of(load("sft_chart2code", "paper"), 2).train.batch_size == 64


def test_a_stage_without_rollouts_is_its_update():
    config = load("sft_chart2code", "paper")
    learning = [each for each in reports() if not each.program.samples]
    assert estimate.step(config, learning, H100).total.low == pytest.approx(6)


def test_without_a_program_there_is_no_step():
    config = rollout_config()
    assert estimate.step(config, reports()[:-1], H100) is None
    assert estimate.step(config, reports()[1:], H100) is None


def test_dollars_are_of_all_devices():
    assert estimate.dollars(3600, H100, 3.0) == 24.0
    assert estimate.dollars(1800, dataclasses.replace(H100, slices=2), 3.0) == 24.0


@pytest.mark.parametrize(
    "low, high, text",
    [
        (0.31, 0.313, "0.31 s"),
        (31, 55, "31 to 55 s"),
        (100, 300, "1.7 to 5 minutes"),
        (7200, 10800, "2 to 3 hours"),
        (86400 * 2, 86400 * 4.0, "2 to 4 days"),
        (86400 * 1000, 86400 * 2000, "1,000 to 2,000 days"),
    ],
)
def test_times_are_told_in_one_unit(low, high, text):
    assert between(low, high) == str(Seconds(low, high)) == text


@pytest.mark.parametrize("freeze, measured", [(True, 0.75), (False, 1.01)])
def test_a_measured_update(freeze, measured):
    """8 rows of 2,048 tokens of the 3B on an H100, without and with 8 images of 504 x 504."""
    config = load("stage2", "paper")
    config.model.preset, config.model.param_dtype = "3b", "bfloat16"
    config.model.freeze_vision, config.data.lengths, config.data.windows = freeze, (2048,), (21,)
    config.train.batch_size, config.train.micro_batch_size = 1, 8
    programs = Programs(config, jax.devices()[:1])
    found = fits.measure(programs, Program.UPDATE, topology.parse("h100:1"), "low")
    assert estimate.of_call(found, CHIP).low == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("rows, measured", [(64, 0.0039), (256, 0.00757)])
def test_a_measured_decoding_step(rows, measured):
    """Of the 3B on an H200, 576 valid slots of 1,088 in each row."""
    config = load("stage2", "paper")
    config.model.preset, config.model.param_dtype = "3b", "bfloat16"
    config.train.batch_size, config.rl.group = rows, 1
    rl = config.rl
    rl.prompt_length, rl.feedback_length, rl.response_length = 512, 64, 256
    programs = Programs(config, jax.devices()[:1])
    wanted = topology.parse("h200:1")
    found = fits.measure(programs, Program.DECODE, wanted, "low")
    assert sum(programs.slots) == 1088
    assert estimate.of_call(found, wanted.generation.chip).low == pytest.approx(measured, rel=0.25)

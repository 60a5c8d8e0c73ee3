"""What to try where something does not fit, and what comes of it."""

import jax
import pytest

from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.planner import advice, topology
from mmrecoder_jax.planner.advice import Measurements, plan, settle
from mmrecoder_jax.planner.fits import GIB
from mmrecoder_jax.planner.programs import Program
from tests.planner.test_fits import SLICE, report


def choices(config, program, **sizes):
    return [fields for fields, _ in advice.variants(config, program, **sizes)]


def test_smaller_choices_of_an_update_end_at_a_row_per_device_and_a_key_head_per_device():
    config = load("stage2", "paper")
    config.model.remat = "dots"
    config.train.micro_batch_size = 64
    assert choices(config, Program.GRADIENTS, ways=16, hosts=4) == [
        {"model.remat": "full"},
        {"model.remat": "full", "train.micro_batch_size": 32},
        {"model.remat": "full", "train.micro_batch_size": 16},
        {"model.remat": "full", "train.micro_batch_size": 8, "mesh.tensor": 2},
        {"model.remat": "full", "train.micro_batch_size": 4, "mesh.tensor": 4},
    ]
    _, last = list(advice.variants(config, Program.UPDATE, ways=16, hosts=4))[-1]
    assert (last.model.remat, last.train.micro_batch_size, last.mesh.tensor) == ("full", 4, 4)
    assert config.train.micro_batch_size == 64


def test_smaller_choices_of_a_rollout_are_fewer_prompts_at_once():
    found = choices(load("stage2", "paper"), Program.DECODE, ways=16, hosts=4)
    assert found == [{"rl.rollout_prompts": n} for n in (64, 32, 16)]


def test_advice_is_the_first_choice_that_fits():
    config = load("stage2", "paper")
    tried = []

    def attempt(other):
        tried.append(other.rl.rollout_prompts)
        return report(peak=other.rl.rollout_prompts * GIB)

    assert advice.advise(config, Program.DECODE, 4, 1, attempt) == {"rl.rollout_prompts": 8}
    assert tried == [64, 32, 16, 8]
    too_large = report(peak=99 * GIB)
    assert advice.advise(config, Program.DECODE, 4, 1, lambda other: too_large) is None


@pytest.fixture
def measured(monkeypatch):
    """Stands in for compiling: (program, prompts, rank, preset, effort) of every call, and memory
    as the choice asks. The first argument of `measured.needs` decides how much.
    """

    class Asked(list):
        def needs(self, config, program):
            prompts = config.rl.rollout_prompts or config.train.batch_size
            return prompts * 4 * GIB

    asked = Asked()

    def measure(programs, program, wanted, effort, known):
        config = programs.config
        asked.append((program, config.rl.rollout_prompts, config.lora.rank, effort))
        peak = asked.needs(config, program)
        return report(program=program, peak=int(peak), effort=effort, fingerprint=str(asked[-1]))

    monkeypatch.setattr(advice, "measure", measure)
    return asked


def measurements(effort="low", keep=lambda found: None):
    return Measurements(SLICE, jax.devices()[:1], effort, keep)


def test_a_plan_tries_smaller_choices_and_keeps_every_report(measured):
    config = load("stage2", "smoke")  # 4 prompts
    kept = []
    (found,) = plan(config, [Program.DECODE], measurements(keep=kept.append), try_smaller=True)
    assert found.fits and found.fields == {"rl.rollout_prompts": 2}
    assert [asked[1] for asked in measured] == [0, 2, 2] and len(kept) == len(found.tried) == 2
    assert found.config.rl.rollout_prompts == 2 and config.rl.rollout_prompts == 0


def test_without_trying_the_first_answer_stands(measured):
    config = load("stage2", "smoke")
    (found,) = plan(config, [Program.DECODE], measurements(), try_smaller=False)
    assert not found.fits and found.fields == {} and len(measured) == 1


def test_what_one_program_asks_for_is_asked_of_the_others_too(measured):
    """Prefill fits with 4 prompts, decoding with 2: then prefill is asked about 2."""
    measured.needs = lambda config, program: (
        (config.rl.rollout_prompts or 4) * GIB * (4 if program == Program.DECODE else 1)
    )
    programs = [Program.PREFILL, Program.DECODE]
    found = settle(load("stage2", "smoke"), {}, programs, measurements(), try_smaller=True)
    assert found.fits and [(each.program, each.used) for each in found.reports] == [
        (Program.PREFILL, 2 * GIB),
        (Program.DECODE, 8 * GIB),
    ]
    assert found.worst.program == Program.DECODE


def test_what_does_not_fit_is_told_by_its_smallest_try(measured):
    measured.needs = lambda config, program: (20 + (config.rl.rollout_prompts or 4)) * GIB
    found = settle(load("stage2", "smoke"), {}, [Program.DECODE], measurements(), try_smaller=True)
    assert not found.fits and [each.used // GIB for each in found.tried] == [24, 22, 21]
    assert found.worst.used == 21 * GIB
    # what was not tried smaller, because nothing helps the other, is not what is told
    measured.needs = lambda config, program: 99 * GIB * (config.rl.rollout_prompts or 4)
    programs = [Program.DECODE, Program.EXTEND]
    both = settle(load("stage2", "smoke"), {}, programs, measurements(), try_smaller=True)
    assert (both.worst.program, both.worst.used) == (Program.DECODE, 99 * GIB)


def test_where_nothing_smaller_fits_adapters_are_tried_and_then_a_smaller_model(measured):
    measured.needs = lambda config, program: 99 * GIB if config.model.preset == "7b" else GIB
    config = load("stage2", "paper")
    found = plan(config, [Program.UPDATE], measurements(), try_smaller=True)
    assert [each.fits for each in found] == [False, False, True]
    assert found[0].fields == {} and found[1].fields == advice.ADAPTERS
    assert found[2].fields == {"model.preset": "3b"} and found[2].config.lora.rank == 0


def test_the_smallest_model_with_adapters_has_nothing_to_fall_back_on():
    config = load("stage2", "paper")
    config.model.preset, config.lora.rank = "3b", 8
    assert list(advice.choices(config)) == [{}]
    config.model.preset = "7b"
    assert list(advice.choices(config)) == [{}, {"model.preset": "3b"}]


@pytest.mark.parametrize(
    "devices, fields",
    [
        (8, {}),
        (32, {"train.micro_batch_size": 32}),
        (256, {"mesh.tensor": 2, "train.micro_batch_size": 128}),
        (24, {"mesh.tensor": 4, "train.micro_batch_size": 24}),  # 128 prompts over 6: no way
    ],
)
def test_rows_are_divided_over_the_devices(devices, fields):
    config = load("stage2", "paper")  # 128 prompts of 8, micro-batches of 16
    assert advice.divided(config, devices) == fields


def test_of_a_users_own_sizes_that_cannot_be_the_error_is_told(measured):
    config = load("stage2", "paper")
    config.mesh.tensor = 3
    with pytest.raises(ConfigError, match=r"tensor=3 does not fill 1 devices"):
        plan(config, [Program.GRADIENTS], measurements(), try_smaller=False)


@pytest.mark.parametrize(
    "peak, efforts", [(10, ["low"]), (14.5, ["low", "default"]), (16, ["low"])]
)
def test_auto_confirms_what_leaves_little_room(measured, peak, efforts):
    measured.needs = lambda config, program: peak * GIB
    found = measurements("auto")(load("stage2", "smoke"), Program.UPDATE)
    assert [asked[-1] for asked in measured] == efforts and found.effort == efforts[-1]


def test_a_slice_of_one_chip_is_never_cut():
    config = load("stage2", "paper")
    found = [fields for fields, _ in advice.variants(config, Program.UPDATE, 1, 1)]
    assert found and not any("mesh.tensor" in fields for fields in found)
    assert advice.divided(config, 1) == {}
    assert topology.parse("v6e-1").devices == 1

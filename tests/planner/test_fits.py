"""What fits: the sums of a report, the table, the smaller choices, the advice."""

import dataclasses
import importlib.util

import jax
import pytest

from mmrecoder_jax.config import load
from mmrecoder_jax.planner import fits, topology
from mmrecoder_jax.planner.fits import GIB, ProgramReport
from mmrecoder_jax.planner.programs import Program, Programs

SLICE = topology.parse("v5e-16")


def report(**changes) -> ProgramReport:
    base = ProgramReport(
        slice="v5e-16",
        chips=16,
        preset="7b",
        lora=0,
        stage="stage2",
        program=Program.UPDATE,
        mesh="1x16x1",
        rows=16,
        length=12288,
        remat="full",
        effort="low",
        params=2 * GIB,
        optimizer=4 * GIB,
        cache=0,
        batch=GIB,
        gradients=0,
        calls=1,
        peak=12 * GIB,
        resident=0,
        hbm=int(15.75 * GIB),
        flops=2e15,
        collectives={"all-gather": 3 * GIB, "all-reduce": GIB},
        dynamic=False,
        seconds=1.0,
        fingerprint="f",
    )
    return dataclasses.replace(base, **changes)


def test_what_a_report_adds_up():
    update = report()
    assert update.temporaries == 5 * GIB and update.used == 12 * GIB and update.fits
    rollout = report(program=Program.DECODE, cache=3 * GIB, resident=4 * GIB, peak=11 * GIB)
    assert rollout.temporaries == 5 * GIB and rollout.used == 15 * GIB and rollout.fits
    assert not dataclasses.replace(rollout, peak=12 * GIB).fits
    sums = report(program=Program.GRADIENTS, gradients=2 * GIB, resident=4 * GIB, peak=11 * GIB)
    assert sums.temporaries == 6 * GIB and sums.used == 15 * GIB
    # a GiB of the parameters is not trained: the step never sees it
    step = report(gradients=GIB, batch=0, resident=GIB, peak=7 * GIB)
    assert step.temporaries == GIB and step.used == 8 * GIB


def test_a_report_comes_back_from_its_line():
    kept = report(program=Program.EXTEND)
    again = ProgramReport.from_json(kept.to_json())
    assert again == kept and again.program.samples


def test_the_table_has_a_row_per_program():
    dynamic = report(collectives={"all-gather": GIB}, dynamic=True)
    rows = fits.table_rows([report(), report(peak=16 * GIB), dynamic, report(collectives={})])
    assert [row["fits"] for row in rows] == ["fits", "NO", "fits", "fits"]
    assert [row["received"] for row in rows] == ["4", "4", "1/token", "-"]
    assert rows[0]["temporaries"] == "5"
    assert fits.collective_lines(report()) == "update: all-gather 3, all-reduce 1 GiB"
    assert fits.collective_lines(report(collectives={})) == "update: none GiB"


def choices(config, program, **sizes):
    return [fields for fields, _ in fits.variants(config, program, **sizes)]


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
    _, last = list(fits.variants(config, Program.UPDATE, ways=16, hosts=4))[-1]
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

    assert fits.advise(config, Program.DECODE, 4, 1, attempt) == {"rl.rollout_prompts": 8}
    assert tried == [64, 32, 16, 8]
    too_large = report(peak=99 * GIB)
    assert fits.advise(config, Program.DECODE, 4, 1, lambda other: too_large) is None


def test_what_a_refusal_says():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.29G) exceeds available HBM."
    )
    assert fits.refused_bytes(message) == int(17.29 * GIB)
    assert fits.refused_bytes("INTERNAL: something else") is None


@pytest.fixture
def measured(monkeypatch):
    """Stands in for compiling: what it was asked for, and memory as the choice asks."""
    asked = []

    def measure(programs, program, wanted, effort):
        asked.append((program, programs.config.rl.rollout_prompts))
        prompts = programs.config.rl.rollout_prompts or programs.config.train.batch_size
        return report(program=program, peak=prompts * 4 * GIB, effort=effort)

    monkeypatch.setattr(fits, "measure", measure)
    return asked


def told(config, *programs, effort="low", smaller=True, kept=None):
    keep = (kept if kept is not None else []).append
    return fits.plan(config, programs, SLICE, jax.devices()[:1], effort, smaller, keep)


def test_a_plan_tries_smaller_choices_and_says_which_fits(measured):
    config = load("stage2", "smoke")  # 4 prompts
    kept = []
    text = told(config, Program.DECODE, kept=kept)
    assert measured == [(Program.DECODE, 0), (Program.DECODE, 2)]
    assert "decode does not fit as configured; it fits with --config.rl.rollout_prompts=2" in text
    assert len(kept) == 2 and text.count("decode: all-gather") == 2
    text = told(config, Program.DECODE, smaller=False)
    assert "\n  NO" not in text and measured[2:] == [(Program.DECODE, 0)]


@pytest.mark.parametrize("effort, note", [("low", "as far as low effort tells"), ("default", "")])
def test_a_plan_of_what_fits_says_so(measured, effort, note):
    config = load("stage2", "smoke")
    config.rl.rollout_prompts = 2
    last = told(config, Program.DECODE, effort=effort).splitlines()[-1]
    assert last.startswith("fits") and note in last


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (extra tpu)"
)


@needs_compiler
def test_a_shortened_7b_compiles_for_a_v5e_slice(monkeypatch):
    """Two layers, true widths: the update that the trainer runs, with the Pallas attention, fits 16
    chips of 16 GB.
    """
    from mmrecoder_jax.config import model_config
    from mmrecoder_jax.models.config import preset

    short = dataclasses.replace(preset("7b").vision, depth=2, fullatt_block_indexes=(1,))

    def shortened(config):
        return dataclasses.replace(model_config(config), num_layers=2, vision=short)

    monkeypatch.setattr("mmrecoder_jax.planner.programs.model_config", shortened)
    config = load("stage2", "paper")
    config.data.lengths = (1024,)
    programs = Programs(config, topology.devices(SLICE))
    assert "tpu_custom_call" in programs.lower(Program.GRADIENTS).as_text()
    found = fits.measure(programs, Program.GRADIENTS, SLICE, "low")
    assert found.fits and found.peak > found.arguments > found.params > 0
    assert found.resident == found.optimizer
    assert found.collectives["all-gather"] > 0 and not found.dynamic
    again = fits.measure(programs, Program.GRADIENTS, SLICE, "low", known=[found])
    assert again == found
    step = fits.measure(programs, Program.UPDATE, SLICE, "low")
    assert step.fits and step.temporaries < found.temporaries

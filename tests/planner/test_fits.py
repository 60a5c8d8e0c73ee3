"""What fits: the sums of a report, the table, what is compiled and what is counted."""

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
    assert [row["by"] for row in rows] == ["low, 1 s"] * 4
    assert fits.collective_lines(report()) == "update: all-gather 3 GiB, all-reduce 1 GiB"
    assert fits.collective_lines(dynamic).endswith("1 GiB per token (the loop counts as one turn)")
    assert fits.collective_lines(report(collectives={})) == "update: nothing"
    refused = report(collectives={}, peak=99 * GIB)
    assert fits.collective_lines(refused) == "update: unknown, as it does not fit"


def test_what_a_refusal_says():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.29G) exceeds available HBM."
    )
    assert fits.refused_bytes(message) == int(17.29 * GIB)
    assert fits.refused_bytes("INTERNAL: something else") is None


def test_what_a_program_reads_alone_is_too_much_without_a_compiler(monkeypatch):
    """The 7B's optimizer on one chip: nothing is lowered, nothing compiled."""
    monkeypatch.setattr(Programs, "lower", lambda *args: pytest.fail("lowered"))
    programs = Programs(load("stage2", "paper"), jax.devices()[:1])
    found = fits.measure(programs, Program.UPDATE, topology.parse("v5e-1"), "low")
    assert not found.fits and found.effort == fits.COUNTED and not found.collectives
    assert found.used == found.arguments + found.resident
    assert fits.table_rows([found])[0]["by"] == "counting"


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (extra tpu)"
)


@pytest.fixture
def shortened(monkeypatch):
    """Two layers of the 7B's widths."""
    from mmrecoder_jax.config import model_config
    from mmrecoder_jax.models.config import preset

    short = dataclasses.replace(preset("7b").vision, depth=2, fullatt_block_indexes=(1,))

    def sizes(config):
        return dataclasses.replace(model_config(config), num_layers=2, vision=short)

    monkeypatch.setattr("mmrecoder_jax.planner.programs.model_config", sizes)


@needs_compiler
def test_decoding_leaves_the_cache_where_it_is(shortened):
    """A token is written into the layout that the cache has: no second cache is laid out."""
    config = load("stage2", "paper")
    config.rl.rollout_prompts = 32
    programs = Programs(config, topology.devices(SLICE))
    found = fits.measure(programs, Program.DECODE, SLICE, "low")
    assert found.cache > 2**29 and found.temporaries < 0.6 * found.cache


@needs_compiler
def test_a_shortened_7b_compiles_for_a_v5e_slice(shortened):
    """The update that the trainer runs, with the Pallas attention, fits 16 chips of 16 GB."""
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

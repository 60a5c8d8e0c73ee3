"""What fits: the table, the smaller choices, and real programs where the TPU compiler is
installed.
"""

import dataclasses
import importlib.util
import subprocess
import sys

import jax
import pytest

from mmrecoder_jax import memory
from mmrecoder_jax.config import load
from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.programs import Programs, model_flops

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (extra tpu)"
)
GIB = 2**30


def report(**changes) -> memory.Report:
    base = memory.Report(
        slice="v5e-16",
        chips=16,
        preset="7b",
        lora=0,
        stage="stage2",
        program="update",
        mesh="1x16x1",
        rows=16,
        length=12288,
        remat="full",
        batch=GIB,
        gradients=0,
        calls=1,
        peak=12 * GIB,
        effort="low",
        params=2 * GIB,
        optimizer=4 * GIB,
        cache=0,
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
    rollout = report(program="decode", cache=3 * GIB, resident=4 * GIB, peak=11 * GIB)
    assert rollout.temporaries == 5 * GIB and rollout.used == 15 * GIB and rollout.fits
    assert not dataclasses.replace(rollout, peak=12 * GIB).fits
    gradients = report(program="gradients", gradients=2 * GIB, resident=4 * GIB, peak=11 * GIB)
    assert gradients.temporaries == 6 * GIB and gradients.used == 15 * GIB
    # a GiB of the parameters is not trained: the step never sees it
    step = report(gradients=GIB, batch=0, resident=GIB, peak=7 * GIB)
    assert step.temporaries == GIB and step.used == 8 * GIB


def test_the_table_shows_a_row_a_program():
    rows = memory.table_rows(
        [report(), report(peak=16 * GIB), report(collectives={"all-gather": GIB}, dynamic=True)]
    )
    assert [row["fits"] for row in rows] == ["fits", "NO", "fits"]
    assert (
        rows[0]["temporaries"] == "5"
        and rows[0]["received"] == "4"
        and rows[2]["received"] == "1/token"
    )
    assert memory.collective_lines(report()) == "update: all-gather 3, all-reduce 1 GiB"


def test_smaller_choices_of_an_update_end_at_a_row_a_device_and_a_key_head_a_device():
    config = load("stage2", "paper")
    config.model.remat = "dots"
    config.train.micro_batch_size = 64
    steps = [fields for fields, _ in memory.variants(config, "gradients", ways=16, hosts=4)]
    assert steps == [
        {"model.remat": "full"},
        {"model.remat": "full", "train.micro_batch_size": 32},
        {"model.remat": "full", "train.micro_batch_size": 16},
        {"model.remat": "full", "train.micro_batch_size": 8, "mesh.tensor": 2},
        {"model.remat": "full", "train.micro_batch_size": 4, "mesh.tensor": 4},
    ]
    last = list(memory.variants(config, "update", ways=16, hosts=4))[-1][1]
    assert (last.model.remat, last.train.micro_batch_size, last.mesh.tensor) == ("full", 4, 4)
    assert config.train.micro_batch_size == 64


def test_smaller_choices_of_a_rollout_are_fewer_prompts_at_once():
    config = load("stage2", "paper")
    steps = [
        fields["rl.rollout_prompts"]
        for fields, _ in memory.variants(config, "decode", ways=16, hosts=4)
    ]
    assert steps == [64, 32, 16]


def test_advice_is_the_first_choice_that_fits():
    config = load("stage2", "paper")
    tried = []

    def attempt(other):
        tried.append(other.rl.rollout_prompts)
        return report(peak=other.rl.rollout_prompts * GIB)

    fields, reports = memory.advise(config, "decode", 4, 1, attempt)
    assert fields == {"rl.rollout_prompts": 8} and tried == [64, 32, 16, 8] and len(reports) == 4
    assert memory.advise(config, "decode", 4, 1, lambda other: report(peak=99 * GIB))[0] == {}


def test_what_a_refusal_says():
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.29G) exceeds available HBM."
    assert memory._exhausted(message) == int(17.29 * GIB)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        memory._exhausted("INTERNAL: something else")


def test_flops_of_a_model_by_hand():
    """One update of the tiny preset on this machine's device, counted in another way: weights times
    two, three passes.
    """
    config = load("stage2", "smoke")
    programs = Programs(config, jax.devices()[:1])
    sizes = {
        "/".join(k.key for k in path): x.size
        for path, x in jax.tree_util.tree_leaves_with_path(programs.params)
    }
    text = (
        sum(n for name, n in sizes.items() if "model/layers" in name and name.endswith("kernel"))
        + sizes["model/embed_tokens/weight"]
    )
    vision = sum(
        n
        for name, n in sizes.items()
        if name.startswith("visual") and name.endswith("kernel") and "merger" not in name
    )
    merger = sum(n for name, n in sizes.items() if "merger" in name and name.endswith("kernel"))
    c, v = programs.sizes, programs.sizes.vision
    shape, patches = programs.shape, programs.windows * v.window_patches
    tokens = shape.rows * 264 * (2 * text + c.num_layers * 4 * 128 * 264 / 2)
    images = (
        shape.images
        * patches
        * (2 * vision + 2 * merger / 4 + 4 * 96 * (patches + v.window_patches))
    )
    assert (
        programs.micro_batches
        == config.train.batch_size * config.rl.group // config.train.micro_batch_size
        == 2
    )
    assert model_flops(programs, "gradients") == pytest.approx(3 * (tokens + images), rel=1e-6)
    assert model_flops(programs, "update") == 0  # the optimizer's step alone


def test_programs_are_those_of_the_trainer():
    """Lowered for shapes alone on this machine's device; what they would run on is no matter."""
    programs = Programs(load("stage1", "smoke"), jax.devices()[:1])
    assert programs.sampler_rows == {"prefill": 4, "extend": 4, "decode": 16}
    state = programs.sampler_state(16)
    assert state.cache["k"].shape == (3, 16, 2, 40 + 32 + 80 + 32, 32)
    assert [
        programs.reads(name, "visual/merger/ln_q/weight")
        for name in ("extend", "decode", "gradients")
    ] == [True, False, True]
    assert "while" in programs.decode().as_text()
    assert programs.gradients().out_info and programs.update().out_info
    frozen = load("stage1", "smoke")
    frozen.model.freeze_vision = True
    assert Programs(frozen, jax.devices()[:1]).micro_batch()["features"].shape == (4, 48, 128)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--topology=v9-8", "no TPU slice 'v9-8'"),
        ("--programs=train", "stage2 has prefill, extend, decode, gradients, update"),
        ("--config.lora.rnk=3", "no such field: config.lora.rnk; did you mean lora.rank"),
    ],
)
def test_the_command_says_what_is_wrong(flag, message):
    command = [
        sys.executable,
        "-m",
        "mmrecoder_jax.memory",
        "--config=configs/stage2.py:tiny",
        "--topology=v5e-8",
        flag,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@needs_compiler
def test_a_shortened_7b_compiles_for_a_v5e_slice(monkeypatch):
    """Two layers, true widths: the update that the trainer runs, with the Pallas attention, fits 16
    chips of 16 GB.
    """

    def shortened(config):
        return dataclasses.replace(full(config), num_layers=2, vision=short)

    monkeypatch.setattr("mmrecoder_jax.planner.programs.model_config", shortened)
    from mmrecoder_jax.config import model_config as full
    from mmrecoder_jax.models.config import preset

    short = dataclasses.replace(preset("7b").vision, depth=2, fullatt_block_indexes=(1,))
    config = load("stage2", "paper")
    config.data.lengths = (1024,)
    wanted = topology.parse("v5e-16")
    programs = Programs(config, topology.devices(wanted))
    assert "tpu_custom_call" in programs.gradients().as_text()
    found = memory.measure(programs, "gradients", wanted, "low")
    assert (
        found.fits
        and found.peak > found.arguments > found.params > 0
        and found.resident == found.optimizer
    )
    assert found.collectives["all-gather"] > 0 and not found.dynamic
    step = memory.measure(programs, "update", wanted, "low")
    assert step.fits and step.temporaries < found.temporaries

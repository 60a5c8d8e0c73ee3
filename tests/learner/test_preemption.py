"""SIGTERM: what is saved, what the process ends with, and that it never hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmrecoder_jax.config import Preempted
from mmrecoder_jax.learner import preemption
from tests.conftest import train_command
from tests.test_loop import kernel, run, stage_in, unchecked  # noqa: F401

ENDS = """
import contextlib, sys, time
from mmrecoder_jax.command import ending_in_one_line
from mmrecoder_jax.learner import preemption
with ending_in_one_line():
    preemption.listen({grace})
    stage = preemption.training() if {trains} else contextlib.nullcontext()
    with stage:
        print("ready", flush=True)
        {work}
"""


def process(work, trains=True, grace=30.0):
    started = subprocess.Popen(
        [sys.executable, "-c", ENDS.format(work=work, trains=trains, grace=grace)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout.readline() == "ready\n"
    return started


def test_outside_of_a_stage_the_process_ends_at_once():
    told = process("time.sleep(60)", trains=False)
    told.send_signal(signal.SIGTERM)
    _, err = told.communicate(timeout=20)
    assert told.returncode == 75
    assert err == "preempted: the same command goes on where it stopped\n"


def test_a_stage_hears_it_after_its_step():
    told = process("time.sleep(0.5); print(preemption.is_asked(), flush=True)")
    told.send_signal(signal.SIGTERM)
    out, err = told.communicate(timeout=20)
    assert out == "True\n" and told.returncode == 75
    # also where it came behind the last step: nothing else begins
    assert err == "preempted: the same command goes on behind this stage\n"


def test_a_second_one_ends_the_process():
    told = process("time.sleep(60); time.sleep(60)")
    told.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    told.send_signal(signal.SIGTERM)
    assert told.wait(timeout=10) == 143


def test_a_step_that_does_not_end_in_time_is_ended():
    # inside C, where no handler of Python runs
    work = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)"
    told = process(work, grace=0.5)
    told.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert told.wait(timeout=20) == 143 and time.monotonic() - began < 10


@pytest.fixture
def asked(monkeypatch):
    """Becomes true where a test says so."""
    said = []
    monkeypatch.setattr(preemption, "is_asked", lambda: bool(said))
    return said


def preempted_at(step, stage, asked, **how):
    """Runs a stage that hears of it in this step; what it said."""
    count = iter(range(1, 100))
    check = preemption.is_asked

    def is_asked():
        if next(count) == step:
            asked.append(True)
        return check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption, "is_asked", is_asked)
        with pytest.raises(Preempted) as found:
            run(stage, range(0), **how)
    asked.clear()
    return str(found.value)


def test_the_step_is_saved_and_a_resumed_run_equals_an_uninterrupted_one(tmp_path, asked):
    whole = run(stage_in(tmp_path / "whole", 6), range(0))
    stage = stage_in(tmp_path / "parts", 6)  # saves every second step
    said = preempted_at(3, stage, asked)
    assert "from step 3, which is saved in" in said and str(tmp_path / "parts") in said
    assert os.path.isdir(tmp_path / "parts" / "checkpoints" / "3")
    resumed = run(stage, range(0))
    np.testing.assert_array_equal(kernel(resumed), kernel(whole))
    rows = [
        [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1] == [1, 2, 3, 4, 5, 6]


def test_a_step_after_a_skipped_update_is_not_saved(tmp_path, asked):
    stage = stage_in(tmp_path, 6)
    count = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption, "is_asked", lambda: next(count) == 3)
        with pytest.raises(Preempted, match="from the newest checkpoint in"):
            run(stage, range(3, 4))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2"]


def test_where_later_rollouts_are_drawn_already_only_a_due_checkpoint_is_saved(tmp_path, asked):
    stage = stage_in(tmp_path, 6)
    with stage.config.unlocked():
        stage.config.rl = {"ahead": 1, "partial": 0, "max_logp_gap": 1.0}
    assert "from the newest checkpoint in" in preempted_at(3, stage, asked)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2"]
    assert "from step 4, which is saved" in preempted_at(2, stage, asked)  # steps 3 and 4


def test_the_last_step_is_saved_before_the_process_ends(tmp_path, asked):
    stage = stage_in(tmp_path, 3)
    assert "from step 3, which is saved" in preempted_at(3, stage, asked)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]


@pytest.mark.slow  # trains two stages
@pytest.mark.parametrize("name, steps", [("sft_chart2code", 80), ("stage1", 8)])
def test_a_stage_that_is_told_saves_and_goes_on(name, steps, smoke_run, tmp_path):
    flags = [f"--config.data.dir={smoke_run.workdir}/data", "--config.checkpoint.every=100"]
    flags += [f"--config.train.steps={steps}", "--config.train.log_every=1"]
    if name == "stage1":
        flags.append(f"--config.init_from={smoke_run.workdir}/sft_self_correction")
    command = train_command(name, str(tmp_path / "run"), *flags)
    told = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in told.stdout:
        if f" step 2/{steps} " in line:
            told.send_signal(signal.SIGTERM)
            break
    out, err = told.communicate(timeout=120)
    assert told.returncode == 75, out + err
    assert err.startswith("preempted: the same command goes on from step ")
    saved = os.listdir(tmp_path / "run" / "checkpoints")
    assert len(saved) == 1 and 2 <= int(saved[0]) < steps
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, steps + 1))
    assert not list(Path(tmp_path / "run").glob("*.tmp"))

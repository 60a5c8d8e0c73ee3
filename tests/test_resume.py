"""Killed with SIGKILL in the middle and started again, a stage ends with the parameters of a run that was never interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmrecoder_jax.checkpoint import latest_step
from mmrecoder_jax.metrics import read_metrics


def command(config, workdir, *flags):
    return [sys.executable, "-m", "mmrecoder_jax.train", f"--config=configs/{config}:smoke", f"--workdir={workdir}", *flags]


def run(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_and_kill(at, *arguments):
    """Kills the process as soon as its output matches `at`."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if re.search(at, line):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait(60) == -signal.SIGKILL


def parameters(workdir):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(os.path.join(workdir, "checkpoints", str(latest_step(workdir)), "params"))
    return jax.tree.leaves(tree)


def assert_same(first, second, stage):
    for a, b in zip(parameters(first), parameters(second), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [
        [(r["step"], r["loss"]) for r in read_metrics(os.path.join(w, "metrics.jsonl")) if r["stage"] == stage] for w in (first, second)
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == sorted({step for step, _ in rows[0]})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def sft(base):
    whole = os.path.join(base, "sft_whole")
    run("sft_chart2code.py", whole)
    return whole


def test_sft(base, sft):
    killed, flag = os.path.join(base, "sft_killed"), f"--config.data.dir={sft}/data"
    steps = json.loads(Path(sft, "config.json").read_text())["train"]["steps"]
    run_and_kill(rf"step {steps // 2 + 2}/", "sft_chart2code.py", killed, flag, "--config.train.log_every=1")
    assert 0 < latest_step(killed) < steps
    run("sft_chart2code.py", killed, flag, "--config.train.log_every=1")
    assert_same(sft, killed, "sft_chart2code")


def test_rl_stage(base, sft):
    whole, killed = os.path.join(base, "rl_whole"), os.path.join(base, "rl_killed")
    flags = (f"--config.data.dir={sft}/data", f"--config.init_from={sft}", "--config.checkpoint.every=1", "--config.train.log_every=1")
    run("stage2.py", whole, *flags)
    run_and_kill(r"stage2 step 2/", "stage2.py", killed, *flags)
    assert 0 < latest_step(killed) < 3
    out = run("stage2.py", killed, *flags)
    assert "step 1/" not in out
    assert_same(whole, killed, "stage2")
    moved = [np.abs(a - b).max() for a, b in zip(parameters(sft), parameters(whole), strict=True)]
    assert max(moved) > 0, "the stage changed nothing: resuming it proves nothing"

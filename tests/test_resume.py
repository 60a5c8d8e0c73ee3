"""Killed with SIGKILL in the middle and started again, a stage ends with the parameters of a run
that was never interrupted.

The uninterrupted run is that of the smoke pipeline, so this also shows that a stage alone does what
it does inside the pipeline.
"""

import os
import platform
import re
import signal
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmrecoder_jax.learner.checkpoint import latest_step
from mmrecoder_jax.monitoring.metrics import read_metrics
from tests.conftest import train_command


def run(*arguments, **variables):
    """What a command prints; `variables` are of its environment."""
    done = subprocess.run(
        train_command(*arguments),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_and_kill(at, *arguments, **variables):
    """Kills the process as soon as its output matches `at`."""
    process = subprocess.Popen(
        train_command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **variables},
    )
    for line in process.stdout:
        if re.search(at, line):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait(60) == -signal.SIGKILL


def parameters(workdir):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(
            os.path.join(workdir, "checkpoints", str(latest_step(workdir)), "params")
        )
    return jax.tree.leaves(tree)


def assert_same(first, second, stage):
    for a, b in zip(parameters(first), parameters(second), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [
        [
            (r["step"], r["loss"])
            for r in read_metrics(os.path.join(w, "metrics.jsonl"))
            if r["stage"] == stage
        ]
        for w in (first, second)
    ]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == list(range(1, len(rows[0]) + 1))


@pytest.mark.slow
def test_sft(smoke_run, tmp_path):
    whole, killed = os.path.join(smoke_run.workdir, "sft_chart2code"), str(tmp_path / "killed")
    flags = (f"--config.data.dir={smoke_run.workdir}/data", "--config.train.log_every=1")
    run_and_kill(r"step 27/", "sft_chart2code", killed, *flags)
    assert latest_step(killed) == 20
    run("sft_chart2code", killed, *flags)
    assert_same(whole, killed, "sft_chart2code")


def test_rl_stage(smoke_run, tmp_path):
    whole, killed = os.path.join(smoke_run.workdir, "stage2"), str(tmp_path / "killed")
    before = os.path.join(smoke_run.workdir, "stage1")
    flags = (f"--config.data.dir={smoke_run.workdir}/data", f"--config.init_from={before}")
    run_and_kill(r"stage2 step 2/", "stage2", killed, *flags)
    assert 0 < latest_step(killed) < 3
    assert "step 1/" not in run("stage2", killed, *flags)
    assert_same(whole, killed, "stage2")
    moved = [
        np.abs(a - b).max() for a, b in zip(parameters(before), parameters(whole), strict=True)
    ]
    assert max(moved) > 0, "the stage changed nothing: resuming it proves nothing"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its kinds of CPU are told by a flag")
def test_another_kind_of_device(smoke_run, tmp_path):
    """A run that a CPU without wide vectors began goes on: it rounds otherwise, and none of its
    compiled programs is taken."""
    whole, killed = os.path.join(smoke_run.workdir, "sft_chart2code"), str(tmp_path / "killed")
    flags = (f"--config.data.dir={smoke_run.workdir}/data", "--config.train.log_every=1")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    narrow = cache | {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2"}
    run_and_kill(r"step 27/", "sft_chart2code", killed, *flags, **narrow)
    begun = read_metrics(os.path.join(killed, "metrics.jsonl"))
    run("sft_chart2code", killed, *flags, **cache)
    rows = read_metrics(os.path.join(killed, "metrics.jsonl"))
    whole_rows = read_metrics(os.path.join(whole, "metrics.jsonl"))
    losses = [[row["loss"] for row in found] for found in (begun[:20], rows[:20], whole_rows[:20])]
    assert losses[0] == losses[1] != losses[2], "the other kind rounded alike: it proves nothing"
    assert [row["step"] for row in rows] == [row["step"] for row in whole_rows]
    for a, b in zip(parameters(whole), parameters(killed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert begun[0]["compiles/update"] == rows[20]["compiles/update"] == 1
    assert "compiles/cached" not in rows[20]


@pytest.mark.slow
def test_rollouts_that_are_ahead(smoke_run, tmp_path):
    """Nothing is in flight where a checkpoint is, so nothing is lost with the process."""
    before = os.path.join(smoke_run.workdir, "stage1")
    flags = [f"--config.data.dir={smoke_run.workdir}/data", f"--config.init_from={before}"]
    flags += ["--config.train.steps=6", "--config.checkpoint.every=3", "--config.rl.ahead=1"]
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    run("stage2", whole, *flags)
    rows = read_metrics(os.path.join(whole, "metrics.jsonl"))
    late = [row["rollout/staleness"] for row in rows]
    assert late == [0, 1, 1, 0, 1, 1], "nothing was late: resuming it proves nothing"
    assert all(0 < row["importance"] < 2 for row in rows)
    run_and_kill(r"stage2 step 5/", "stage2", killed, *flags)
    assert latest_step(killed) == 3
    run("stage2", killed, *flags)
    assert_same(whole, killed, "stage2")

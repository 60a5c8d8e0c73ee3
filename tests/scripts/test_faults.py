"""The script that breaks runs: what it takes for a phase and for a difference, and its page."""

import json
import os
import subprocess
import sys

import pytest

from tests.scripts.run import ROOT, run_script

sys.path.insert(0, str(ROOT / "scripts"))
import faults
import faults_lab

sys.path.remove(str(ROOT / "scripts"))


def stacks(*frames):
    """What faulthandler writes."""
    lines = [f'  File "/a/{file}.py", line 7 in {function}' for file, function in frames]
    return "\n".join(["Current thread 0x02 (most recent call first):", *lines]) + "\n"


TRAIN = ("mmrecoder_jax/grpo", "train")
ROLLOUT = ("rl/schedule", "go"), ("rl/rollout", "rollout"), TRAIN


@pytest.mark.parametrize(
    ("frames", "phase"),
    [
        ([("jax/stages", "call"), ("rl/sampler", "decode"), *ROLLOUT], "rollout"),
        ([("rl/schedule", "_await"), *ROLLOUT], "execution"),
        ([("learner/update", "__call__"), ("mmrecoder_jax/loop", "update"), TRAIN], "update"),
        ([("learner/checkpoint", "save"), ("mmrecoder_jax/loop", "finish"), TRAIN], "save"),
        ([("learner/checkpoint", "__exit__"), ("mmrecoder_jax/loop", "__exit__"), TRAIN], "save"),
        ([("learner/init", "read"), ("mmrecoder_jax/loop", "__enter__"), TRAIN], "start"),
        ([("rl/monitors", "record"), TRAIN], "other"),
        ([("mmrecoder_jax/prepare", "ensure_charts")], "start"),
    ],
)
def test_the_phase_is_read_from_the_thread_that_trains(frames, phase):
    assert faults_lab.phase_of(stacks(*frames)) == phase


def test_metrics_are_compared_without_what_belongs_to_a_process(tmp_path):
    row = {"stage": "stage2", "step": 1, "time": 3.0, "loss": 0.5, "x": None}
    more = {"seconds/step": 1.0, "env/requests": 7.0, "judge/requests": 7.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row | more) + "\n")
    assert faults_lab.metrics(tmp_path) == [{"stage": "stage2", "step": 1, "loss": 0.5, "x": None}]


def test_an_ending_keeps_our_own_line_and_counts_the_others():
    assert faults_lab.ending(0, "") == "status 0"
    assert faults_lab.ending(1, "\nerror: a\n") == "status 1: error: a"
    text = faults_lab.ending(1, "noise\nerror: a\nmore\n")
    assert text == "status 1: error: a (2 more lines of errors)"
    assert faults.short(text) == "status 1 with more than one line"


def test_processes_are_found_by_where_they_work(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], cwd=tmp_path, stdin=-1)
    try:
        (found,) = faults_lab.processes_in(tmp_path)
        assert found.startswith(f"{process.pid} ")
    finally:
        process.kill()
        process.communicate()
    assert faults_lab.processes_in(tmp_path) == []


def test_moments_are_the_same_for_the_same_seed_and_leave_time_between_them(tmp_path):
    lab = faults.Lab(tmp_path, tmp_path / "rows.jsonl", seed=0)
    drawn = [lab.moments("sigkill", 5, 4, number) for number in range(5)]
    assert drawn == [lab.moments("sigkill", 5, 4, number) for number in range(5)]
    assert drawn != [
        faults.Lab(tmp_path, tmp_path / "r", seed=1).moments("sigkill", 5, 4, n) for n in range(5)
    ]
    for moments in drawn:
        assert len(moments) == 4 and moments == sorted(moments)
        assert all(1 <= step <= faults_lab.STEPS and 0 <= part < 1 for step, part in moments)


def test_a_full_file_system_takes_nothing_more(tmp_path):
    if os.geteuid():
        pytest.skip("mounting needs root")
    with faults.mounted(tmp_path / "small", "size=1m"):
        faults.fill(tmp_path / "small" / "ballast")
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "small" / "more").write_bytes(bytes(1 << 17))


def test_the_page_is_what_the_rows_say(tmp_path):
    page = tmp_path / "faults.md"
    done = run_script("faults", f"--page={page}", f"--where={tmp_path}", "--only")
    assert done.returncode == 0, done.stderr
    assert page.read_text("utf-8") == (ROOT / "docs/faults.md").read_text("utf-8")


@pytest.mark.slow  # makes charts, first weights and an uninterrupted run
def test_a_killed_run_is_finished_and_equal(tmp_path):
    flags = (f"--where={tmp_path}", f"--jsonl={tmp_path / 'r'}", f"--page={tmp_path / 'p'}")
    done = run_script("faults", *flags, "--only", "sigkill-aimed", seconds=1500)
    assert done.returncode == 0, done.stderr
    for row in faults.read(tmp_path / "r"):
        assert row.differences == [] and row.left == [] and row.bytes > 1e6
        assert len(row.moments) == 2

"""`scripts/sweep.py` as a user runs it: flags, endings, what it prints and writes."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.scripts.run import ROOT, run_script
from tests.sweeping.sweeps import STUB

SWEEP = ("--sweep=config.reward.eta=0,0.1", "--sweep=config.seed=0,1")


@pytest.fixture
def flags(tmp_path, monkeypatch):
    (tmp_path / "first" / "checkpoints").mkdir(parents=True)
    monkeypatch.setenv("STUB", "{}")
    return [
        f"--config={ROOT}/configs/stage2.py:smoke",
        f"--workdir={tmp_path / 'eta'}",
        f"--config.init_from={tmp_path / 'first'}",
        f"--train={shlex.join(STUB)}",
    ]


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path, flags):
    done = run_script("sweep", *flags[:3], *SWEEP, "--dry_run", "--shard=1/2")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [words[:3] for words in lines] == [[sys.executable, "-m", "mmrecoder_jax.train"]] * 2
    assert [words[-2:] for words in lines] == [
        ["--config.reward.eta=0.1", f"--config.seed={seed}"] for seed in (0, 1)
    ]
    assert "--config=stage2:smoke" in lines[0]  # another machine has it elsewhere
    assert not (tmp_path / "eta").exists()


def test_a_failed_point_and_the_same_command_again(tmp_path, flags, monkeypatch):
    monkeypatch.setenv("STUB", json.dumps({"fail": {"eta-0.1_seed-1": 2}}))
    done = run_script("sweep", *flags, *SWEEP, "--retries=0", "--workers=2")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: 1 of 4 points failed: eta-0.1_seed-1: status 1: error: the stub broke: mend it "
        f"({tmp_path}/eta/eta-0.1_seed-1/output.txt); the same command tries them again"
    ]
    assert "1 failed" in done.stdout
    done = run_script("sweep", *flags, *SWEEP, "--last=1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "sweep: 3 of 4 points have finished before" in done.stdout
    assert "best (max): reward.eta=0.1, turn2/low_level 0.405" in done.stdout
    found = {path.name for path in (tmp_path / "eta").iterdir() if path.is_file()}
    pictures = {"sweep.png", "curves.png"}
    assert pictures | {"sweep.json", "table.txt", "table.csv", "points.csv"} <= found
    with open(tmp_path / "eta" / "points.csv", encoding="utf-8") as f:
        assert [row["state"] for row in csv.DictReader(f)] == ["finished"] * 4
    assert (tmp_path / "eta" / "table.txt").read_text() in done.stdout


def test_an_interrupted_sweep_ends_in_one_line(tmp_path, flags, monkeypatch):
    monkeypatch.setenv("STUB", json.dumps({"steps": 100, "pause": 0.1}))
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "sweep.py", *flags, *SWEEP],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "eta").glob("*/checkpoints/2")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "error: interrupted; the same command goes on where it stopped\n"
    assert "sweep: ending 1 runs" in out


def test_a_point_of_another_grammar_ends_the_sweep_before_it_begins(tmp_path, flags):
    """The grammar is that of a point, not that of the sweep."""
    data = {"kind": "synthetic", "grammar": "panels"}
    (tmp_path / "first" / "config.json").write_text(json.dumps({"data": data}))
    done = run_script("sweep", *flags, "--sweep=config.data.grammar=panels,words")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: data.grammar='words', but the policy of init_from=")
    assert not (tmp_path / "eta").exists()


def test_what_is_wrong_is_one_line(tmp_path, flags):
    done = run_script("sweep", *flags, "--sweep=config.rl.etta=0,1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --sweep=config.rl.etta=0,1: no such field")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "eta").exists()


@pytest.mark.slow  # draws charts and trains twice
def test_two_real_runs(tmp_path):
    flags = [
        "--config=sft_chart2code:smoke",
        f"--workdir={tmp_path / 'lr'}",
        "--config.train.steps=8",
        "--config.train.eval_every=4",
        "--sweep=config.optim.lr=1e-3,2e-3",
    ]
    done = run_script("sweep", *flags, seconds=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "best (min): optim.lr=" in done.stdout and "held_out_loss" in done.stdout
    assert len(list((tmp_path / "lr").glob("*/checkpoints/8"))) == 2
    assert not (tmp_path / "lr" / "lr-0.001" / "data").exists()  # both read the sweep's own
    again = run_script("sweep", *flags, seconds=900)
    assert "2 of 2 points have finished before" in again.stdout

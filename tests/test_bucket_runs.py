"""Whole runs in a bucket: killed, resumed on a machine that has nothing of them, and compared with
runs in a folder that were left alone.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from mmrecoder_jax.rl.schedule import TIMED
from tests.conftest import train_command
from tests.learner import processes

# What of a row of metrics is about time, or counted since the process began.
UNEQUAL = ("time", "seconds/", "env/", "env_", "judge/", "compiles/", *TIMED)


def trained(*command):
    done = subprocess.run(
        train_command(*command), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def killed(at, *command):
    """Starts a run and kills it when it says this."""
    run = subprocess.Popen(
        train_command(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = []
    for line in run.stdout:
        said.append(line)
        if at in line:
            break
    run.send_signal(signal.SIGKILL)
    run.stdout.read()
    assert run.wait() == -signal.SIGKILL, "".join(said)
    return "".join(said)


def rows(data):
    found = [json.loads(line) for line in data.decode().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(UNEQUAL)} for row in found]


def note(data):
    """What a checkpoint says of its arrays and of its place in the data."""
    found = json.loads(data)
    return {name: found[name] for name in ("checksums", "positions", "step", "steps")}


def same(cloud, name, folder, steps):
    """Compares a run in the bucket with one in a folder."""
    there = cloud.below(f"runs/{name}/")
    here = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and not {".jax_cache", "lengths"} & set(path.parts)  # of the machine
    }
    assert rows(there["metrics.jsonl"]) == rows(here["metrics.jsonl"])
    assert [row["step"] for row in rows(there["metrics.jsonl"])] == list(range(1, steps + 1))
    meta = f"checkpoints/{steps}/meta/metadata"
    ours, theirs = note(there[meta]), note(here[meta])
    assert ours == theirs
    small = [n for n in there if not n.startswith("checkpoints/")]
    assert small == sorted(n for n in here if not n.startswith("checkpoints/"))
    for other in small:
        if other.startswith(("trajectories/", "data/", "tokenizer/", "dialogues/")):
            assert there[other] == here[other], other


@pytest.mark.slow  # trains four stages
def test_runs_in_a_bucket_equal_runs_in_a_folder(cloud, tmp_path, monkeypatch):
    sft = ("--config.train.steps=8", "--config.checkpoint.every=3", "--config.train.log_every=1")
    trained("sft_chart2code", str(tmp_path / "sft"), *sft)
    address = "gs://bucket/runs/sft"
    said = killed(" step 7/8 ", "sft_chart2code", address, *sft)
    assert "cache" not in said
    shutil.rmtree(os.environ["MMRECODER_CACHE"])  # another machine
    said = trained("sft_chart2code", address, *sft)
    assert f"done: {address}" in said and " step 3/8 " not in said
    same(cloud, "sft", tmp_path / "sft", 8)
    assert not list(Path.cwd().glob("gs:*"))

    rl = ("--config.train.steps=4", "--config.checkpoint.every=1", "--config.train.log_every=1")
    rl += ("--config.rl.trajectories_every=1",)
    local = tmp_path / "sft"
    weights = f"--config.init_from={local}", f"--config.data.dir={local}/data"
    trained("stage1", str(tmp_path / "stage1"), *rl, *weights)
    weights = f"--config.init_from={address}@8", f"--config.data.dir={address}/data"
    command = "stage1", "gs://bucket/runs/stage1", *rl, *weights
    killed(" step 3/4 ", *command)
    shutil.rmtree(os.environ["MMRECODER_CACHE"])
    trained(*command)
    same(cloud, "stage1", tmp_path / "stage1", 4)
    saved = json.loads(cloud.below("runs/stage1/")["config.json"])
    assert saved["init_from"] == f"{address}@8" and saved["data"]["dir"] == f"{address}/data"


@pytest.mark.slow  # trains two stages
@pytest.mark.parametrize("stage", ["sft_chart2code", "stage1"])
def test_two_processes_share_a_bucket(stage, cloud, tmp_path):
    flags = ["--config.train.steps=2", "--config.checkpoint.every=1", "--config.env.workers=1"]
    if stage == "stage1":
        flags.append("--config.rl.trajectories_every=1")
        trained("sft_chart2code", "gs://bucket/runs/sft", "--config.train.steps=1")
        flags += ["--config.init_from=gs://bucket/runs/sft"]
    command = train_command(stage, "gs://bucket/runs/two", *flags)
    processes.run([*command, "--config.train.steps=1"], 2)
    shutil.rmtree(os.environ["MMRECODER_CACHE"])
    processes.run(command, 2)
    there = cloud.below("runs/two/")
    assert [row["step"] for row in rows(there["metrics.jsonl"])] == [1, 2]
    for step in (1, 2):
        assert f"checkpoints/{step}/commit_success.txt" in there
        assert [name for name in there if name.startswith(f"checkpoints/{step}/data/process_1")]
    assert not [name for name in there if ".uploading" in name]
    if stage == "stage1":
        written = [json.loads(line) for line in there["trajectories/000002.jsonl"].splitlines()]
        pictures = {turn["render"] for row in written for turn in row["turns"]} - {None}
        pictures |= {row["target"] for row in written}
        assert pictures and all(f"trajectories/renders/{name}" in there for name in pictures)


@pytest.mark.slow  # starts five commands
def test_what_cannot_work_is_one_line_before_anything_is_built(cloud, tmp_path):
    def ended(*command):
        done = subprocess.run(
            train_command(*command), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1 and not done.stdout, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        return line

    run = "gs://bucket/runs/a"
    assert ended("stage1", "gs://no-bucket/a").startswith("error: gs://no-bucket/a: there is no")
    assert "name a folder in a bucket" in ended("stage1", "gs://bucket")
    assert "gs://BUCKET/PATH, or a local path" in ended("stage1", "s3://bucket/a")
    line = ended("stage1", run, "--config.init_from=gs://bucket/none")
    assert line.startswith("error: init_from: gs://bucket/none: there is nothing in the bucket")
    cloud.fault = lambda method, path, query: 403
    assert "this account may not do that" in ended("stage1", run)

"""The whole of the paper by one command, in its smallest size."""

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from mmrecoder_jax.config import RL_STAGES, STAGES
from mmrecoder_jax.data.sources import ChartDirectory, DialogueDirectory
from mmrecoder_jax.monitoring.metrics import read_metrics
from mmrecoder_jax.pipeline import has_finished
from tests.conftest import train_command


def test_every_stage_ran_and_was_evaluated(smoke_run):
    for stage in STAGES:
        directory = os.path.join(smoke_run.workdir, stage)
        rows = read_metrics(os.path.join(directory, "metrics.jsonl"))
        assert rows and all(row["stage"] == stage for row in rows)
        assert has_finished(stage, directory)
        with open(os.path.join(directory, "evaluation.json"), encoding="utf-8") as f:
            evaluated = json.load(f)
        assert {row["turn"] for row in evaluated} == {1, 2} and {
            row["policy"] for row in evaluated
        } == {stage}


def test_supervised_loss_falls(smoke_run):
    rows = read_metrics(os.path.join(smoke_run.workdir, "sft_chart2code", "metrics.jsonl"))
    assert rows[-1]["loss"] < 0.2 * rows[0]["loss"]


def test_rl_has_signal(smoke_run):
    for stage in ("stage1", "stage2"):
        rows = read_metrics(os.path.join(smoke_run.workdir, stage, "metrics.jsonl"))
        assert max(row["grad_norm"] for row in rows) > 0
        assert all(0 <= row["turn2/exec_rate"] <= 1 for row in rows)
        assert os.listdir(os.path.join(smoke_run.workdir, stage, "trajectories"))


def test_dialogues_gain(smoke_run):
    dialogues = DialogueDirectory(
        os.path.join(smoke_run.workdir, "sft_self_correction", "dialogues")
    )
    gains = [dialogues[i].gain for i in range(len(dialogues))]
    assert len(gains) > 10
    assert min(gains) >= 0  # a few drafts are left right, and nothing is gained
    assert sum(gain >= 0.02 for gain in gains) > len(gains) / 2


def test_splits_share_no_chart(smoke_run):
    codes = []
    for split in ("train", "val", "test"):
        charts = ChartDirectory(os.path.join(smoke_run.workdir, "data", split))
        codes.append({charts[i].code for i in range(len(charts))})
    assert not codes[0] & codes[1] and not codes[0] & codes[2] and not codes[1] & codes[2]


def test_it_ends_with_a_table_and_a_report(smoke_run):
    assert all(stage in smoke_run.output for stage in STAGES)
    assert has_finished("pipeline", smoke_run.workdir)
    path = smoke_run.output.split("report: ")[1].strip()
    with open(path, encoding="utf-8") as f:
        page = f.read()
    assert "not the paper" in page and "Training took" in page and page.count("<svg") > 20
    lists = [file.read_text() for file in Path(smoke_run.workdir, "report").rglob("list.js")]
    assert len(lists) >= len(STAGES) + 2 * 3  # evaluations, and steps of RL


def test_the_same_command_again_has_nothing_to_do(smoke_run):
    done = subprocess.run(
        train_command("pipeline", smoke_run.workdir),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert "step 1/" not in done.stdout and "report: " in done.stdout


def test_other_charts_than_asked_for_are_an_error(smoke_run):
    command = train_command("pipeline", smoke_run.workdir, "--config.data.train_count=97")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (
        done.returncode == 1
        and "holds other charts" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("phase", ["prefill", "decode", "execute", "score", "update"])
def test_progress_lines_split_the_time(smoke_run, phase):
    lines = [line for line in smoke_run.output.splitlines() if line.startswith("stage2 step")]
    assert lines and all("ETA" in line for line in lines)
    assert any(f"{phase} " in line for line in lines)


def test_nothing_of_the_update_is_compiled_after_the_first_step(smoke_run):
    for stage in STAGES:
        first, *later = read_metrics(f"{smoke_run.workdir}/{stage}/metrics.jsonl")
        assert any(name.startswith("compiles/") for name in first)  # or read from the cache
        assert not any("compiles/update" in row for row in later)
        assert all(0 < row["padding/update"] < 1 for row in (first, *later))


@pytest.mark.parametrize("stage", STAGES)
def test_a_trace_of_one_step_has_its_phases(smoke_run, stage):
    (path,) = Path(smoke_run.workdir, stage).glob("profile/**/perfetto_trace.json.gz")
    assert f"trace of step 2: {path}\n" in smoke_run.output
    names = {
        event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    }
    rollout = {"prefill", "decode", "score"} if stage in RL_STAGES else set()
    assert {"data", "update"} | rollout <= names

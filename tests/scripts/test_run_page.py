"""The page of a run, from the files of a run that was never made."""

import json

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.config import STAGES
from mmrecoder_jax.data.writers import ChartWriter
from tests.reporting.test_report import chart, evaluation_row
from tests.reporting.test_trajectories import SMALL
from tests.scripts.run import run_script


def trajectory(name, *scores):
    """Two turns that drew something with these scores; None crashed."""
    turns = [
        {
            "response": "```python\nplot()\n```",
            "status": "error" if score is None else "ok",
            "error": "",
            "render": None if score is None else "a.png",
            "scores": {"overall": score or 0.0},
            "reward": None,
        }
        for score in scores
    ]
    return {"chart": name, "turns": turns}


@pytest.fixture
def run(tmp_path):
    trajectories = [
        trajectory("gains", 0.5, 0.9),
        trajectory("loses", 0.5, None),
        trajectory("stays", 0.5, 0.5),
        trajectory("rounds", 0.5, 0.5 + 1e-9),
        trajectory("crashed", None, 1.0),  # not counted: its first turn does not execute
        trajectory("gains_less", 0.5, 0.6),
    ]
    for stage in STAGES:
        (tmp_path / stage).mkdir()
        rows = [evaluation_row(policy=stage)]
        (tmp_path / stage / "evaluation.json").write_text(json.dumps(rows))
    (tmp_path / "data").mkdir()
    writer = ChartWriter(tmp_path / "data" / "test", {})
    for row in trajectories:
        writer.add(chart(row["chart"]))
    writer.finish()
    directory = tmp_path / STAGES[-1] / "evaluation" / "test-greedy"
    (directory / "renders").mkdir(parents=True)
    (directory / "renders" / "a.png").write_bytes(SMALL)
    (directory / "000000.jsonl").write_text("\n".join(map(json.dumps, trajectories)))
    return tmp_path


def test_a_table_of_all_stages_and_a_picture_of_four_trajectories(run):
    done = run_script("run_page", f"--run={run}", f"--picture={run / 'page.png'}")
    assert done.returncode == 0, done.stderr
    head, _, *body = done.stdout.splitlines()
    assert head.startswith("| policy | set | decoding | turn | exec | low-level |")
    assert [line.split(" | ")[0] for line in body] == [f"| {stage}" for stage in STAGES]
    with Image.open(run / "page.png") as image:
        assert image.size == (900, 930)  # 6 by 4 * 1.55 inches: one row per trajectory
        assert np.asarray(image.convert("L")).min() < 128  # something is written on it


def test_an_unfinished_run_is_named(run):
    (run / STAGES[1] / "evaluation.json").unlink()
    done = run_script("run_page", f"--run={run}", f"--picture={run / 'page.png'}")
    assert done.returncode == 1 and "is no finished pipeline run" in done.stderr


def test_a_missing_flag_and_a_word_that_is_none_are_one_line(run):
    done = run_script("run_page", f"--run={run}")
    assert done.stderr == "error: give --picture: PNG file to write\n" and done.returncode == 1
    done = run_script("run_page", "--picture=a.png", "runs/tiny")
    assert done.stderr.startswith("error: unexpected argument 'runs/tiny'")

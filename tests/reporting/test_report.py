"""A run's report from the files that a run leaves: evaluation rows, metrics, trajectories."""

import json

import pytest
from ml_collections import ConfigDict

from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.data.writers import ChartWriter
from mmrecoder_jax.env import Record
from mmrecoder_jax.reporting.report import trajectory_views, write_run_report
from tests.reporting.test_trajectories import SMALL

RECORD = Record(("Rain",), ((1, 1, 0, 0, 0, 0),), {"bar": 2}, ("bar--#FF0000",))
RESPONSE = "<think>bar</think>\n```python\nplot()\n```"


def chart(name):
    return Chart(name, SMALL, "plot()", RECORD, "Draw it.", "test", "CC0-1.0")


def write_trajectories(directory, step, names):
    """As `rl.trajectory` writes them: JSON lines, renders beside them."""
    (directory / "renders").mkdir(parents=True, exist_ok=True)
    (directory / "renders" / "a.png").write_bytes(SMALL)
    drawn = {
        "response": RESPONSE,
        "status": "ok",
        "error": "",
        "render": "a.png",
        "scores": {"text": 0.5, "overall": 0.75},
        "reward": 0.5,
    }
    crashed = drawn | {"status": "error", "error": "oh", "render": None, "reward": None}
    lines = [json.dumps({"chart": name, "turns": [drawn, crashed]}) for name in names]
    (directory / f"{step:06d}.jsonl").write_text("\n".join(lines) + "\n")


def test_views_are_of_the_newest_step_and_of_known_charts(tmp_path):
    write_trajectories(tmp_path, 4, ["old"])
    write_trajectories(tmp_path, 12, ["b", "gone", "a", "c"])
    charts = {name: chart(name) for name in ("a", "b", "c", "old")}
    views = trajectory_views(str(tmp_path), charts, limit=2)
    assert [view.id for view in views] == ["b", "a"]
    first, second = views[0].turns
    assert (first.code, first.render_png, first.overall, first.reward) == (
        *("plot()\n", SMALL),
        *(0.75, 0.5),
    )
    assert (second.ok, second.render_png, second.error) == (False, None, "oh")


@pytest.fixture
def run(tmp_path):
    """A run of two stages whose last one was evaluated on test charts."""
    (tmp_path / "data").mkdir()
    charts = ChartWriter(tmp_path / "data" / "test", {})
    charts.add(chart("a"))
    charts.finish()
    for stage in ("first", "last"):
        (tmp_path / stage).mkdir()
        row = {"stage": stage, "step": 1, "time": 0.0, "loss": 0.5}
        (tmp_path / stage / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_trajectories(tmp_path / "last" / "evaluation" / "test-greedy", 0, ["a"])
    return tmp_path


def evaluation_row(**changes):
    parts = ("overall", "text", "layout", "type", "color")
    row = {
        **{"policy": "last", "set": "test", "decoding": "greedy", "turn": 1},
        **{"exec_rate": 0.5, "low_level": 0.25, "low_level_ci": [0.125, 0.5]},
        **dict.fromkeys(parts, 0.25),
    }
    return row | changes


@pytest.mark.parametrize("size, banner", [("tiny", True), ("paper", False)])
def test_a_report_has_results_curves_and_trajectories(run, size, banner):
    config = ConfigDict({"size": size, "seed": 3, "model": {"preset": "tiny"}})
    config.update({"data": {"dir": "", "gallery": ""}, "eval": {"split": "test"}})
    path = write_run_report(str(run), config, ("first", "last"), [evaluation_row()])
    page = (run / "report.html").read_text("utf-8")
    assert path == str(run / "report.html")
    assert page.count("<h2>") == 4
    for title in ("Curves: first", "Curves: last", "Trajectories: last, test charts, greedy"):
        assert f"<h2>{title}</h2>" in page
    assert "25.0 [12.5, 50.0]" in page and "<dt>seed</dt><dd>3</dd>" in page
    assert ("about one million parameters" in page) == banner

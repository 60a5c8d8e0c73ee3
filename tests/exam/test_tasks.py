"""From the published files of each benchmark to charts with questions and records."""

import dataclasses
import json

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data import panels, synthetic
from mmrecoder_jax.data.build import build_synthetic
from mmrecoder_jax.data.chart2code_tasks import Level
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.exam.tasks import Benchmark, Question, evenly, prepare
from tests.data.test_benchmarks import CODE, chartx, write_image
from tests.data.test_chart2code_tasks import write as write_level
from tests.exam.test_scoring import GOLD

ENV = EnvConfig(workers=1, preload=("numpy", "matplotlib"))


def question(benchmark, data="", task="direct", **more):
    return Question(benchmark, str(data), task, more.pop("columns", {}), **more)


def chartmimic(root, *codes):
    for number, code in enumerate(codes):
        write_image(root / f"bar_{number}.png")
        (root / f"bar_{number}.py").write_text(code)
    return root


def test_chartmimic_direct_and_what_is_left_out(tmp_path):
    root = chartmimic(tmp_path / "data/direct_600", CODE, "1 / 0", CODE + "\n")
    (root / "bar_2.png").unlink()
    exam = prepare(question(Benchmark.CHARTMIMIC, tmp_path / "data"), tmp_path / "out", ENV)
    assert [exam.charts[i].id for i in range(len(exam.charts))] == ["bar_0"]
    assert exam.charts[0].record.texts == ("Rain",)
    assert exam.facts["bar_0"] == {"kind": "bar"} and exam.shows_target
    reasons = " ".join(entry.reason for entry in exam.left_out)
    assert "ZeroDivisionError" in reasons and "bar_2.png is not there" in reasons
    again = prepare(question(Benchmark.CHARTMIMIC, root), tmp_path / "out", ENV)
    assert again.digest == exam.digest
    (root / "bar_1.py").write_text(CODE)
    with pytest.raises(ConfigError, match=r"holds other charts.*name another"):
        prepare(question(Benchmark.CHARTMIMIC, root), tmp_path / "out", ENV)


def test_chartmimic_customized(tmp_path):
    chartmimic(tmp_path / "gold", GOLD, CODE)
    write_image(tmp_path / "figure.png", 9)
    rows = [
        {
            "ExampleID": i,
            "Task": "Customized Mimic",
            "Instruction": "Draw the rain.",
            "InputFigure": "figure.png",
            "GroundTruthFigureCode": f"gold/bar_{i}.py",
        }
        for i in range(2)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = question(Benchmark.CHARTMIMIC, tmp_path, "customized")
    exam = prepare(asked, tmp_path / "out", ENV)
    assert [exam.charts[i].id for i in range(len(exam.charts))] == ["bar_0"]
    assert exam.charts[0].instruction == "Draw the rain." and not exam.shows_target
    assert "Part 2: Data Preparation" in exam.left_out[0].reason
    with pytest.raises(ConfigError, match="its instructions are in rows"):
        prepare(question(Benchmark.CHARTMIMIC, tmp_path / "gold", "customized"), tmp_path, ENV)


@pytest.mark.parametrize("task", ["direct", "conditional"])
def test_plot2code(tmp_path, task):
    root = tmp_path / "data/python_matplotlib/test"
    write_image(root / "ground_truth_image_0.png")
    row = {"file_name": "ground_truth_image_0.png", "code": CODE, "instruction": "Some bars."}
    (root / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    exam = prepare(question(Benchmark.PLOT2CODE, tmp_path, task), tmp_path / "out", ENV)
    said = "Some bars.\n\n" if task == "conditional" else ""
    assert exam.charts[0].instruction == said + synthetic.INSTRUCTION


def test_chartx_keeps_what_its_judge_reads(tmp_path):
    write_image(tmp_path / "bar_chart/png/bar_87.png")
    (tmp_path / "ChartX.json").write_text(json.dumps([chartx("bar_87")]))
    exam = prepare(question(Benchmark.CHARTX, tmp_path), tmp_path / "out", ENV)
    facts = exam.facts["bar_chart-bar_87"]
    assert facts == {"kind": "bar_chart", "title": "Rain", "csv": "a \\t b \\n 1 \\t 2"}
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"ChartX\.json, other\.json; name one file"):
        prepare(question(Benchmark.CHARTX, tmp_path), tmp_path / "other", ENV)


def test_chart2code_shows_two_charts(tmp_path):
    write_level(tmp_path, Level.FIGURE)
    asked = question(Benchmark.CHART2CODE, tmp_path, "figure")
    exam = prepare(asked, tmp_path / "out", ENV)
    assert len(exam.charts[0].images) == 2 and not exam.shows_target
    with pytest.raises(ConfigError, match=r"there is no .*level2\.json"):
        prepare(question(Benchmark.CHART2CODE, tmp_path, "edit"), tmp_path / "other", ENV)


def test_the_question_may_be_worded_otherwise(tmp_path):
    root = chartmimic(tmp_path / "direct_600", CODE)
    asked = question(Benchmark.CHARTMIMIC, root, instruction="Draw!")
    assert prepare(asked, tmp_path / "out", ENV).charts[0].instruction == "Draw!"


def test_toys_are_made_on_the_spot_or_taken_from_a_run(tmp_path, pool):
    made = prepare(question(Benchmark.TINY, count=2), tmp_path / "out", ENV)
    assert len(made.charts) == 2 and made.style["dpi"] == synthetic.DPI
    with pytest.raises(ConfigError, match=r"holds other charts.*name another --out"):
        prepare(question(Benchmark.TINY, count=3), tmp_path / "out", ENV)
    run = tmp_path / "run"
    build_synthetic(run / "data/test", "test", 3, 0, pool)
    taken = prepare(question(Benchmark.TINY, run, count=2), tmp_path / "other", ENV)
    assert [taken.charts[i].id for i in range(2)] == ["test-000000", "test-000002"]
    assert taken.facts["test-000000"]["kind"] == "synthetic seed 0"
    assert not (tmp_path / "other").exists()
    gallery = prepare(question(Benchmark.GALLERY, run / "data/test"), tmp_path, ENV)
    assert len(gallery.charts) == 3


def test_toys_are_of_the_grammar_that_is_asked_for(tmp_path):
    asked = dataclasses.replace(question(Benchmark.TINY, count=2), grammar="panels")
    made = prepare(asked, tmp_path / "out", ENV)
    assert made.style["rc_params"]["axes.facecolor"] == panels.RC_PARAMS["axes.facecolor"]
    assert all("plt.GridSpec(" in made.charts[i].code for i in range(2))


@pytest.mark.parametrize(
    "asked, message",
    [
        (question(Benchmark.CHARTX, "."), None),
        (question(Benchmark.CHARTX), "--benchmark=chartx needs --data: the JSON list"),
        (question(Benchmark.GALLERY, "none"), "--data=none: no such file"),
        (question(Benchmark.CHARTX, ".", "edit"), "--task=edit: chartx has direct"),
        (question(Benchmark.CHART2CODE, ".", "level9"), "has direct, customize, figure, edit"),
        (
            question(Benchmark.CHARTMIMIC, ".", columns={"picture": "x"}),
            "chartmimic has no field 'picture'; use id, task, instruction, image, code",
        ),
        (question(Benchmark.CHARTX, ".", columns={"id": "x"}), "its files have fixed names"),
    ],
)
def test_words_that_do_not_fit(tmp_path, monkeypatch, asked, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message or "none; name one file"):
        prepare(asked, tmp_path / "out", ENV)


def test_charts_are_evenly_spread():
    assert list(evenly(10, 3)) == [0, 4, 9]
    assert list(evenly(2, 3)) == list(evenly(2, 0)) == [0, 1]

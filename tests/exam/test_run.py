"""A run with a scripted author: scores, a kill halfway, other runs, an author that refuses."""

import dataclasses
import json

import numpy as np
import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.build import build_synthetic
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.env.execution import EnvConfig, Execution
from mmrecoder_jax.env.response import response_text
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.exam.journal import PREDICTIONS
from mmrecoder_jax.exam.others import Others
from mmrecoder_jax.exam.run import (
    LATEX,
    MARKDOWN,
    RESULTS,
    Run,
    answers_of_author,
    answers_of_others,
    go,
)
from mmrecoder_jax.exam.scoring import Rule
from mmrecoder_jax.exam.tasks import Benchmark, Exam, Question, prepare
from mmrecoder_jax.rl.rollout import refused_trajectory
from mmrecoder_jax.rl.trajectory import Trajectory, Turn

ENV = EnvConfig(workers=1, preload=("numpy", "matplotlib"))
COUNT = 4


class Killed(Exception):
    pass


@dataclasses.dataclass
class Scripted:
    """Writes the right code in its second turn, another title in its first; refuses one chart."""

    kill_after: int = 10**6
    refuses: int = -1
    asked: list = dataclasses.field(default_factory=list)
    name: str = "scripted"

    def answer(self, charts, *, turns, samples=1, temperature=0.0, seed=0, numbers=None):
        for number in numbers if numbers is not None else range(len(charts)):
            for sample in range(samples):
                if len(self.asked) == self.kill_after:
                    raise Killed
                self.asked.append((number, sample))
                yield number, sample, self.trajectory(charts[number], number, turns)

    def trajectory(self, chart, number, turns):
        if number == self.refuses:
            return refused_trajectory(chart, number, "too large", turns)
        wrong = chart.code.replace("set_title(", "set_title('Not ' + ")
        texts = [response_text("Fix text.", chart.code)] * turns
        texts[0] = response_text("plot, 1 series", wrong)
        return Trajectory(chart, number, (), tuple(turn(text) for text in texts))


def turn(text):
    nothing = np.zeros(0, np.float32)
    return Turn(
        ids=nothing.astype(np.int32),
        logps=nothing,
        finished=True,
        text=text,
        execution=Execution(Status.OK),
        scores=Scores(),  # a run scores by itself
        format=1.0,
    )


@pytest.fixture(scope="module")
def exam(tmp_path_factory, pool):
    directory = tmp_path_factory.mktemp("charts") / "test"
    build_synthetic(directory, "test", COUNT, 0, pool)
    return prepare(Question(Benchmark.TINY, str(directory), "direct", {}), directory, ENV)


def run_of(exam: Exam, out, **changes) -> Run:
    settings = {"author": {"author": "scripted", "seed": 0}, "turns": 2, "samples": 1}
    settings |= {"rules": (Rule.REPEATABLE,), "strict": True, "env": ENV} | changes
    return Run(exam=exam, out=out, name="scripted", **settings)


def finished(exam, out, who, **changes):
    run = run_of(exam, out, **changes)
    return go(run, answers_of_author(who, run, 0.0, 0))


@pytest.fixture(scope="module")
def whole(exam, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, finished(exam, out, Scripted())


def test_a_run_and_what_it_leaves(whole):
    out, results = whole
    first, second = results["rules"]["repeatable"]
    assert first["exec"]["mean"] == 1.0 and first["text"]["mean"] < 1
    assert second["low"]["mean"] == 1.0
    assert results["correction"][0]["improved"]["mean"] == 1.0
    assert json.loads((out / RESULTS).read_text()) == json.loads(json.dumps(results))
    rows = [json.loads(line) for line in (out / PREDICTIONS).read_text().splitlines()]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert len(rows) == COUNT and all(len(row["turns"]) == 2 for row in rows)
    assert "| repeatable | 2" in (out / MARKDOWN).read_text()
    assert r"\begin{tabular}" in (out / LATEX).read_text()


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_files(exam, whole, tmp_path, after):
    first, then = Scripted(kill_after=after), Scripted()
    with pytest.raises(Killed):
        finished(exam, tmp_path, first)
    finished(exam, tmp_path, then)
    # An answer may have been written and not yet scored when the kill came.
    assert len(first.asked) + len(then.asked) >= COUNT
    assert len({*first.asked, *then.asked}) == COUNT
    for name in (PREDICTIONS, RESULTS, MARKDOWN, LATEX):
        assert (tmp_path / name).read_text() == (whole[0] / name).read_text()


def test_a_finished_run_asks_nobody(exam, whole):
    author = Scripted(kill_after=0)
    assert finished(exam, whole[0], author) == whole[1]
    assert not author.asked


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"author": {"author": "other", "seed": 0}}, "author was 'scripted' and is 'other'"),
        ({"author": {"author": "scripted", "seed": 1}}, "seed was 0 and is 1"),
        ({"turns": 3}, "turns was 2 and is 3"),
        ({"rules": (Rule.PLOT2CODE,)}, "rules was"),
    ],
)
def test_another_run_in_the_same_place_is_refused(exam, whole, changes, what):
    before = (whole[0] / PREDICTIONS).read_bytes()
    with pytest.raises(ConfigError, match=what):
        finished(exam, whole[0], Scripted(), **changes)
    assert (whole[0] / PREDICTIONS).read_bytes() == before


def test_samples_are_asked_again_chart_by_chart(exam, tmp_path):
    """A kill between two samples of a chart: both are asked again, and none is there twice."""
    with pytest.raises(Killed):
        finished(exam, tmp_path, Scripted(kill_after=3), samples=2)
    then = Scripted()
    results = finished(exam, tmp_path, then, samples=2)
    assert results["samples"] == 2 and results["charts"] == COUNT
    rows = [json.loads(line) for line in (tmp_path / PREDICTIONS).read_text().splitlines()]
    assert [row["sample"] for row in rows] == [0, 1] * COUNT


def test_a_chart_that_is_refused_is_a_failure(exam, tmp_path):
    results = finished(exam, tmp_path, Scripted(refuses=2))
    assert results["refused"] == 1 and "too large" in results["refused_because"]
    assert results["rules"]["repeatable"][1]["exec"]["mean"] == pytest.approx((COUNT - 1) / COUNT)
    rows = [json.loads(line) for line in (tmp_path / PREDICTIONS).read_text().splitlines()]
    assert rows[2]["turns"][0]["status"] == "refused"
    assert "too large" in rows[2]["turns"][0]["error"]


def test_predictions_of_others_and_missing_ones(exam, whole, tmp_path):
    """Our own texts, scored as somebody else's, get the same scores; a missing chart is lost."""
    rows = [json.loads(line) for line in (whole[0] / PREDICTIONS).read_text().splitlines()]
    texts = {(row["id"], 0): tuple(turn["text"] for turn in row["turns"]) for row in rows[1:]}
    others = Others(texts, 2, 1, (), 0)
    missing = frozenset({(rows[0]["id"], 0)})
    run = run_of(exam, tmp_path, author={"predictions": "x"}, strict=False, missing=missing)
    results = go(run, answers_of_others(others, run))
    again = [json.loads(line) for line in (tmp_path / PREDICTIONS).read_text().splitlines()]
    assert [row["turns"] for row in again[1:]] == [row["turns"] for row in rows[1:]]
    assert again[0]["missing"] and results["missing"] == 1
    assert results["rules"]["repeatable"][1]["low"]["mean"] == pytest.approx((COUNT - 1) / COUNT)


def test_chartx_leaves_what_its_judge_reads(exam, tmp_path):
    chart = exam.charts[0]
    chartx = dataclasses.replace(
        exam,
        question=Question(Benchmark.CHARTX, "x", "direct", {}),
        charts=[chart],
        facts={chart.id: {"kind": "bar_chart", "title": "Rain", "csv": "a \\t b"}},
    )
    finished(chartx, tmp_path, Scripted())
    (line,) = (tmp_path / "gpt_score-2.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "id": chart.id,
        "chart_type": "bar_chart",
        "title": "Rain",
        "csv": "a \\t b",
        "gen_code": chart.code.strip(),
    }

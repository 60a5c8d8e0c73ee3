"""Reading a judge's answers, keeping its scores, and the similarity for machines without one."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.rl.judge.base import (
    POINTS,
    Judge,
    JudgeDown,
    Verdict,
    VerdictCache,
    VisualJudge,
    read_points,
    similarity,
    verdict,
)

POINTS_GIVEN = {"type": 18, "layout": 10, "text": 16, "data": 14, "style": 12, "clarity": 9}
AS_JSON = json.dumps(POINTS_GIVEN)
AS_LINES = "\n".join(
    f"- {name.title()}: {points}/{POINTS[name]}" for name, points in POINTS_GIVEN.items()
)


@pytest.mark.parametrize(
    "answer",
    [
        AS_JSON,
        f"Here you are:\n```json\n{AS_JSON}\n```",
        json.dumps({"scores": POINTS_GIVEN, "total": 79}),
        json.dumps(
            {name.title(): f"{points}/{POINTS[name]}" for name, points in POINTS_GIVEN.items()}
        ),
        json.dumps(
            {
                name: {"score": points, "comment": "3 of 4 series"}
                for name, points in POINTS_GIVEN.items()
            }
        ),
        AS_LINES,
        AS_LINES.replace("Type", "**Chart Types**").replace("Text", "Text Content"),
        AS_LINES.replace("18/20", "both have 2 panels, 18/20"),
        AS_LINES.replace("18/20", "18 out of 20"),
        AS_LINES.replace("/20", "").replace("/10", ""),
        "1. " + AS_LINES[2:] + "\nScore: 79/100",
        '<think>perhaps {"type": 1, "layout": 1, "text": 1, "data": 1, "style": 1, "clarity": 1}</think>'
        + AS_JSON,
        '{"type": 1, "layout": 1, "text": 1, "data": 1, "style": 1, "clarity": 1}\nNo, finally:\n'
        + AS_JSON,
        "{broken {" + AS_JSON,
    ],
)
def test_answers_that_can_be_read(answer):
    assert read_points(answer) == POINTS_GIVEN
    assert verdict(answer).score == pytest.approx(0.79)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "no points for type"),
        ("The charts look alike. 90/100", "no points for type"),
        (AS_JSON.replace("18", "21"), "from 0 to 20 for type"),
        (AS_JSON.replace("18", "-1"), "from 0 to 20 for type"),
        (AS_JSON.replace("18", "true"), "for type"),
        (AS_JSON.replace("18", "null"), "for type"),
        (AS_JSON.replace("18", "NaN"), "for type"),
        (AS_JSON.replace("18", '"eighteen"'), "for type"),
        (AS_JSON.replace('"clarity"', '"clearness"'), "for type"),
        (AS_LINES.replace("18/20", "9/10"), "for type"),
        (AS_LINES.replace("18/20", "25/20"), "for type"),
        (AS_LINES.replace("18/20", "2 panels instead of 3"), "for type"),
        (AS_LINES.replace("- Data: 14/20\n", ""), "no points for data"),
        (f"<think>{AS_JSON}", "no points for type"),
    ],
)
def test_answers_that_cannot_be_read_are_not_scored(answer, problem):
    with pytest.raises(ValueError, match=problem):
        read_points(answer)
    assert verdict(answer).score is None
    assert problem in verdict(answer).problem


class ScriptedJudge(Judge):
    """Gives the scores it is told, at once; None is a failure."""

    def __init__(self, scores, cache=None, max_failures=2):
        super().__init__("scripted", "v1", cache or VerdictCache(), max_failures)
        self.scores = list(scores)

    def _ask(self, target, render, answer):
        score = self.scores.pop(0)
        answer(Verdict(score, problem="" if score is not None else "no idea"))


def pixels(value):
    return np.full((4, 5, 3), value, np.uint8)


def test_equal_pairs_are_asked_once_and_failures_again():
    judge = ScriptedJudge([0.5, None, 0.25])
    assert judge.submit(b"t", pixels(1)).result().score == 0.5
    assert judge.submit(b"t", pixels(1)).result().score == 0.5
    assert judge.submit(b"t", pixels(2)).result().score is None
    assert judge.submit(b"t", pixels(2)).result().score == 0.25
    stats = judge.stats()
    assert (stats["requests"], stats["cache_hits"], stats["scored"], stats["unscorable"]) == (
        4,
        1,
        2,
        1,
    )


def test_failures_in_a_row_are_limited():
    judge = ScriptedJudge([None, 0.5, None, None, 0.5])
    assert [judge.submit(b"t", pixels(i)).result().score for i in range(3)] == [None, 0.5, None]
    with pytest.raises(
        JudgeDown,
        match=r"2 pairs in a row without a score \(judge.max_failures\); the last: no idea",
    ):
        judge.submit(b"t", pixels(3)).result()
    with pytest.raises(JudgeDown):
        judge.submit(b"t", pixels(4)).result()


def test_a_resumed_run_asks_nothing_twice(tmp_path):
    directory = str(tmp_path / "judge")
    with ScriptedJudge([0.5, 0.75], VerdictCache(directory)) as judge:
        judge.submit(b"t", pixels(1)).result()
    with open(tmp_path / "judge" / "verdicts-0.jsonl", "a") as file:
        file.write('{"key": "torn')  # a killed writer
    with ScriptedJudge([0.25], VerdictCache(directory)) as judge:
        assert judge.submit(b"t", pixels(1)).result().score == 0.5
        assert judge.submit(b"u", pixels(1)).result().score == 0.25  # another target
    with ScriptedJudge([], VerdictCache(directory, "1")) as judge:
        assert judge.submit(b"u", pixels(1)).result().score == 0.25
        assert judge.submit(b"t", pixels(1)).result().score == 0.5


# ---------------------------------------------------------------------------- the visual similarity


def chart(color="blue", heights=(40, 70, 55), size=(168, 112)):
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i, height in enumerate(heights):
        draw.rectangle([20 + 45 * i, 100 - height, 50 + 45 * i, 100], fill=color)
    draw.line([10, 100, 160, 100], fill="black")
    return np.asarray(image)


def test_similarity_orders_pictures_as_one_would():
    target = chart()
    assert similarity(target, target) == 1.0
    assert similarity(target, np.full_like(target, 255)) == 0.0
    moved, recolored, other = chart(heights=(45, 70, 55)), chart("red"), chart("red", (90, 10, 90))
    assert (
        1
        > similarity(target, moved)
        > similarity(target, recolored)
        > similarity(target, other)
        > 0
    )
    assert similarity(target, chart(size=(84, 112))) < similarity(target, moved)


def test_similarity_is_symmetric_and_deterministic():
    a, b = chart(), chart("red", (10, 20, 30))
    assert similarity(a, b) == similarity(a, b) == pytest.approx(similarity(b, a))


def test_the_visual_judge_has_no_dimensions():
    target = chart()
    with VisualJudge(VerdictCache()) as judge:
        found = judge.submit(png_bytes(target), chart("red")).result()
        assert judge.name == "visual"
        assert judge.submit(png_bytes(target), target).result().score == 1.0
    assert found.points == {} and found.score == similarity(target, chart("red"))

"""Reading a judge's answers: nothing that cannot be read becomes a score."""

import json

import pytest

from mmrecoder_jax.rl.judge.answers import POINTS, read_points, verdict

POINTS_GIVEN = {"type": 18, "layout": 10, "text": 16, "data": 14, "style": 12, "clarity": 9}
AS_JSON = json.dumps(POINTS_GIVEN)
ONES = json.dumps(dict.fromkeys(POINTS, 1))
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
        f"<think>perhaps {ONES}</think>{AS_JSON}",
        f"{ONES}\nNo, finally:\n{AS_JSON}",
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

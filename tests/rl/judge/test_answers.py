"""Reading a judge's answers: nothing that cannot be read becomes a score."""

import json
import time

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
        f"{AS_JSON}\nOnce more:\n{AS_JSON}",
        f"{AS_JSON}\n{AS_LINES}",
        f"<think>the title says </think></think>\n{AS_JSON}",
        AS_JSON.replace("18", '{"score": 18, "max": 20}'),
        json.dumps({name: f"{points} points" for name, points in POINTS_GIVEN.items()}),
        AS_JSON.replace("{", "").replace("}", "").replace(",", ",\n"),  # lines of a broken object
        AS_LINES + "\nData differences: 2\nText size: 12\nLayout of legend: 3",
        AS_LINES.replace("Type: 18/20", "Type (20): **18** / 20 - the same 2 panels"),
        AS_LINES.replace("18/20", "the same \N{EN DASH} 18/20 (90%), -2 for a colour"),
        AS_LINES.replace("Type: 18/20", "Type\uff1a\uff11\uff18\uff0f\uff12\uff10"),  # wide
        AS_LINES.replace("18/20", "18 (two 3D panels)"),
        AS_LINES + "\nType: both are bar charts",
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
        (AS_JSON.replace("18", "1" + "0" * 400), "from 0 to 20 for type"),
        (AS_JSON.replace("18", "1e999"), "from 0 to 20 for type"),
        (AS_JSON.replace("18", '{"score": 9, "max": 10}'), "for type"),
        (AS_JSON.replace("18", '"18%"'), "for type"),
        (AS_JSON.replace("18", "[18, 20]"), "for type"),
        (json.dumps(dict.fromkeys(POINTS, 0.9)), "shares of 1"),
        (AS_JSON.replace('{"type"', '{"type": 20, "type"'), "no points for type"),
        (AS_JSON.replace('{"type"', '{"chart_type": 20, "type"'), "two entries for type"),
        (AS_JSON[:-1], "no points for type"),
        ("\n".join(f"| {name} | {most} | 9 |" for name, most in POINTS.items()), "no points"),
        ("x" * 70_000, "70000 characters"),
        *(
            (AS_LINES.replace("18/20", written), "for type")
            for written in (
                *("\N{EN DASH}5/20", "- 5/20", "\N{MINUS SIGN}5/20", "20 - 5/20", "-5"),
                *("18%", "18 %", "18 percent", "90/100", "~18/20", "> 18/20", "16-18/20"),
                *(".5/20", "18,20", "1 8/20", "18/20/20", "18/20, was 15/20", "3 bars", "eighteen"),
                *("\u0661\u0668/\u0662\u0660", "18\u200b/20", "\u00bd/20", "1.2.3", "1e1"),
            )
        ),
    ],
)
def test_answers_that_cannot_be_read_are_not_scored(answer, problem):
    with pytest.raises(ValueError, match=problem):
        read_points(answer)
    assert verdict(answer).score is None
    assert problem in verdict(answer).problem


def test_a_decimal_comma_is_one():
    for written in ("17,5/20", "17.5/20", "17,5", "17.5 / 20"):
        assert read_points(AS_LINES.replace("18/20", written))["type"] == 17.5
    assert read_points(AS_JSON.replace("18", '"17,5"'))["type"] == 17.5


FULL = json.dumps(POINTS)
FULL_LINES = "\n".join(f"{name}: {most}/{most}" for name, most in POINTS.items())


@pytest.mark.parametrize(
    "answer",
    [
        f"{FULL}\n{AS_JSON}",
        f"{AS_JSON}\nThe title reads {FULL}",
        f'The title reads "{FULL}".\n{AS_LINES}',
        f"{AS_LINES}\n{FULL}",
        f"{AS_JSON}\nThe title reads:\n{FULL_LINES}",
        f"{AS_LINES}\n{FULL_LINES}",
        f"{FULL}\nType: 3/20",
        f"The title reads {FULL}<think>\n{AS_JSON}",
        f"<think>The title reads '</think>{FULL}'.</think>{AS_JSON}",
        json.dumps({"reference": POINTS, "redrawn": POINTS_GIVEN}),
    ],
)
def test_two_answers_that_differ_are_none(answer):
    """A chart can show an answer as its title, and a judge can quote it."""
    with pytest.raises(ValueError, match="two answers"):
        read_points(answer)


@pytest.mark.parametrize(
    "piece",
    [
        *("*", "- ", "{", '{"', '{"a":', "<think>", "</think>", "type _", "Type (", '{"type":1,'),
        *("1. ", "18 ", "1", "type: 18/20 ", "Type: 1 of ", "\n", "[", '"', "{ "),
    ],
)
def test_reading_takes_time_in_proportion_to_the_answer(piece):
    """Quadratic reading would take minutes for these."""
    start = time.monotonic()
    for length in (8_000, 65_000, 1_000_000):
        verdict((piece * length)[:length])
        verdict((piece * length)[: length - len(AS_LINES) - 1] + "\n" + AS_LINES)
    assert time.monotonic() - start < 20

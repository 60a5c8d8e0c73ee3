"""The numbers of a run against those worked out by hand."""

import json

import pytest

from mmrecoder_jax.env.response import response_text
from mmrecoder_jax.exam.scoring import Rule
from mmrecoder_jax.exam.summary import Answers, summarise

PARTS = ("text", "layout", "type", "color")


def turn(low, code="a", executed=True, thought="t", **more):
    parts = {"exec": executed, **dict.fromkeys(PARTS, low), "low": low}
    return {
        "text": response_text(thought, code) if code else "",
        "status": "ok" if executed else "error",
        "error": "",
        "answered": bool(code),
        "scores": {"repeatable": parts, "plot2code": {"exec": executed, "text_match": low / 2}},
        **more,
    }


def row(name, *turns, sample=0, **more):
    return {"id": name, "sample": sample, "chart": "x", "turns": list(turns), **more}


ROWS = [
    row("bar_1", turn(0.5), turn(0.8, "b")),  # improved
    row("bar_2", turn(0.6), turn(0.0, "b", executed=False)),  # crashed
    row("line_1", turn(0.7), turn(0.7)),  # repeated
    row("line_2", turn(0.0, executed=False), turn(0.9, "b")),  # mended: no self-correction
    row("line_3", turn(0.4), turn(0.3, "b")),  # regressed
    row("line_4", turn(0.4), turn(0.4, "b")),  # other code, same score
]
KINDS = {name: name.split("_")[0] for name in (one["id"] for one in ROWS)}


@pytest.fixture(scope="module")
def found():
    return summarise(ROWS, 2, [Rule.REPEATABLE, Rule.PLOT2CODE], kinds=KINDS)


def test_scores_per_turn(found):
    first, second = found["rules"]["repeatable"]
    assert first["exec"]["mean"] == pytest.approx(5 / 6)
    assert first["low"]["mean"] == pytest.approx(2.6 / 6)
    assert second["low"]["mean"] == pytest.approx(3.1 / 6)
    assert second["text"]["mean"] == second["color"]["mean"] == second["low"]["mean"]
    assert first["low"]["low"] < 2.6 / 6 < first["low"]["high"]
    assert (found["charts"], found["samples"], found["turns"]) == (6, 1, 2)


def test_self_correction_counts_first_turns_that_run(found):
    (second,) = found["correction"]
    assert second["turn"] == 2 and second["counted"] == 5
    assert second["improvement"]["mean"] == pytest.approx((0.3 - 0.6 + 0 - 0.1 + 0) / 5)
    assert second["improved"]["mean"] == pytest.approx(1 / 5)
    assert second["regressed"]["mean"] == pytest.approx(2 / 5)
    assert second["repeat"]["mean"] == pytest.approx(1 / 5)


def test_failure_modes_are_of_all_answers(found):
    first, second = found["failures"]
    assert first["crash"] == pytest.approx(1 / 6) and "no_change" not in first
    shares = {name: second[name] for name in ("crash", "no_change", "regression", "same")}
    assert shares == pytest.approx(dict.fromkeys(shares, 1 / 6))
    assert second["improvement"] == pytest.approx(2 / 6)


def test_unfulfilled_thoughts():
    rows = [
        row("a", turn(0.5), turn(0.5, "plt.legend()", thought="Add a legend.")),
        row("b", turn(0.5), turn(0.5, "plt.plot()", thought="Add a legend.")),
        row("c", turn(0.5), turn(0.5, "plt.plot()", thought="It is fine.")),
        row("d", turn(0.5), turn(0.5, thought="Fix text.")),
    ]
    second = summarise(rows, 2, [Rule.REPEATABLE])["failures"][1]
    assert second["announces"] == 3 / 4 and second["unfulfilled"] == 2 / 4


def test_plot2code_averages_text_match_over_passing_scripts(found):
    first = found["rules"]["plot2code"][0]
    assert first["text_match"]["mean"] == pytest.approx(1.3 / 6)
    assert first["text_match_passing"]["mean"] == pytest.approx(1.3 / 5)


def test_pass_rates_over_tasks_and_over_answers():
    rows = [
        row("a", turn(0.5)),
        row("b", turn(0.0, executed=False)),
        row("c", turn(0.0, "", executed=False)),
        row("d", turn(0.0, "", executed=False), missing=True),
    ]
    rates = [summarise(rows, 1, [Rule.REPEATABLE], empty_counts=counts) for counts in (False, True)]
    strict, empty = (one["pass_rate"][0] for one in rates)
    assert strict["over_tasks"] == empty["over_tasks"] == 1 / 4
    assert (strict["over_answered"], strict["answered"]) == (1 / 2, 2)
    assert (empty["over_answered"], empty["answered"]) == (1 / 3, 3)
    assert rates[0]["missing"] == 1


def test_kinds_have_their_own_rows(found):
    assert set(found["kinds"]) == {"bar", "line"}
    assert found["kinds"]["bar"]["charts"] == 2
    assert found["kinds"]["bar"]["low"] == pytest.approx([0.55, 0.4])
    assert summarise(ROWS, 2, [Rule.REPEATABLE], kinds={})["charts"] == 6


def test_a_judge_that_gave_nothing_is_counted():
    rows = [row("a", turn(0.5, high=0.8)), row("b", turn(0.5, high=None))]
    (high,) = summarise(rows, 1, [Rule.REPEATABLE])["high"]
    assert high["mean"] == 0.8 and high["unscorable"] == 1 and high["count"] == 1
    assert "high" not in summarise(ROWS, 2, [Rule.REPEATABLE])


def test_a_rule_without_a_score_is_left_out_and_counted():
    rows = [row("a", turn(0.5)), row("b", turn(0.5))]
    rows[1]["turns"][0]["scores"]["repeatable"] = None
    (first,) = summarise(rows, 1, [Rule.REPEATABLE])["rules"]["repeatable"]
    assert first["low"]["mean"] == 0.5 and first["unscored"] == 1


def test_samples_of_a_chart():
    rows = [row("a", turn(0.2), sample=0), row("a", turn(0.6), sample=1), row("b", turn(0.4))]
    found = summarise([*rows, row("b", turn(0.4), sample=1)], 1, [Rule.REPEATABLE])
    assert (found["charts"], found["samples"]) == (2, 2)
    assert found["rules"]["repeatable"][0]["low"]["mean"] == pytest.approx(0.4)


def test_no_first_turn_runs_and_everything_is_json():
    rows = [row("a", turn(0.0, executed=False), turn(0.5, "b"))]
    rows.append(row("b", *(turn(0.0) for _ in range(2))))
    for one in rows[1]["turns"]:
        one["scores"]["repeatable"] = None
    found = summarise(rows, 2, [Rule.REPEATABLE], kinds={"a": "x", "b": "y"})
    assert found["correction"][0]["improvement"]["mean"] is None
    assert found["kinds"]["y"]["low"] == [None, None]
    json.dumps(found, allow_nan=False)


def test_code_is_read_as_its_author_writes_it():
    rows = [row("a", turn(0.5), turn(0.5))]
    for one in rows[0]["turns"]:
        one["text"] = "plt.plot()"  # no fence
    assert not Answers(rows, 2).repeats(strict=True).any()
    assert Answers(rows, 2).repeats(strict=False).tolist() == [[False, True]]

"""Tables as Markdown and LaTeX: layout, numbers, text that must be escaped."""

import pytest

from mmrecoder_jax.exam.scoring import Rule
from mmrecoder_jax.exam.summary import summarise
from mmrecoder_jax.exam.tables import Table, tables, with_interval
from tests.exam.test_summary import KINDS, ROWS


@pytest.fixture(scope="module")
def found():
    about = {"author": "a_b", "benchmark": "tiny", "task": "direct", "judge": "", "left_out": []}
    return about | summarise(ROWS, 2, [Rule.REPEATABLE, Rule.PLOT2CODE], kinds=KINDS)


def test_the_layout_of_the_paper(found):
    scores, plot2code, correction, failures = tables(found)
    assert scores.columns == ("rule", "turn", "exec", "text", "layout", "type", "color", "low")
    assert scores.rows[0][:3] == ("repeatable", "1", "83.3")
    assert scores.rows[0][-1].startswith("43.3 [")
    assert scores.title.startswith("a_b on tiny (direct), 6 charts.")
    assert plot2code.columns == ("turn", "pass", "text-match, passing", "text-match, all")
    assert correction.columns[1:] == (
        "counted",
        "mean improvement",
        "improved",
        "regressed",
        "repeat",
    )
    assert correction.rows[0][1] == "5" and correction.rows[0][2].startswith("-8.00 [")
    assert correction.rows[0][3:] == ("20.0", "40.0", "20.0")
    assert failures.rows[0][1:6] == ("16.7", "-", "-", "-", "-")


def test_pass_rates_have_a_table_where_they_differ(found):
    rates = [
        {"turn": turn, "over_tasks": 0.5, "over_answered": 0.75, "answered": 4} for turn in (1, 2)
    ]
    shown = tables(found | {"pass_rate": rates, "left_out": [{}, {}]})
    assert "6 charts, 2 left out." in shown[0].title
    assert shown[2].rows[0] == ("1", "50.0", "75.0", "4")


def test_high_has_a_column_with_the_name_of_its_judge(found):
    high = {"mean": 0.5, "low": 0.4, "high": 0.6, "count": 6, "unscorable": 0}
    (scores, *_) = tables(found | {"judge": "visual", "high": [high, high]})
    assert scores.columns[-1] == "high (visual)" and scores.rows[0][-1] == "50.0 [40.0, 60.0]"


def test_text_is_escaped():
    table = Table("50 % of a_b & <b>", ("x|y", "n"), (("a_b\n^", "$1"), ("[z](w)", "-")))
    lines = table.markdown().splitlines()
    assert lines[0] == "50 % of a_b & <b>" and len({len(line) for line in lines[2:]}) == 1
    assert lines[2].startswith(r"| x\|y") and r"a\_b ^" in lines[4] and r"[z]\(w)" in lines[5]
    latex = table.latex()
    assert r"\caption{50 \% of a\_b \& <b>}" in latex
    assert r"a\_b \textasciicircum{} & \$1 \\" in latex
    assert latex.count("&") == 4  # three rows, and the escaped one


def test_no_value_is_a_dash():
    assert with_interval({"mean": None, "low": None, "high": None}) == "-"
    assert with_interval({"mean": 0.5, "low": 0.25, "high": 0.75}) == "50.0 [25.0, 75.0]"


def test_chart2code_averages_over_scripts_that_leave_a_figure():
    names = ("color", "grid", "layout", "legend", "data", "visual", "text", "type")
    rows = [
        {
            "id": name,
            "sample": 0,
            "turns": [
                {
                    "text": "",
                    "status": "ok",
                    "error": "",
                    "answered": True,
                    "scores": {"chart2code": {"exec": ran, **dict.fromkeys(names, value)}},
                }
            ],
        }
        for name, ran, value in (("a", True, 0.5), ("b", True, 0.7), ("c", False, None))
    ]
    about = {"author": "x", "benchmark": "chart2code", "task": "edit", "judge": "", "left_out": []}
    results = about | summarise(rows, 1, [Rule.CHART2CODE])
    (first,) = results["rules"]["chart2code"]
    assert first["exec"]["mean"] == pytest.approx(2 / 3)
    assert first["color"]["mean"] == pytest.approx(0.6) and first["color"]["count"] == 2
    assert results["pass_rate"][0]["over_tasks"] == pytest.approx(2 / 3)
    (table,) = (one for one in tables(results) if one.columns[1] == "scripts")
    assert table.columns == ("turn", "scripts", *names)
    assert table.rows == (("1", "2", *["60.0"] * 8),)

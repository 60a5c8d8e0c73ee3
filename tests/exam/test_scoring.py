"""Scores of an answer by every rule, in real executors."""

import numpy as np
import pytest

from mmrecoder_jax.benchmarks.chartmimic_official import customized_prefix
from mmrecoder_jax.data.sources import Chart, png_bytes
from mmrecoder_jax.env.response import extract_code, response_text
from mmrecoder_jax.exam.scoring import RULES, Rule, Scorer, chart_digest, scoring_config
from mmrecoder_jax.exam.tasks import TASKS, Benchmark, Exam, Question
from mmrecoder_jax.rl.judge.base import VerdictCache
from mmrecoder_jax.rl.judge.visual import VisualJudge

GOLD = """import matplotlib.pyplot as plt
import numpy as np

# ===================
# Part 2: Data Preparation
# ===================
values = [3, 5]
title = "Rain"
# ===================
# Part 3: Plot Configuration and Rendering
# ===================
plt.bar([1, 2], values, color="red")
plt.title(title)
plt.savefig("bar_1.pdf")
"""
SAME = 'import matplotlib.pyplot as plt\nplt.bar([1, 2], [3, 5], color="red")\nplt.title("Rain")'


@pytest.fixture(scope="module")
def chart(pool):
    (execution,) = pool.run([GOLD])
    assert execution.image is not None
    return Chart(
        "bar_1", png_bytes(execution.image), GOLD, execution.record, "Redraw.", "test", "CC0-1.0"
    )


def exam(chart, task="direct", benchmark=Benchmark.CHARTMIMIC):
    question = Question(benchmark, "data", task, {})
    return Exam(question, [chart], {chart.id: {}}, (), "digest", {"dpi": 70, "rc_params": {}})


def scored(chart, pools, code, rules, task="direct", judge=None):
    scorer = Scorer(exam(chart, task), pools, rules, extract_code, judge)
    return scorer.turn(chart, code if "```" in code else response_text("t", code))


ALL = tuple(Rule)


def test_the_same_chart_scores_1_by_every_rule(chart, pools):
    row = scored(chart, pools, SAME, ALL)
    assert row["status"] == "ok" and row["answered"] and not row["error"]
    assert set(row["scores"]) == set(ALL)
    for rule in (Rule.REPEATABLE, Rule.CODE_PASS, Rule.NO_FILTER):
        assert row["scores"][rule] == {
            "exec": True,
            **dict.fromkeys(("text", "layout", "type", "color", "low"), 1.0),
        }
    assert row["scores"][Rule.PLOT2CODE] == {"exec": True, "text_match": 1.0}


def test_a_crash_after_drawing_counts_where_nothing_is_filtered(chart, pools):
    row = scored(chart, pools, SAME + "\n1 / 0", ALL)
    assert row["status"] == "error" and "ZeroDivisionError" in row["error"]
    assert row["scores"][Rule.CODE_PASS] == {
        "exec": False,
        **dict.fromkeys(("text", "layout", "type", "color", "low"), 0.0),
    }
    assert row["scores"][Rule.NO_FILTER]["low"] == 1.0
    assert not row["scores"][Rule.NO_FILTER]["exec"]
    assert row["scores"][Rule.REPEATABLE]["low"] == 0.0
    assert row["scores"][Rule.PLOT2CODE] == {"exec": False, "text_match": 0.0}


def test_no_code_and_a_refusal(chart, pools):
    row = scored(chart, pools, "```bash\nls\n```", ALL)
    assert row["status"] == "no_code" and not row["answered"]
    assert all(not scores["exec"] for scores in row["scores"].values())
    scorer = Scorer(exam(chart), pools, ALL, extract_code)
    refused = scorer.turn(chart, "", "its prompt is too long")
    assert (refused["status"], refused["error"]) == ("refused", "its prompt is too long")


def test_a_reference_that_fails_officially_has_no_official_score(chart, pools):
    broken = Chart("bar_1", chart.image, "1 / 0", chart.record, "", "", "")
    row = scored(broken, pools, SAME, ALL)
    assert row["scores"][Rule.CODE_PASS] is None and row["scores"][Rule.PLOT2CODE] is None
    assert row["scores"][Rule.REPEATABLE]["low"] == 1.0


def test_customized_answers_get_imports_and_the_data_of_the_reference(chart, pools):
    """An answer that copies none of the data runs, as in the official evaluator."""
    for name in ("pandas", "seaborn", "networkx", "matplotlib_venn"):
        pytest.importorskip(name)
    answer = 'plt.bar([1, 2], values, color="red")\nplt.title(title)'
    assert scored(chart, pools, answer, [Rule.REPEATABLE])["status"] == "error"
    row = scored(chart, pools, answer, ALL[:3], task="customized")
    assert row["status"] == "ok" and row["scores"][Rule.CODE_PASS]["low"] == 1.0
    assert row["text"] == response_text("t", answer), "the row holds what the author wrote"
    Scorer(exam(chart, "customized"), pools, ALL, extract_code).check()


def test_the_data_part_is_between_the_banners():
    prefix = customized_prefix(GOLD)
    assert "np.random.seed(0)" in prefix
    assert 'values = [3, 5]\ntitle = "Rain"\n' in prefix and "plt.bar" not in prefix
    with pytest.raises(ValueError, match="Part 2: Data Preparation"):
        customized_prefix(SAME)


def test_a_judge_sees_the_chart_that_is_asked_for(chart, pools):
    """Where a style is shown, the target is the reference's own picture."""
    style = png_bytes(np.zeros((40, 60, 3), np.uint8))
    shown = Chart("bar_1", style, GOLD, chart.record, "", "", "")
    with VisualJudge(VerdictCache()) as judge:
        rules = [Rule.REPEATABLE]
        assert scored(chart, pools, GOLD, rules, judge=judge)["high"] == 1.0
        assert scored(shown, pools, GOLD, rules, judge=judge)["high"] < 0.7
        assert scored(shown, pools, GOLD, rules, "edit", judge)["high"] == 1.0
        assert scored(chart, pools, "1 / 0", rules, judge=judge)["high"] == 0.0
    assert "high" not in scored(chart, pools, GOLD, rules)


def test_every_benchmark_has_rules_and_tasks(chart):
    assert set(RULES) == set(TASKS) == set(Benchmark)
    config = scoring_config(exam(chart, benchmark=Benchmark.PLOT2CODE), pools_config())
    assert (config.wall_seconds, config.dpi, config.replay_share) == (30.0, 70, 1.0)


def pools_config():
    from mmrecoder_jax.env.execution import EnvConfig

    return EnvConfig(workers=1)


def test_another_chart_has_another_digest(chart):
    other = Chart("bar_1", chart.image, SAME, chart.record, "", "", "")
    two = Chart("bar_1", chart.image, GOLD, chart.record, "", "", "", (chart.image,))
    assert len({chart_digest(one) for one in (chart, other, two)}) == 3

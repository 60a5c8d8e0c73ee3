"""Plot2Code's text-match by hand-computed cases, and real scripts in the executors."""

import json
import sys

import pytest

from mmrecoder_jax.benchmarks import score
from mmrecoder_jax.benchmarks.chartmimic_official import TargetFailed
from mmrecoder_jax.benchmarks.plot2code import plot2code_pair, text_match
from mmrecoder_jax.data.rows import JsonLines
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.records import Plot2CodeRecord

START = """\
import matplotlib.pyplot as plt
fig, ax = plt.subplots(figsize=(4, 3))
ax.set_xticks([])
ax.set_yticks([])
"""
TARGET = START + "ax.set_title('Sales')\nax.set_xlabel('Year')\nax.bar([1], [1])"


def drawn(*texts, size=(4.0, 3.0)):
    return Plot2CodeRecord(tuple((text, x, y) for text, x, y in texts), size)


def test_no_texts_at_all_agree():
    assert text_match(drawn(), drawn()) == 1.0
    assert text_match(drawn(("a", 0, 0)), drawn()) == 0.0


def test_it_is_matched_over_matched_and_unmatched():
    target = drawn(("sales", 0.5, 1), ("year", 0.5, 0), ("north", 1, 1))
    generated = drawn(("sales", 0.5, 1), ("years", 0.5, 0))
    assert text_match(generated, target) == pytest.approx(1 / (1 + 2 + 1))


def test_a_text_counts_once():
    assert text_match(drawn(("a", 0, 0)), drawn(("a", 0, 0), ("a", 1, 0))) == pytest.approx(1 / 2)


def test_positions_nearer_than_22_3_count():
    """exp(-d / 100) > 0.8 where d < 100 ln(1.25) = 22.314..."""
    assert text_match(drawn(("a", 22.3, 0)), drawn(("a", 0, 0))) == 1.0
    assert text_match(drawn(("a", 22.32, 0)), drawn(("a", 0, 0))) == 0.0
    assert text_match(drawn(("a", None, 0)), drawn(("a", 0, 0))) == 0.0


def test_positions_are_scaled_by_the_sizes():
    target = drawn(("a", 100, 40), size=(8.0, 3.0))
    assert text_match(drawn(("a", 50, 40), size=(4.0, 3.0)), target) == 1.0
    assert text_match(drawn(("a", 100, 40), size=(4.0, 3.0)), target) == 0.0


def test_the_first_near_one_is_taken():
    """Greedy in the reference's order: its first text takes all that its second could have."""
    target = drawn(("a", 0, 0), ("a", 30, 0))
    generated = drawn(("a", 20, 0), ("a", 0, 0))
    assert text_match(generated, target) == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def pool():
    with ExecutorPool(
        EnvConfig(workers=2, preload=("numpy", "matplotlib"), wall_seconds=120)
    ) as pool:
        yield pool


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (TARGET, (True, 1.0)),
        (TARGET.replace("Sales", " SALES "), (True, 1.0)),
        (TARGET.replace("Sales", "Sale"), (True, 1 / 3)),
        (TARGET + "\nax.text(0.5, 0.5, 'more')", (True, 2 / 3)),
        (TARGET + "\nax.text(0.5, 0.5, 'hidden').set_visible(False)", (True, 1.0)),
        (
            TARGET.replace("ax.set_xticks([])", "ax.set_xticks([1], ['tick'])"),
            (True, 1 / 4),
        ),  # it moves the label by over 22.3
        (TARGET + "\nax.boom()", (False, 0.0)),
        (TARGET + "\nplt.close('all')", (False, 0.0)),  # the current figure is a new, white one
        (None, (False, 0.0)),
        (
            "def a():\n    return b()\ndef b():\n    return 1\na()\n" + TARGET,
            (False, 0.0),
        ),  # functions do not see each other
        (
            "def draw():\n    return np.arange(3), plt.gcf(), "
            "subplots()\ndraw()\nplt.close('all')\n" + TARGET,
            (True, 1.0),
        ),
    ],
)
def test_pairs(pools, generated, expected):
    passed, match = plot2code_pair(pools, TARGET, generated)
    assert (passed, match) == (expected[0], pytest.approx(expected[1]))


def test_a_script_that_has_a_fig1_is_compared_with_that(pools):
    """The evaluator keeps the reference's figure under that name, among the script's own names."""
    other = TARGET.replace("Sales", "Costs")
    assert plot2code_pair(pools, TARGET, other) == (True, pytest.approx(1 / 3))
    assert plot2code_pair(pools, TARGET, other.replace("fig,", "fig1,")) == (True, 1.0)
    assert plot2code_pair(pools, TARGET, other + "\nfig1 = 3") == (True, pytest.approx(1 / 3))
    # Both figures are open; the evaluator closes the last and clears the one before.
    two = TARGET.replace("fig,", "fig1,") + "\nplt.figure()\nplt.title('Sales')\nplt.axis('off')"
    assert plot2code_pair(pools, TARGET, two) == (True, 0.0)
    assert plot2code_pair(pools, TARGET.replace("fig,", "fig1,"), other) == (
        True,
        pytest.approx(1 / 3),
    )


def test_long_texts_are_told_apart_by_their_ends(pools):
    long = START + "ax.set_title('x' * 3000 + '{}')"
    assert plot2code_pair(pools, long.format("a"), long.format("a")) == (True, 1.0)
    assert plot2code_pair(pools, long.format("a"), long.format("b")) == (True, 0.0)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="since 3.12 comprehensions see such names")
def test_comprehensions_do_not_see_the_names_of_a_generated_script(pools):
    code = "n = 2\nassert [n for _ in range(2)] == [2, 2]\n" + TARGET
    assert plot2code_pair(pools, TARGET, code) == (False, 0.0)
    assert plot2code_pair(pools, code, TARGET) == (True, 1.0)


def test_a_reference_may_have_functions_and_must_run(pools):
    functions = "def a():\n    return b()\ndef b():\n    return 1\na()\n"
    assert plot2code_pair(pools, functions + TARGET, TARGET) == (True, 1.0)
    with pytest.raises(TargetFailed):
        plot2code_pair(pools, "boom", TARGET)


def test_rows_and_their_summary(pools, tmp_path):
    pairs = [
        {"id": "a", "gt_code": TARGET, "gen_code": TARGET.replace("Sales", "x")},
        {"id": "b", "gt_code": TARGET, "gen_code": None},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rule = score.Rule("plot2code")
    lines = JsonLines(path, ("id",))
    rows = list(score.score_rows(pools, lines, rule, lambda number, problem: pytest.fail(problem)))
    assert rows == [
        {"id": "a", "exec_ok": True, "text_match": pytest.approx(1 / 3)},
        {"id": "b", "exec_ok": False, "text_match": 0.0},
    ]
    assert score.summary(rows, rule) == (
        "2 pairs (Plot2Code): pass rate 50.0 %  text-match 33.33 over passing scripts, 16.67 over "
        "all"
    )

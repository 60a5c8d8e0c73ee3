"""Runs side by side: paired differences, charts in common, seeds, what cannot be compared."""

import copy
import json

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.exam import compare
from mmrecoder_jax.exam.journal import PREDICTIONS, RUN
from mmrecoder_jax.exam.run import RESULTS
from tests.exam.test_summary import ROWS

MADE_OF = {"benchmark": "tiny", "task": "direct", "turns": 2, "rules": ["repeatable", "plot2code"]}


def write(directory, rows, **changes):
    directory.mkdir(parents=True)
    (directory / RUN).write_text(json.dumps(MADE_OF | changes))
    (directory / RESULTS).write_text(json.dumps({"author": directory.name}))
    (directory / PREDICTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory)


def better(rows, by):
    """Rows whose second turn scores more."""
    rows = copy.deepcopy(rows)
    for row in rows:
        row["turns"][1]["scores"]["repeatable"]["low"] += by
    return rows


@pytest.fixture
def runs(tmp_path):
    return [write(tmp_path / "a", ROWS), write(tmp_path / "b", better(ROWS, 0.05)[::-1])]


def number(found, name, turn):
    (row,) = [
        row
        for row in found["rows"]
        if (row["rule"], row["number"], row["turn"]) == ("repeatable", name, turn)
    ]
    return row


def test_differences_are_paired_whatever_the_order_of_rows(runs):
    found = compare.compare(compare.read_recipes(runs))
    second = number(found, "low", 2)
    assert second["means"][0]["mean"] == pytest.approx(3.1 / 6)
    (gain,) = second["differences"]
    assert (gain["mean"], gain["low"], gain["high"]) == pytest.approx((0.05, 0.05, 0.05))
    assert number(found, "low", 1)["differences"][0]["mean"] == 0
    assert number(found, "improvement", 2)["differences"][0]["mean"] == pytest.approx(0.05)
    assert found["charts"] == 6


def test_only_charts_in_common_count(tmp_path, runs):
    other = copy.deepcopy(ROWS[:4])
    other[0]["chart"] = "another chart of this id"
    found = compare.compare(compare.read_recipes([runs[0], write(tmp_path / "c", other)]))
    assert found["charts"] == 3 and found["charts_of_each"] == [6, 4]
    table = compare.table(found)
    assert "the 3 charts that all of 6, 4 have in common" in table.title
    assert table.columns == ("rule", "number", "turn", "1: a", "2: c", "2 - 1")


def test_seeds_of_a_recipe(tmp_path, runs):
    recipe = [write(tmp_path / f"s{i}", better(ROWS, by)) for i, by in enumerate((0.0, 0.1, 0.2))]
    found = compare.compare(compare.read_recipes([runs[0], ",".join(recipe)]))
    second = number(found, "low", 2)
    assert second["means"][1]["mean"] == pytest.approx(3.1 / 6 + 0.1)
    assert second["differences"][0]["mean"] == pytest.approx(0.1)
    spread = second["over_seeds"][1]
    half = 4.303 * 0.1 / 3**0.5
    assert (spread["mean"] - spread["low"]) == pytest.approx(half, abs=1e-3)
    assert compare.table(found).columns[-1] == "2 over 3 seeds"
    assert "Student's t over the means of the runs. With so few" in compare.about_intervals(found)


def test_a_line_says_what_the_intervals_are_of(runs):
    found = compare.compare(compare.read_recipes(runs))
    said = compare.about_intervals(found)
    assert "say nothing of training again" in said and "--compare A1,A2,A3" in said


def test_files_of_a_comparison(tmp_path, runs):
    found = compare.compare(compare.read_recipes(runs))
    compare.write(found, tmp_path / "out")
    assert json.loads((tmp_path / "out/compare.json").read_text()) == found
    assert "| repeatable | low " in (tmp_path / "out/compare.md").read_text()
    assert r"\toprule" in (tmp_path / "out/compare.tex").read_text()


def test_what_cannot_be_compared(tmp_path, runs):
    with pytest.raises(ConfigError, match="needs two runs"):
        compare.read_recipes(runs[:1])
    with pytest.raises(ConfigError, match=r"there is no run\.json in it"):
        compare.read_recipes([runs[0], str(tmp_path)])
    other = write(tmp_path / "other", ROWS, benchmark="gallery")
    with pytest.raises(ConfigError, match=r"has benchmark=tiny and .* has benchmark=gallery"):
        compare.read_recipes([runs[0], other])
    with pytest.raises(ConfigError, match="a run has no name"):
        compare.read_recipes([runs[0], ","])
    apart = copy.deepcopy(ROWS)
    for row in apart:
        row["chart"] = "y"
    recipes = compare.read_recipes([runs[0], write(tmp_path / "apart", apart)])
    with pytest.raises(ConfigError, match="no chart in common"):
        compare.compare(recipes)
    rules = compare.read_recipes([runs[0], write(tmp_path / "rules", ROWS, rules=["code_pass"])])
    with pytest.raises(ConfigError, match="different rules"):
        compare.compare(rules)

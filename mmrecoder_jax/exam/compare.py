"""Runs of a benchmark side by side, over the charts that all of them answered.

    python -m mmrecoder_jax.evaluate --compare A B           two runs
    python -m mmrecoder_jax.evaluate --compare A1,A2 B1,B2   two recipes, each with two seeds

Differences are those to the first, with 95 % bootstrap intervals over charts, paired: every
resample draws the same charts for both. Such an interval says how far a difference depends on which
charts were asked. It says nothing of training again: another seed of the same recipe gives another
policy. Where a recipe has several runs, an interval over its seeds (Student's t over their means)
stands beside, and that is the one to ask whether a recipe is better.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrecoder_jax.config import ConfigError, check_local_path
from mmrecoder_jax.data.rows import JsonLines, json_object
from mmrecoder_jax.exam.intervals import Sums, difference, estimate, over_seeds
from mmrecoder_jax.exam.journal import PREDICTIONS, RUN
from mmrecoder_jax.exam.run import RESULTS
from mmrecoder_jax.exam.scoring import WITHOUT_LOW
from mmrecoder_jax.exam.summary import Answers, names_of
from mmrecoder_jax.exam.tables import Table, with_interval

_SAME = ("benchmark", "task", "turns")
Row = dict[str, Any]


class Finished:
    """A run on disk.

    Raises:
      ConfigError: it is none, or it is not finished.
    """

    def __init__(self, directory: str):
        check_local_path("--compare", directory)
        path = Path(directory)
        for name in (RUN, PREDICTIONS, RESULTS):
            if not (path / name).is_file():
                raise ConfigError(
                    f"--compare {directory}: there is no {name} in it; give the --out of a "
                    "finished run of `python -m mmrecoder_jax.evaluate --benchmark=...`"
                )
        self.directory, self.run = directory, json_object(path / RUN)
        self.name = str(json_object(path / RESULTS)["author"])
        lines = JsonLines(path / PREDICTIONS, ("id", "sample", "chart", "turns"), unique=False)
        rows = [lines[number] for number in range(len(lines))]
        # A chart is the same where its id and what it shows are.
        self.rows: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self.rows.setdefault((row["id"], row["chart"]), []).append(row)

    def answers(self, charts: Sequence[tuple[str, str]]) -> Answers:
        """The rows of these charts, in their order."""
        rows = [row for chart in charts for row in self.rows[chart]]
        return Answers(rows, int(self.run["turns"]))


def read_recipes(words: Sequence[str]) -> list[list[Finished]]:
    """The runs that a command line names; runs with commas between them are of one recipe.

    Raises:
      ConfigError: fewer than two, or of different benchmarks.
    """
    if len(words) < 2:
        raise ConfigError("--compare needs two runs or more: --compare A B")
    recipes = [[Finished(name) for name in word.split(",") if name] for word in words]
    runs = [run for recipe in recipes for run in recipe]
    if any(not recipe for recipe in recipes):
        raise ConfigError(f"--compare {' '.join(words)}: a run has no name")
    for run in runs[1:]:
        for name in _SAME:
            if run.run[name] != runs[0].run[name]:
                raise ConfigError(
                    f"--compare: {runs[0].directory} has {name}={runs[0].run[name]} and "
                    f"{run.directory} has {name}={run.run[name]}: only runs of the same are "
                    "compared"
                )
    return recipes


def common_charts(runs: Sequence[Finished]) -> list[tuple[str, str]]:
    """The charts that all runs answered.

    Raises:
      ConfigError: there is none.
    """
    common = [chart for chart in runs[0].rows if all(chart in run.rows for run in runs)]
    if not common:
        raise ConfigError("--compare: these runs have no chart in common")
    return common


def common_rules(runs: Sequence[Finished]) -> list[str]:
    """The rules that all runs were scored by; raises ConfigError where there is none."""
    rules = [rule for rule in runs[0].run["rules"] if all(rule in r.run["rules"] for r in runs)]
    if not rules:
        raise ConfigError("--compare: these runs were scored by different rules")
    return rules


def compare(recipes: Sequence[Sequence[Finished]], seed: int = 0) -> dict[str, Any]:
    """The comparison as plain data: per rule, turn and number the recipes' means, and what they
    differ from the first.
    """
    runs = [run for recipe in recipes for run in recipe]
    charts = common_charts(runs)
    turns = int(runs[0].run["turns"])
    answers = [[run.answers(charts) for run in recipe] for recipe in recipes]
    rows = []
    for rule in common_rules(runs):
        names = ("exec", *(names_of(rule) if rule in WITHOUT_LOW else ("low",)))
        for name in names:
            for turn in sorted({0, turns - 1}):
                label = {"rule": rule, "number": name, "turn": turn + 1}
                rows.append(label | _row(answers, rule, name, turn, seed))
        if turns > 1 and rule not in WITHOUT_LOW:
            label = {"rule": rule, "number": "improvement", "turn": turns}
            rows.append(label | _row(answers, rule, "improvement", turns - 1, seed))
    return {
        "benchmark": runs[0].run["benchmark"],
        "task": runs[0].run["task"],
        "charts": len(charts),
        "charts_of_each": [len(run.rows) for run in runs],
        "runs": [[run.directory for run in recipe] for recipe in recipes],
        "authors": [recipe[0].name for recipe in recipes],
        "rows": rows,
    }


def _values(answers: Answers, rule: str, name: str, turn: int) -> Sums:
    if name != "improvement":
        return answers.sums(answers.of(rule, name)[:, turn])
    low = answers.of(rule, "low")
    counts = answers.of(rule, "exec")[:, 0] > 0
    return answers.sums(np.where(counts, low[:, turn] - low[:, 0], np.nan))


def _row(answers: Sequence[Sequence[Answers]], rule: str, name: str, turn: int, seed: int) -> Row:
    per_recipe = [[_values(one, rule, name, turn) for one in recipe] for recipe in answers]
    pooled = [_mean(sums) for sums in per_recipe]
    return {
        "means": [estimate(sums, seed).to_json() for sums in pooled],
        "differences": [difference(pooled[0], sums, seed).to_json() for sums in pooled[1:]],
        "over_seeds": [
            over_seeds(np.array([sums.mean for sums in recipe])).to_json() for recipe in per_recipe
        ],
    }


def _mean(sums: Sequence[Sums]) -> Sums:
    """Runs of one recipe together: a chart's values are those of all runs."""
    return Sums(
        np.sum([one.total for one in sums], axis=0), np.sum([one.count for one in sums], axis=0)
    )


def table(found: Mapping[str, Any]) -> Table:
    """The comparison as a table."""
    names = [f"{number}: {name}" for number, name in enumerate(found["authors"], start=1)]
    seeds = [len(runs) for runs in found["runs"]]
    columns = ["rule", "number", "turn", *names]
    columns += [f"{number} - 1" for number in range(2, len(names) + 1)]
    columns += [
        f"{number} over {count} seeds" for number, count in enumerate(seeds, start=1) if count > 1
    ]
    rows = []
    for row in found["rows"]:
        form = "+.2f" if row["number"] == "improvement" else ".1f"
        cells = [row["rule"], row["number"], str(row["turn"])]
        cells += [with_interval(mean, form) for mean in row["means"]]
        cells += [with_interval(gain, "+.2f") for gain in row["differences"]]
        cells += [
            with_interval(spread, form)
            for spread, count in zip(row["over_seeds"], seeds, strict=True)
            if count > 1
        ]
        rows.append(tuple(cells))
    title = (
        f"{found['benchmark']} ({found['task']}): the {found['charts']} charts that all of "
        f"{', '.join(map(str, found['charts_of_each']))} have in common; in percent."
    )
    return Table(title, tuple(columns), tuple(rows))


def about_intervals(found: Mapping[str, Any]) -> str:
    """What the intervals say, in a line."""
    counts = [len(runs) for runs in found["runs"]]
    said = (
        "Intervals in brackets are over charts: what other charts would change. They hold the "
        "policies fixed, so they say nothing of training again with another seed."
    )
    if max(counts) < 2:
        return (
            f"{said} Give several runs of a recipe with commas (--compare A1,A2,A3 B1,B2,B3) for "
            "an interval over seeds."
        )
    few = " With so few seeds it is wide." if min(c for c in counts if c > 1) < 5 else ""
    return f"{said} Those over seeds are Student's t over the means of the runs.{few}"


def write(found: Mapping[str, Any], out: Path) -> None:
    """`compare.json`, `compare.md` and `compare.tex` below a directory."""
    made = table(found)
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "compare.json": json.dumps(found, indent=1) + "\n",
        "compare.md": f"{made.markdown()}\n\n{about_intervals(found)}\n",
        "compare.tex": f"{made.latex()}\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")

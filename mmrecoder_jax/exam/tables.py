r"""The tables of a run, laid out like those of arXiv 2604.01600, as Markdown and as LaTeX.

    policy | rule | turn | exec | text | layout | type | color | low | high
    turn | counted | mean improvement | improved | regressed | repeat
    turn | crash | no change | regression | same | improvement | unfulfilled thought

Everything is in percent; mean improvement is in points of the low-level score. LaTeX needs the
package booktabs.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mmrecoder_jax.benchmarks import chart2code
from mmrecoder_jax.exam.failures import Outcome
from mmrecoder_jax.exam.scoring import WITHOUT_LOW, Rule

Results = Mapping[str, Any]
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_NONE = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      title: a sentence that says what is counted.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The title and the table."""
        lines = [self.columns, *self.rows]
        texts = [[_markdown(cell) for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        shown = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in texts
        ]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([self.title, "", shown[0], rule, *shown[1:]])

    def latex(self) -> str:
        """A `table` environment."""
        body = [" & ".join(map(_latex, line)) + r" \\" for line in (self.columns, *self.rows)]
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_latex(self.title)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
                *(r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"),
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def _markdown(cell: str) -> str:
    """A cell that is text alone: brackets of intervals stay, those of a link do not."""
    plain = re.sub(r"([|\\`<*_])", r"\\\1", re.sub(r"\s+", " ", cell))
    return plain.replace("](", "]\\(")


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(character, character) for character in re.sub(r"\s+", " ", cell))


def percent(value: float | None, form: str = ".1f") -> str:
    """A share or a score in percent; a dash where there is none."""
    return _NONE if value is None else f"{100 * value:{form}}"


def with_interval(found: Mapping[str, Any], form: str = ".1f") -> str:
    """A mean with its interval: "83.5 [81.0, 86.1]"."""
    if found["mean"] is None:
        return _NONE
    mean, low, high = (percent(found[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def tables(results: Results) -> list[Table]:
    """The tables of a run's results."""
    found = [_scores(results)]
    if Rule.PLOT2CODE in results["rules"]:
        found.append(_plot2code(results))
    if Rule.CHART2CODE in results["rules"]:
        found.append(_chart2code(results))
    if any(row["over_tasks"] != row["over_answered"] for row in results["pass_rate"]):
        found.append(_pass_rates(results))
    if results.get("correction"):
        found.append(_correction(results))
    if results.get("failures"):
        found.append(_failures(results))
    return found


def _about(results: Results) -> str:
    """Whose numbers of what these are."""
    more = f", {results['samples']} samples each" if results["samples"] > 1 else ""
    more += f", {len(results['left_out'])} left out" if results["left_out"] else ""
    return (
        f"{results['author']} on {results['benchmark']} ({results['task']}), "
        f"{results['charts']} charts{more}"
    )


def _scores(results: Results) -> Table:
    high = results.get("high")
    columns = ["rule", "turn", "exec", "text", "layout", "type", "color", "low"]
    if high:
        columns.append(f"high ({results['judge']})")
    rows = []
    for rule, per_turn in results["rules"].items():
        if rule in WITHOUT_LOW:
            continue
        for row in per_turn:
            cells = [rule, str(row["turn"])]
            cells += [percent(row[part]["mean"]) for part in columns[2:7]]
            cells.append(with_interval(row["low"]))
            if high:
                cells.append(with_interval(high[row["turn"] - 1]))
            rows.append(tuple(cells))
    title = f"{_about(results)}. A script that does not run scores 0, except under no_filter."
    return Table(title, tuple(columns), tuple(rows))


def _plot2code(results: Results) -> Table:
    rows = tuple(
        (
            str(row["turn"]),
            with_interval(row["exec"]),
            with_interval(row["text_match_passing"]),
            with_interval(row["text_match"]),
        )
        for row in results["rules"][Rule.PLOT2CODE]
    )
    return Table(
        "Plot2Code's own scores; its paper averages text-match over passing scripts.",
        ("turn", "pass", "text-match, passing", "text-match, all"),
        rows,
    )


def _chart2code(results: Results) -> Table:
    rows = tuple(
        (
            str(row["turn"]),
            str(row["color"]["count"]),
            *(percent(row[name]["mean"]) for name in chart2code.NAMES),
        )
        for row in results["rules"][Rule.CHART2CODE]
    )
    return Table(
        "Chart2Code's code-level F1, over the scripts that leave a figure, as its paper averages.",
        ("turn", "scripts", *chart2code.NAMES),
        rows,
    )


def _pass_rates(results: Results) -> Table:
    rows = tuple(
        (
            str(row["turn"]),
            percent(row["over_tasks"]),
            percent(row["over_answered"]),
            str(row["answered"]),
        )
        for row in results["pass_rate"]
    )
    return Table(
        "Pass rate: scripts that run, over all tasks and (as Chart2Code counts) over answers.",
        ("turn", "over tasks", "over answers", "answers"),
        rows,
    )


def _correction(results: Results) -> Table:
    rows = tuple(
        (
            str(row["turn"]),
            str(row["counted"]),
            with_interval(row["improvement"], "+.2f"),
            *(percent(row[name]["mean"]) for name in ("improved", "regressed", "repeat")),
        )
        for row in results["correction"]
    )
    return Table(
        f"Self-correction against turn 1 ({results['correction'][0]['rule']}), over answers whose "
        "first turn runs; repeat: the code of the turn before.",
        ("turn", "counted", "mean improvement", "improved", "regressed", "repeat"),
        rows,
    )


def _failures(results: Results) -> Table:
    outcomes = (
        *(Outcome.CRASH, Outcome.NO_CHANGE, Outcome.REGRESSION),
        *(Outcome.SAME, Outcome.IMPROVEMENT),
    )
    rows = tuple(
        (
            str(row["turn"]),
            *(percent(row.get(kind)) for kind in outcomes),
            percent(row["unfulfilled"]),
            percent(row["announces"]),
        )
        for row in results["failures"]
    )
    return Table(
        "What each turn came to against the turn before, in percent of all answers; unfulfilled: "
        "its thought announces what the code does not contain (announces: anything that can be "
        "looked for).",
        ("turn", *(kind.replace("_", " ") for kind in outcomes), "unfulfilled", "announces"),
        rows,
    )

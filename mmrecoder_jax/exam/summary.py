"""What a run of a benchmark comes to: the numbers of results.json.

Everything is computed from the rows of predictions.jsonl alone, so that a resumed run and an
uninterrupted one give the same file. Shares and scores are in [0, 1]. A mean has a 95 % interval
over charts (`intervals`).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmrecoder_jax.benchmarks import chart2code
from mmrecoder_jax.env.response import answer_code, extract_code, extract_thought
from mmrecoder_jax.env.wire import Part, Status
from mmrecoder_jax.exam.announcements import announced_and_missing
from mmrecoder_jax.exam.failures import Outcome, outcome
from mmrecoder_jax.exam.intervals import Sums, estimate
from mmrecoder_jax.exam.scoring import WITHOUT_LOW, Rule
from mmrecoder_jax.rl.correction import improved, regressed

Row = dict[str, Any]
PARTS = (*map(str, Part), "low")


def names_of(rule: str) -> tuple[str, ...]:
    """The numbers of a rule besides "exec"."""
    if rule == Rule.PLOT2CODE:
        return ("text_match",)
    return chart2code.NAMES if rule == Rule.CHART2CODE else PARTS


class Answers:
    """The rows of a run as arrays over samples (rows) and turns.

    Attributes:
      rows: as in the file, sorted.
      chart: the number of each row's chart.
      charts: how many there are.
      turns: of every row.
    """

    def __init__(self, rows: Sequence[Row], turns: int):
        ids = list(dict.fromkeys(row["id"] for row in rows))
        numbers = {name: number for number, name in enumerate(ids)}
        self.rows, self.turns, self.charts = rows, turns, len(ids)
        self.ids = ids
        self.chart = np.array([numbers[row["id"]] for row in rows], np.int64)

    def of(self, rule: str, name: str) -> np.ndarray:
        """`[samples, T]` of one number of a rule; NaN where the rule gave none."""
        return np.array(
            [
                [_number(turn["scores"].get(rule), name) for turn in row["turns"]]
                for row in self.rows
            ]
        ).reshape(len(self.rows), self.turns)

    def high(self) -> np.ndarray | None:
        """`[samples, T]` of the judge's scores, NaN where it gave none; None without a judge."""
        if not self.rows or "high" not in self.rows[0]["turns"][0]:
            return None
        return np.array(
            [
                [math.nan if turn["high"] is None else turn["high"] for turn in row["turns"]]
                for row in self.rows
            ],
            float,
        )

    def repeats(self, strict: bool) -> np.ndarray:
        """`[samples, T]`: whether the code is that of the turn before; False in the first turn.

        Args:
          strict: how code is read: as a policy's (`extract_code`) or as anyone's (`answer_code`).
        """
        codes = [[code_of(turn["text"], strict) for turn in row["turns"]] for row in self.rows]
        same = [
            [False, *(bool(a) and a == b for a, b in itertools.pairwise(of_row))]
            for of_row in codes
        ]
        return np.array(same, bool).reshape(len(self.rows), self.turns)

    def sums(self, values: np.ndarray) -> Sums:
        """By chart."""
        return Sums.of(values.astype(float), self.chart, self.charts)


def code_of(text: str, strict: bool) -> str:
    """The code of a turn without blanks around it; "" where it has none."""
    return ((extract_code(text) if strict else answer_code(text)) or "").strip()


def _number(scores: Mapping[str, Any] | None, name: str) -> float:
    value = None if scores is None else scores[name]
    return math.nan if value is None else float(value)


def summarise(
    rows: Sequence[Row],
    turns: int,
    rules: Sequence[str],
    *,
    strict: bool = True,
    kinds: Mapping[str, str] | None = None,
    empty_counts: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of a run.

    Args:
      rows: sorted, one per chart and sample.
      rules: in order; the first decides what is said of self-correction and failures.
      strict: see `Answers.repeats`.
      kinds: of each chart by its id, for the breakdown.
      empty_counts: whether the official pass rate counts an answer without code as an answer.
      seed: of the bootstrap.
    """
    answers = Answers(rows, turns)
    passes = Rule.CHART2CODE if Rule.CHART2CODE in rules else rules[0]
    repeats = answers.repeats(strict)
    result: dict[str, Any] = {
        "charts": answers.charts,
        "samples": len(rows) // max(answers.charts, 1),
        "turns": turns,
        "refused": sum(row["turns"][0]["status"] == Status.REFUSED for row in rows),
        "refused_because": next((e for e in map(_refusal, rows) if e), ""),
        "missing": sum(bool(row.get("missing")) for row in rows),
        "rules": {rule: _rule_rows(answers, rule, seed) for rule in rules},
        "pass_rate": _pass_rates(answers, passes, empty_counts),
    }
    high = answers.high()
    if high is not None:
        result["high"] = [
            estimate(answers.sums(high[:, turn]), seed).to_json()
            | {"unscorable": int(np.isnan(high[:, turn]).sum())}
            for turn in range(turns)
        ]
    scored = next((rule for rule in rules if rule not in WITHOUT_LOW), None)
    if scored is not None:
        result["correction"] = [
            {"turn": turn + 1, "rule": scored} | _correction(answers, scored, turn, repeats, seed)
            for turn in range(1, turns)
        ]
        result["failures"] = [
            {"turn": turn + 1, "rule": scored} | _failures(answers, scored, turn, repeats, strict)
            for turn in range(turns)
        ]
        if kinds:
            result["kinds"] = _by_kind(answers, scored, kinds)
    return result


def _rule_rows(answers: Answers, rule: str, seed: int) -> list[Row]:
    """One row per turn."""
    names = ("exec", *names_of(rule))
    values = {name: answers.of(rule, name) for name in names}
    rows = []
    for turn in range(answers.turns):
        of_turn = {name: values[name][:, turn] for name in names}
        row: Row = {"turn": turn + 1, "unscored": int(np.isnan(of_turn["exec"]).sum())}
        if rule == Rule.PLOT2CODE:  # its paper averages over passing scripts
            passing = np.where(of_turn["exec"] > 0, of_turn["text_match"], np.nan)
            of_turn["text_match_passing"] = passing
        for name, numbers in of_turn.items():
            row[name] = estimate(answers.sums(numbers), seed).to_json()
        rows.append(row)
    return rows


def _pass_rates(answers: Answers, rule: str, empty_counts: bool) -> list[Row]:
    """Per turn the share of scripts that run: over all tasks, and over those that were answered.

    The second is how Chart2Code counts, where an answer without code may leave no file at all.
    """
    executed = answers.of(rule, "exec")
    rows = []
    for turn in range(answers.turns):
        answered = np.array(
            [
                not row.get("missing") and (empty_counts or row["turns"][turn]["answered"])
                for row in answers.rows
            ],
            bool,
        )
        runs = np.nan_to_num(executed[:, turn])
        rows.append(
            {
                "turn": turn + 1,
                "over_tasks": float(runs.mean()) if len(runs) else None,
                "over_answered": float(runs[answered].mean()) if answered.any() else None,
                "answered": int(answered.sum()),
            }
        )
    return rows


def _correction(answers: Answers, rule: str, turn: int, repeats: np.ndarray, seed: int) -> Row:
    """A turn against the first, over samples whose first turn executes (`rl.correction`)."""
    low, executed = answers.of(rule, "low"), answers.of(rule, "exec")
    counts = executed[:, 0] > 0

    def over_counted(values: np.ndarray) -> dict[str, Any]:
        return estimate(answers.sums(np.where(counts, values, np.nan)), seed).to_json()

    pairs = list(zip(low[:, 0], low[:, turn], strict=True))
    return {
        "counted": int(counts.sum()),
        "improvement": over_counted(low[:, turn] - low[:, 0]),
        "improved": over_counted(np.array([improved(*pair) for pair in pairs], float)),
        "regressed": over_counted(np.array([regressed(*pair) for pair in pairs], float)),
        "repeat": over_counted(repeats[:, turn].astype(float)),
    }


def _failures(answers: Answers, rule: str, turn: int, repeats: np.ndarray, strict: bool) -> Row:
    """Shares of all samples; in the first turn crashes and thoughts alone."""
    low, executed = answers.of(rule, "low"), answers.of(rule, "exec")
    total = max(len(answers.rows), 1)
    row: Row = {}
    if turn:
        found = [
            outcome(
                bool(executed[i, turn] > 0),
                bool(repeats[i, turn]),
                float(np.nan_to_num(low[i, turn - 1])),
                float(np.nan_to_num(low[i, turn])),
            )
            for i in range(len(answers.rows))
        ]
        row |= {str(kind): found.count(kind) / total for kind in Outcome}
    else:
        row[str(Outcome.CRASH)] = float((~(executed[:, 0] > 0)).sum()) / total
    announced, unfulfilled = 0, 0
    for sample in answers.rows:
        text = sample["turns"][turn]["text"]
        before = code_of(sample["turns"][turn - 1]["text"], strict) if turn else None
        things, missing = announced_and_missing(
            extract_thought(text), code_of(text, strict), before
        )
        announced += things > 0
        unfulfilled += bool(missing)
    return row | {"announces": announced / total, "unfulfilled": unfulfilled / total}


def _by_kind(answers: Answers, rule: str, kinds: Mapping[str, str]) -> dict[str, Row]:
    """The first and the last turn per kind of chart, where there are several kinds."""
    names = np.array([kinds.get(row["id"], "") for row in answers.rows])
    if len(set(names)) < 2:
        return {}
    low, executed = answers.of(rule, "low"), answers.of(rule, "exec")
    rows = {}
    for name in sorted(set(names)):
        own = names == name
        rows[str(name)] = {
            "charts": len(set(answers.chart[own])),
            "exec": [_mean(executed[own][:, turn]) for turn in (0, -1)],
            "low": [_mean(low[own][:, turn]) for turn in (0, -1)],
        }
    return rows


def _refusal(row: Row) -> str:
    """Why the author was not asked; "" where it was."""
    first = row["turns"][0]
    return first["error"] if first["status"] == Status.REFUSED else ""


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None

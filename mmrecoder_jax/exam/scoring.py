"""Scores of one answer, by each rule that counts for a benchmark.

    repeatable   the reward's rules (training mode): defects removed, the same in every run
    code_pass    ChartMimic's official numbers; a script that crashes scores 0
    no_filter    ChartMimic's official numbers; a script that crashes is scored on what it drew
    plot2code    Plot2Code's: whether a script passes, and its text-match
    chart2code   Chart2Code's code-level F1, eight of them

A turn's row:

    {"text", "status", "error", "answered", "scores": {rule: {...}}, "high": 0.8}

`answered` is whether there was code. Scores of ChartMimic's rules are {"exec", "text", "layout",
"type", "color", "low"}, in [0, 1]; Plot2Code's are {"exec", "text_match"}; Chart2Code's are "exec"
and `benchmarks.chart2code.NAMES`, null where the script leaves no figure. A rule is null where the
reference fails by it. "high" is a judge's score of the render, 0 without one, null where the judge
gave none; it is absent without a judge.
"""

import contextlib
import dataclasses
import enum
import hashlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from typing import Any

from mmrecoder_jax.benchmarks import chart2code
from mmrecoder_jax.benchmarks.chartmimic_official import (
    Keep,
    TargetFailed,
    customized_prefix,
    official_pair,
)
from mmrecoder_jax.benchmarks.plot2code import plot2code_pair
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.chartmimic_rows import CUSTOMIZED
from mmrecoder_jax.data.sources import Chart, png_bytes
from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pools import Pools, separate_pools
from mmrecoder_jax.env.wire import Part, Status
from mmrecoder_jax.exam.tasks import Benchmark, Exam
from mmrecoder_jax.rl.judge.base import Judge, Verdict

Row = dict[str, Any]


class Rule(enum.StrEnum):
    """Whose scores."""

    REPEATABLE = "repeatable"
    CODE_PASS = "code_pass"
    NO_FILTER = "no_filter"
    PLOT2CODE = "plot2code"
    CHART2CODE = "chart2code"


WITHOUT_LOW = (Rule.PLOT2CODE, Rule.CHART2CODE)  # they have no low-level score
OFFICIAL = (Rule.CODE_PASS, Rule.NO_FILTER)
# Of each benchmark; the first is that of its own paper where we have it, and decides the tables.
RULES: dict[Benchmark, tuple[Rule, ...]] = {
    Benchmark.CHARTMIMIC: (*OFFICIAL, Rule.REPEATABLE),
    Benchmark.PLOT2CODE: (Rule.REPEATABLE, Rule.PLOT2CODE),
    Benchmark.CHARTX: (Rule.REPEATABLE,),
    Benchmark.CHART2CODE: (Rule.REPEATABLE, Rule.CHART2CODE),
    Benchmark.GALLERY: (Rule.REPEATABLE,),
    Benchmark.TINY: (Rule.REPEATABLE,),
}
# Limits of one script, as the benchmarks' own evaluators have them; ChartMimic's waits forever.
SECONDS = {Benchmark.CHARTMIMIC: 120.0, Benchmark.PLOT2CODE: 30.0, Benchmark.CHART2CODE: 60.0}


def scoring_config(exam: Exam, env: EnvConfig) -> EnvConfig:
    """How answers are executed: in the style of the references, every drawing replayed."""
    seconds = SECONDS.get(exam.question.benchmark, env.wall_seconds)
    return dataclasses.replace(
        env, **exam.style, wall_seconds=seconds, cpu_seconds=seconds, replay_share=1.0
    )


class Scorer:
    """Scores texts; safe for several threads.

    Args:
      read: the code of a text, None where it has none.
      judge: of renders; its name is in the results.
    """

    def __init__(
        self,
        exam: Exam,
        pools: Pools,
        rules: Collection[Rule],
        read: Callable[[str], str | None],
        judge: Judge | None = None,
    ):
        self._exam, self._pools, self._rules = exam, pools, rules
        self._read, self._judge = read, judge

    def check(self) -> None:
        """Raises ConfigError where the executors lack what ChartMimic's customized task imports."""
        if self._exam.question.task != CUSTOMIZED:
            return
        chart = self._exam.charts[0]
        execution = self._pools.references.submit(customized_prefix(chart.code)).result()
        if execution.status == Status.ERROR:
            raise ConfigError(
                "ChartMimic's customized task imports pandas, seaborn, networkx, scipy and "
                "matplotlib_venn before every answer, and these imports fail here "
                f"({execution.error.strip().splitlines()[-1]}): `pip install "
                "'mmrecoder_jax[charts]'`, or give --python"
            )

    def turn(self, chart: Chart, text: str, refused: str = "") -> Row:
        """The row of one turn.

        Args:
          refused: why the author was not asked, "" where it was.
        """
        code = None if refused else self._read(text)
        whole = None if not code else self._before(chart) + code
        execution = self._pools.answers.submit(whole).result()
        verdict: Future[Verdict] | None = None
        if self._judge is not None and execution.image is not None:
            verdict = self._judge.submit(self._target(chart), execution.image)
        row: Row = {
            "text": text,
            "status": str(Status.REFUSED if refused else execution.status),
            "error": refused or execution.error,
            "answered": code is not None and bool(code.strip()),
            "scores": {},
        }
        assert chart.record is not None  # a chart of an exam has one
        if Rule.REPEATABLE in self._rules:
            record = execution.record if execution.ok else None
            row["scores"][Rule.REPEATABLE] = _parts(execution.ok, score(record, chart.record))
        row["scores"] |= self._official(chart, whole)
        if Rule.PLOT2CODE in self._rules:
            row["scores"][Rule.PLOT2CODE] = self._plot2code(chart, whole)
        if Rule.CHART2CODE in self._rules:
            row["scores"][Rule.CHART2CODE] = self._chart2code(chart, whole)
        if self._judge is not None:
            row["high"] = 0.0 if verdict is None else verdict.result().score
        return row

    def _before(self, chart: Chart) -> str:
        """What is put in front of an answer."""
        return customized_prefix(chart.code) if self._exam.question.task == CUSTOMIZED else ""

    def _target(self, chart: Chart) -> bytes:
        """The picture that a render should look like."""
        if self._exam.shows_target:
            return chart.image
        drawn = self._pools.references.submit(chart.code).result().image
        return chart.image if drawn is None else png_bytes(drawn)

    def _official(self, chart: Chart, code: str | None) -> dict[str, Row | None]:
        rules = [rule for rule in OFFICIAL if rule in self._rules]
        if not rules:
            return {}
        if not code:  # no file is written for an answer without code
            return {rule: _parts(False, Scores()) for rule in rules}
        try:
            ran, scores = official_pair(self._pools, chart.id, chart.code, code, Keep.NO_FILTER)
        except TargetFailed:
            return dict.fromkeys(rules)
        kept = {Rule.CODE_PASS: scores if ran else Scores(), Rule.NO_FILTER: scores}
        return {rule: _parts(ran, kept[rule]) for rule in rules}

    def _plot2code(self, chart: Chart, code: str | None) -> Row | None:
        try:
            passed, match = plot2code_pair(self._pools, chart.code, code)
        except TargetFailed:
            return None
        return {"exec": passed, "text_match": match}

    def _chart2code(self, chart: Chart, code: str | None) -> Row | None:
        try:
            ran, scores = chart2code.chart2code_pair(self._pools, chart.code, code)
        except TargetFailed:
            return None
        return {"exec": ran, **(scores or dict.fromkeys(chart2code.NAMES))}


def _parts(ran: bool, scores: Scores) -> Row:
    return {
        "exec": ran,
        **{str(part): getattr(scores, part) for part in Part},
        "low": scores.overall,
    }


def chart_digest(chart: Chart) -> str:
    """Another text for another chart: what it shows and the code behind it."""
    shown = b"".join(hashlib.sha256(image).digest() for image in chart.images)
    return hashlib.sha256(shown + chart.code.encode()).hexdigest()[:16]


@contextlib.contextmanager
def scorer(
    exam: Exam,
    env: EnvConfig,
    rules: Collection[Rule],
    read: Callable[[str], str | None],
    judge: Judge | None,
) -> Iterator[Scorer]:
    """A `Scorer` with executors of its own.

    Raises:
      ConfigError: the executors lack what the benchmark needs.
    """
    with separate_pools(scoring_config(exam, env)) as pools:
        made = Scorer(exam, pools, rules, read, judge)
        made.check()
        yield made

"""A run of a benchmark: charts are asked about, answers are scored as they come, tables are made.

<out>/charts/              the references' charts, where the benchmark is not one already
<out>/run.json             what the rows are made of (`journal`)
<out>/predictions.jsonl    every turn's text, status and scores
<out>/results.json         the numbers (`summary`)
<out>/tables.md, .tex      the tables (`tables`)
<out>/gpt_score-<turn>.jsonl    of ChartX: the input of `benchmarks.chartx`, which asks a judge
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.chart2code_tasks import Level
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env import interpreter
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.response import answer_code, extract_code
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.exam.journal import Journal, Row, write_atomically
from mmrecoder_jax.exam.others import Others
from mmrecoder_jax.exam.scoring import Rule, Scorer, chart_digest, scorer, scoring_config
from mmrecoder_jax.exam.summary import code_of, summarise
from mmrecoder_jax.exam.tables import tables
from mmrecoder_jax.exam.tasks import Benchmark, Exam
from mmrecoder_jax.monitoring.progress import Bar
from mmrecoder_jax.rl.judge.base import Judge

RESULTS, MARKDOWN, LATEX = "results.json", "tables.md", "tables.tex"
# (number of the chart, sample, (text, why it was not asked) per turn)
Answered = tuple[int, int, Sequence[tuple[str, str]]]
Answer = Callable[[Sequence[int]], Iterator[Answered]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What is asked, and how it is scored.

    Attributes:
      name: of the author.
      author: what decides its answers besides the charts, as JSON.
      turns, samples: of every chart.
      rules: the first decides what is said of self-correction.
      strict: whether code is read as a policy's (`extract_code`) or as anyone's (`answer_code`).
      env: how scripts are executed, but for the style of the charts.
      seed: of the bootstrap.
      missing: (id, sample) of which others have given no prediction.
    """

    exam: Exam
    out: Path
    name: str
    author: Mapping[str, Any]
    turns: int
    samples: int
    rules: tuple[Rule, ...]
    strict: bool
    env: EnvConfig
    judge: Judge | None = None
    seed: int = 0
    missing: frozenset[tuple[str, int]] = frozenset()

    @property
    def made_of(self) -> dict[str, Any]:
        """What decides every row of the run."""
        question = self.exam.question
        return {
            "benchmark": str(question.benchmark),
            "task": question.task,
            "charts": self.exam.digest,
            "count": question.count,
            "instruction": question.instruction,
            **self.author,
            "turns": self.turns,
            "samples": self.samples,
            "rules": [str(rule) for rule in self.rules],
            "judge": "" if self.judge is None else self.judge.name,
            "libraries": dict(interpreter.find(self.env.python).releases),
        }


def go(run: Run, answer: Answer) -> dict[str, Any]:
    """Answers and scores what is not in the journal yet; writes and returns the results.

    Args:
      answer: yields the answers about charts of these numbers, all samples of each.
    """
    charts = run.exam.charts
    with Journal(run.out, run.made_of) as journal:
        ids = {charts[number].id: number for number in range(len(charts))}
        left = [
            number
            for name, number in ids.items()
            if any((name, sample) not in journal.rows for sample in range(run.samples))
        ]
        _answer_and_score(run, answer, journal, left)
        rows = journal.finish(ids)
    return finish(run, rows)


def _answer_and_score(run: Run, answer: Answer, journal: Journal, left: Sequence[int]) -> None:
    exam = run.exam
    done = len(exam.charts) - len(left)
    if not left:
        return
    read = extract_code if run.strict else answer_code
    config = scoring_config(exam, run.env)
    total = len(exam.charts) * run.samples
    with (
        scorer(exam, run.env, run.rules, read, run.judge) as scores,
        ThreadPoolExecutor(2 * config.workers, thread_name_prefix="score") as threads,
        Bar(f"evaluate {run.name} on {exam.question.benchmark}", total, unit="answer") as bar,
    ):
        bar.resume(done * run.samples)
        waiting: collections.deque[Future[None]] = collections.deque()

        def drain(most: int) -> None:
            while len(waiting) > most:
                waiting.popleft().result()
                bar.advance()

        for number, sample, turns in answer(left):
            chart = exam.charts[number]
            if (chart.id, sample) in journal.rows:
                bar.advance()  # of a chart some of whose samples were there
                continue
            waiting.append(threads.submit(_score, run, scores, journal, chart, sample, turns))
            while waiting and waiting[0].done():
                drain(len(waiting) - 1)
            drain(8 * config.workers)
        drain(0)


def _score(
    run: Run,
    scores: Scorer,
    journal: Journal,
    chart: Chart,
    sample: int,
    turns: Sequence[tuple[str, str]],
) -> None:
    row: Row = {
        "id": chart.id,
        "sample": sample,
        "chart": chart_digest(chart),
        "turns": [scores.turn(chart, text, refused) for text, refused in turns],
    }
    if (chart.id, sample) in run.missing:
        row["missing"] = True
    journal.add(row)


def answers_of_author(author: Any, run: Run, temperature: float, seed: int) -> Answer:
    """What a `drawing.authors.Author` answers."""

    def answer(numbers: Sequence[int]) -> Iterator[Answered]:
        for number, sample, trajectory in author.answer(
            run.exam.charts,
            turns=run.turns,
            samples=run.samples,
            temperature=temperature,
            seed=seed,
            numbers=numbers,
        ):
            yield (
                number,
                sample,
                [
                    (turn.text, turn.execution.error)
                    if turn.execution.status == Status.REFUSED
                    else (turn.text, "")
                    for turn in trajectory.turns
                ],
            )

    return answer


def answers_of_others(others: Others, run: Run) -> Answer:
    """What a file holds; a missing answer has no code."""

    def answer(numbers: Sequence[int]) -> Iterator[Answered]:
        for number in numbers:
            name = run.exam.charts[number].id
            for sample in range(run.samples):
                texts = others.texts.get((name, sample), ("",) * run.turns)
                yield number, sample, [(text, "") for text in texts]

    return answer


def finish(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """Writes and returns the results of rows."""
    exam, question = run.exam, run.exam.question
    results = {
        "author": run.name,
        "benchmark": str(question.benchmark),
        "task": question.task,
        "left_out": [dataclasses.asdict(entry) for entry in exam.left_out],
        **summarise(
            rows,
            run.turns,
            [str(rule) for rule in run.rules],
            strict=run.strict,
            kinds={name: facts.get("kind", "") for name, facts in exam.facts.items()},
            empty_counts=question.benchmark == Benchmark.CHART2CODE
            and Level(question.task).answers_nothing,
            seed=run.seed,
        ),
        "judge": "" if run.judge is None else run.judge.name,
        "made_of": run.made_of,
    }
    write_atomically(run.out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    made = tables(results)
    write_atomically(run.out / MARKDOWN, "\n\n".join(table.markdown() for table in made) + "\n")
    write_atomically(run.out / LATEX, "\n\n".join(table.latex() for table in made) + "\n")
    if question.benchmark == Benchmark.CHARTX:
        _write_gpt_score_rows(run, rows)
    return results


def _write_gpt_score_rows(run: Run, rows: Sequence[Row]) -> None:
    """What `python -m mmrecoder_jax.benchmarks.chartx --rows` takes, of the first sample."""
    for turn in range(run.turns):
        lines = []
        for row in rows:
            facts = run.exam.facts[row["id"]]
            if row["sample"] or not {"title", "csv"} <= set(facts):
                continue
            code = code_of(row["turns"][turn]["text"], run.strict) or None
            line = {"id": row["id"], "chart_type": facts["kind"], "title": facts["title"]}
            lines.append(json.dumps(line | {"csv": facts["csv"], "gen_code": code}) + "\n")
        write_atomically(run.out / f"gpt_score-{turn + 1}.jsonl", "".join(lines))

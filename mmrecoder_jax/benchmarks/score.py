"""Scores pairs of scripts by ChartMimic's low-level metrics or by Plot2Code's, in the executors.

    python -m mmrecoder_jax.env.score --pairs pairs.jsonl --out scores.jsonl --mode official
    python -m mmrecoder_jax.env.score --pairs pairs.jsonl --out scores.jsonl --metric plot2code
    python -m mmrecoder_jax.env.score --selftest

A row of the input is {"id", "gt_code", "gen_code"} (`gen_code` may be null: no code), a row of the
output {"id", "exec_ok", "text", "layout", "type", "color", "overall"}, scores in [0, 1], in the
order of the input. A code may be a whole answer with a fence (`env.response.answer_code`). A row
that cannot be scored is reported with its line number and left out. Kill it at any point; the same
command goes on after the rows that are written (`benchmarks.results`).

`--mode official` gives the benchmark's numbers, `--mode training` the reward's; docs/reward.md
compares them. The numbers published for ChartMimic come with `--keep code_pass` (a crashed script
scores 0) or `--keep no_filter` (it is scored on what it drew before), official mode only. `--metric
plot2code` writes {"id", "exec_ok", "text_match"} instead: whether the script passes, and its
text-match.
"""

import argparse
import collections
import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mmrecoder_jax.benchmarks.chartmimic_official import Keep, TargetFailed, official_pair
from mmrecoder_jax.benchmarks.plot2code import SECONDS as PLOT2CODE_SECONDS
from mmrecoder_jax.benchmarks.plot2code import plot2code_pair
from mmrecoder_jax.benchmarks.results import Results, input_file, output_file, row_key
from mmrecoder_jax.benchmarks.selftest import selftest
from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.build import environment_meta
from mmrecoder_jax.data.rows import JsonLines, RowError
from mmrecoder_jax.env import interpreter
from mmrecoder_jax.env.chartmimic import ScoreMode, Scores, score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.pools import Pools, separate_pools
from mmrecoder_jax.env.response import answer_code
from mmrecoder_jax.env.wire import Part

PARTS = (*Part, "overall")  # of a row, as `Scores` calls them


class Metric(enum.StrEnum):
    """Whose scores a pair gets."""

    CHARTMIMIC = "chartmimic"
    PLOT2CODE = "plot2code"


class BadRow(ValueError):
    """A row that cannot be scored; the message says why."""


def check_pair(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the code of its answers (`response.answer_code`); raises BadRow."""
    identity, code = row["id"], row["gen_code"]
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BadRow(f"id is {json.dumps(identity)[:40]}, neither text nor a whole number")
    if not isinstance(row["gt_code"], str):
        raise BadRow(f"gt_code is {json.dumps(row['gt_code'])[:40]}, not text")
    if not isinstance(code, str | None):
        raise BadRow(f"gen_code is {json.dumps(code)[:40]}, neither text nor null")
    target = answer_code(row["gt_code"])
    if not target.strip():
        raise BadRow("gt_code holds no code")
    return {"id": identity, "gt_code": target, "gen_code": answer_code(code or "") or None}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How pairs are scored.

    Attributes:
      mode: of ChartMimic's metric.
      keep: of a script that crashes, in official mode.
    """

    metric: str = Metric.CHARTMIMIC
    mode: str = ScoreMode.OFFICIAL
    keep: str = Keep.CODE_PASS

    @property
    def is_published(self) -> bool:
        """Whether it gives a benchmark's own numbers."""
        return self.metric == Metric.PLOT2CODE or self.mode == ScoreMode.OFFICIAL

    def __str__(self) -> str:
        if self.metric == Metric.PLOT2CODE:
            return "Plot2Code"
        if self.mode == ScoreMode.OFFICIAL:
            return f"official, {self.keep}"
        return f"{self.mode}, a crash scores 0"


def score_pair(pools: Pools, row: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """The output row of an input row; raises BadRow when the reference script fails."""
    try:
        if rule.metric == Metric.PLOT2CODE:
            passed, match = plot2code_pair(pools, row["gt_code"], row["gen_code"])
            return {"id": row["id"], "exec_ok": passed, "text_match": match}
        if rule.mode == ScoreMode.OFFICIAL:
            ran, scores = official_pair(
                pools, str(row["id"]), row["gt_code"], row["gen_code"] or "", rule.keep
            )
        else:
            ran, scores = _training_pair(pools, row)
    except TargetFailed as problem:
        raise BadRow(str(problem)) from problem
    return {"id": row["id"], "exec_ok": ran, **{part: getattr(scores, part) for part in PARTS}}


def _training_pair(pools: Pools, row: dict[str, Any]) -> tuple[bool, Scores]:
    # Both are queued before either is waited for.
    futures = [pools.references.submit(row["gt_code"]), pools.answers.submit(row["gen_code"])]
    target, execution = (future.result() for future in futures)
    if target.record is None:
        raise TargetFailed(f"the reference script failed: {target.error}")
    return execution.ok, score(execution.record if execution.ok else None, target.record)


def score_rows(
    pools: Pools,
    rows: JsonLines,
    rule: Rule,
    report: Callable[[int, str], None],
    done: Collection[str] = (),
) -> Iterator[dict[str, Any] | None]:
    """Output rows in the order of `rows`; None for one that cannot be scored.

    Args:
      report: called with the line number and the problem of a row that cannot be scored.
      done: keys (`results.row_key`) of rows that are scored already; nothing comes of them.
    """
    waiting: collections.deque[tuple[int, Future[dict[str, Any]] | BadRow]] = collections.deque()
    lines: dict[str, int] = {}  # key -> the line of its first row

    def first() -> dict[str, Any] | None:
        line, outcome = waiting.popleft()
        try:
            if isinstance(outcome, BadRow):
                raise outcome
            return outcome.result()
        except BadRow as problem:
            report(line, str(problem))
            return None

    with ThreadPoolExecutor(2 * pools.config.workers) as threads:
        for index in range(len(rows)):
            line = rows.line(index)
            try:
                pair = _pair(rows, index)
                key = row_key(pair)
                if lines.setdefault(key, line) != line:
                    raise BadRow(f"its id {key} was there before, in line {lines[key]}")
                if key in done:
                    continue
                waiting.append((line, threads.submit(score_pair, pools, pair, rule)))
            except BadRow as problem:
                waiting.append((line, problem))
            # Enough that the executors never wait, few enough that a large file is not read ahead.
            if len(waiting) >= 4 * pools.config.workers:
                yield first()
        while waiting:
            yield first()


def _pair(rows: JsonLines, index: int) -> dict[str, Any]:
    try:
        return check_pair(rows[index])
    except RowError as problem:
        raise BadRow(str(problem).removeprefix(rows.where(index)).lstrip(": ")) from problem


def summary(rows: list[dict[str, Any]], rule: Rule) -> str:
    """The means over `rows`, times 100, and what they mean."""
    if not rows:
        return "no row was scored"

    def mean(name: str, among: list[dict[str, Any]]) -> float:
        return 100 * sum(row[name] for row in among) / max(len(among), 1)

    passed = mean("exec_ok", rows)
    if rule.metric == Metric.PLOT2CODE:
        over_passing = mean("text_match", [row for row in rows if row["exec_ok"]])
        return (
            f"{len(rows)} pairs ({rule}): pass rate {passed:.1f} %  text-match {over_passing:.2f} "
            f"over passing scripts, {mean('text_match', rows):.2f} over all"
        )
    means = "  ".join(f"{part} {mean(part, rows):.2f}" for part in PARTS)
    return f"{len(rows)} pairs ({rule}): {means}  executed {passed:.1f} %"


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status is 1 when no row could be scored or the self-test failed."""
    parser = Parser(prog="python -m mmrecoder_jax.env.score", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", help="input, one JSON object per line: id, gt_code, gen_code")
    parser.add_argument("--out", help="output, one JSON object per line")
    # Plain strings: argparse shows the choices by repr.
    parser.add_argument("--metric", choices=[*map(str, Metric)], default="chartmimic")
    parser.add_argument(
        "--mode",
        choices=sorted(map(str, ScoreMode)),
        default="official",
        help="of ChartMimic's metric",
    )
    parser.add_argument(
        "--keep",
        choices=[*map(str, Keep)],
        default="code_pass",
        help="what a crashed script scores in official mode",
    )
    parser.add_argument(
        "--python", default="", help="of the executors, with its chart libraries; '': this one"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="executors of references, and as many of answers; about one per core",
    )
    parser.add_argument(
        "--selftest", action="store_true", help="print what known changes to a few charts score"
    )
    args = parser.parse_args(argv)
    with ending_in_one_line(args.traceback):
        if args.workers < 1:
            raise ConfigError(f"--workers={args.workers}: use 1 or more")
        python = interpreter.find(args.python, "--python")
        if args.selftest:
            with ExecutorPool(_environment(args)) as pool:
                return 0 if selftest(pool) else 1
        if not args.pairs or not args.out:
            raise ConfigError("give --pairs and --out, or --selftest")
        rule = Rule(args.metric, args.mode, args.keep)
        if rule.is_published and (others := python.unpublished()):
            print(_not_published(others), file=sys.stderr)
        return _score_file(args, rule)


def _not_published(releases: list[str]) -> str:
    return (
        f"note: the published numbers were made under other releases than {', '.join(releases)}; "
        f"for those make an environment with `{interpreter.SETUP}` and give --python=DIR/bin/python"
    )


def _environment(args: argparse.Namespace) -> EnvConfig:
    # ChartMimic's evaluator waits forever
    seconds = PLOT2CODE_SECONDS if args.metric == Metric.PLOT2CODE else 120.0
    return EnvConfig(
        workers=args.workers,
        python=args.python,
        wall_seconds=seconds,
        cpu_seconds=seconds,
        memory_mb=4096,
        replay_share=1.0,  # a score that is reported rests on what was drawn
    )


def _score_file(args: argparse.Namespace, rule: Rule) -> int:
    pairs, out = input_file("--pairs", args.pairs), output_file("--out", args.out)
    rows = JsonLines(pairs, ("id", "gt_code", "gen_code"), unique=False)
    if not len(rows):
        raise ConfigError(f"--pairs={pairs}: there is no row in it")
    config = _environment(args)
    releases = dict(interpreter.find(config.python).releases)
    made_of = {"rule": str(rule), "releases": releases} | environment_meta(config)

    def report(line: int, problem: str) -> None:
        print(f"\r{pairs}:{line}: {problem}", file=sys.stderr)

    with Results(out, pairs, made_of) as results, separate_pools(config) as pools:
        done, total = len(results.rows), len(rows)
        if done:
            print(f"{done} rows of {out} are scored already", file=sys.stderr)
        for row in score_rows(pools, rows, rule, report, frozenset(results.done)):
            if row is not None:
                results.add(row)
            done += 1
            bar = "#" * (30 * done // total)
            print(f"\r[{bar:<30}] {done}/{total}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    print(summary(results.rows, rule))
    return 0 if results.rows else 1

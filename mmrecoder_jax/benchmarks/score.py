"""Scores pairs of scripts by ChartMimic's low-level metrics or by Plot2Code's, in the executors.

    python -m mmrecoder_jax.env.score --pairs pairs.jsonl --out scores.jsonl --mode official
    python -m mmrecoder_jax.env.score --pairs pairs.jsonl --out scores.jsonl --metric plot2code
    python -m mmrecoder_jax.env.score --selftest

A row of the input is {"id", "gt_code", "gen_code"} (`gen_code` may be null: no code), a row of the
output {"id", "exec_ok", "text", "layout", "type", "color", "overall"}, scores in [0, 1], in the
order of the input. A row that cannot be scored is reported with its line number and left out.
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmrecoder_jax.benchmarks.chartmimic_official import Keep, TargetFailed, official_pair
from mmrecoder_jax.benchmarks.plot2code import SECONDS as PLOT2CODE_SECONDS
from mmrecoder_jax.benchmarks.plot2code import plot2code_pair
from mmrecoder_jax.benchmarks.selftest import selftest
from mmrecoder_jax.env.chartmimic import ScoreMode, Scores, score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.wire import Part

PARTS = (*Part, "overall")  # of a row, as `Scores` calls them


class Metric(enum.StrEnum):
    """Whose scores a pair gets."""

    CHARTMIMIC = "chartmimic"
    PLOT2CODE = "plot2code"


class BadRow(ValueError):
    """A row that cannot be scored; the message says why."""


def parse_row(line: bytes) -> dict[str, Any]:
    """One input row; raises BadRow."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as problem:
        raise BadRow(f"not JSON: {problem}") from problem
    if not isinstance(row, dict) or not {"id", "gt_code", "gen_code"} <= set(row):
        raise BadRow('a row is an object with "id", "gt_code" and "gen_code"')
    if (
        not isinstance(row["id"], str | int)
        or isinstance(row["id"], bool)
        or not isinstance(row["gt_code"], str)
        or not isinstance(row["gen_code"], str | None)
    ):
        raise BadRow("id is a string or a number, gt_code a string, gen_code a string or null")
    return row


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

    def __str__(self) -> str:
        if self.metric == Metric.PLOT2CODE:
            return "Plot2Code"
        if self.mode == ScoreMode.OFFICIAL:
            return f"official, {self.keep}"
        return f"{self.mode}, a crash scores 0"


def score_pair(pool: ExecutorPool, row: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """The output row of an input row; raises BadRow when the reference script fails."""
    try:
        if rule.metric == Metric.PLOT2CODE:
            passed, match = plot2code_pair(pool, row["gt_code"], row["gen_code"])
            return {"id": row["id"], "exec_ok": passed, "text_match": match}
        if rule.mode == ScoreMode.OFFICIAL:
            ran, scores = official_pair(
                pool, str(row["id"]), row["gt_code"], row["gen_code"] or "", rule.keep
            )
        else:
            ran, scores = _training_pair(pool, row)
    except TargetFailed as problem:
        raise BadRow(str(problem)) from problem
    return {"id": row["id"], "exec_ok": ran, **{part: getattr(scores, part) for part in PARTS}}


def _training_pair(pool: ExecutorPool, row: dict[str, Any]) -> tuple[bool, Scores]:
    # Both are queued before either is waited for.
    futures = [pool.submit(row[name]) for name in ("gt_code", "gen_code")]
    target, execution = (future.result() for future in futures)
    if target.record is None:
        raise TargetFailed(f"the reference script failed: {target.error}")
    return execution.ok, score(execution.record if execution.ok else None, target.record)


def score_lines(
    pool: ExecutorPool, lines: Iterable[bytes], rule: Rule, report: Callable[[int, str], None]
) -> Iterator[dict[str, Any] | None]:
    """Output rows in the order of `lines`; None for one that cannot be scored.

    Blank lines are skipped, but counted.

    Args:
      report: called with the line number and the problem of a row that cannot be scored.
    """
    waiting: collections.deque[tuple[int, Future[dict[str, Any]]]] = collections.deque()

    def first() -> dict[str, Any] | None:
        number, future = waiting.popleft()
        try:
            return future.result()
        except BadRow as problem:
            report(number, str(problem))
            return None

    def score_line(line: bytes) -> dict[str, Any]:
        return score_pair(pool, parse_row(line), rule)

    with ThreadPoolExecutor(2 * pool.config.workers) as threads:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            waiting.append((number, threads.submit(score_line, line)))
            # Enough that the executors never wait, few enough that a large file is not read ahead.
            if len(waiting) >= 4 * pool.config.workers:
                yield first()
        while waiting:
            yield first()


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
    parser = argparse.ArgumentParser(
        prog="python -m mmrecoder_jax.env.score", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--pairs", type=Path, help="input, one JSON object per line: id, gt_code, gen_code"
    )
    parser.add_argument("--out", type=Path, help="output, one JSON object per line")
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
    parser.add_argument("--workers", type=int, default=2, help="executors; about one per core")
    parser.add_argument(
        "--selftest", action="store_true", help="print what known changes to a few charts score"
    )
    args = parser.parse_args(argv)
    if not args.selftest and not (args.pairs and args.out):
        parser.error("give --pairs and --out, or --selftest")
    if args.workers < 1:
        parser.error(f"--workers={args.workers}: at least 1")
    if args.pairs and not args.pairs.is_file():
        parser.error(f"--pairs={args.pairs}: no such file")
    # ChartMimic's evaluator waits forever
    seconds = PLOT2CODE_SECONDS if args.metric == Metric.PLOT2CODE else 120.0
    config = EnvConfig(
        workers=args.workers, wall_seconds=seconds, cpu_seconds=seconds, memory_mb=4096
    )
    with ExecutorPool(config) as pool:
        if args.selftest:
            return 0 if selftest(pool) else 1
        return _score_file(pool, args.pairs, args.out, Rule(args.metric, args.mode, args.keep))


def _score_file(pool: ExecutorPool, pairs: Path, out: Path, rule: Rule) -> int:
    rows = []

    def report(number: int, problem: str) -> None:
        print(f"\r{pairs}:{number}: {problem}", file=sys.stderr)

    with pairs.open("rb") as lines:
        total = sum(bool(line.strip()) for line in lines)
    with pairs.open("rb") as lines, out.open("w", encoding="utf-8") as scores:
        for done, row in enumerate(score_lines(pool, lines, rule, report), 1):
            if row is not None:
                rows.append(row)
                scores.write(json.dumps(row) + "\n")
                scores.flush()
            bar = "#" * (30 * done // total)
            print(f"\r[{bar:<30}] {done}/{total}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(summary(rows, rule))
    return 0 if rows else 1

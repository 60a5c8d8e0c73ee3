"""Scores pairs of scripts by ChartMimic's low-level metrics, in the sandboxed executors.

    python -m mmrecoder_jax.env.score --pairs pairs.jsonl --out scores.jsonl --mode official --workers 4
    python -m mmrecoder_jax.env.score --selftest

A row of the input is {"id", "gt_code", "gen_code"} (`gen_code` may be null: no code), a row of the output {"id", "exec_ok", "text",
"layout", "type", "color", "overall"}, scores in [0, 1], in the order of the input. A row that cannot be scored is reported with its line
number and left out. `--mode official` gives the benchmark's numbers, `--mode training` the reward's; docs/reward.md compares them. The
numbers published for ChartMimic come with `--keep code_pass` (a crashed script scores 0) or `--keep no_filter` (it is scored on what it
drew before), official mode only.
"""

import argparse
import collections
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmrecoder_jax.env.chartmimic import MODES, score
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.official import FILTERS, TargetFailed, official_pair
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.selftest import selftest

PARTS = ("text", "layout", "type", "color", "overall")


class BadRow(ValueError):
    """A row that cannot be scored; the message says why."""


def parse_row(line: str) -> dict[str, Any]:
    """One input row; raises BadRow."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as problem:
        raise BadRow(f"not JSON: {problem}") from problem
    if not isinstance(row, dict) or not {"id", "gt_code", "gen_code"} <= set(row):
        raise BadRow('a row is an object with "id", "gt_code" and "gen_code"')
    if not isinstance(row["id"], str | int) or not isinstance(row["gt_code"], str) or not isinstance(row["gen_code"], str | None):
        raise BadRow("id is a string or a number, gt_code a string, gen_code a string or null")
    return row


def score_pair(pool: ExecutorPool, row: dict[str, Any], mode: str = "training", keep: str = "code_pass") -> dict[str, Any]:
    """The output row of an input row; raises BadRow when the reference script fails."""
    if mode == "official":
        try:
            ran, scores = official_pair(pool, str(row["id"]), row["gt_code"], row["gen_code"] or "", keep)
        except TargetFailed as problem:
            raise BadRow(str(problem)) from problem
    else:
        futures = [pool.submit(row[name], render=False) for name in ("gt_code", "gen_code")]
        target, execution = (future.result() for future in futures)
        if target.record is None:
            raise BadRow(f"the reference script failed: {target.error}")
        ran, scores = execution.ok, score(execution.record if execution.ok else None, target.record)
    return {"id": row["id"], "exec_ok": ran, **{part: getattr(scores, part) for part in PARTS}}


def score_lines(
    pool: ExecutorPool, lines: Iterator[str], mode: str, keep: str, report: Callable[[int, str], None]
) -> Iterator[dict[str, Any] | None]:
    """Output rows in the order of `lines`, None for a row that cannot be scored, which goes to `report` with its line number."""
    waiting: collections.deque[tuple[int, Future[dict[str, Any]]]] = collections.deque()

    def first() -> dict[str, Any] | None:
        number, future = waiting.popleft()
        try:
            return future.result()
        except BadRow as problem:
            report(number, str(problem))
            return None

    with ThreadPoolExecutor(2 * pool.config.workers) as threads:
        for number, line in enumerate(lines, 1):
            waiting.append((number, threads.submit(lambda line=line: score_pair(pool, parse_row(line), mode, keep))))
            if len(waiting) >= 4 * pool.config.workers:
                yield first()
        while waiting:
            yield first()


def summary(rows: list[dict[str, Any]], mode: str, keep: str) -> str:
    """The means over `rows`, times 100, and what they mean."""
    if not rows:
        return "no row was scored"
    named = f"{mode}, {keep}" if mode == "official" else f"{mode}, a crash scores 0"
    means = "  ".join(f"{part} {100 * sum(row[part] for row in rows) / len(rows):.2f}" for part in PARTS)
    return f"{len(rows)} pairs ({named}): {means}  executed {100 * sum(row['exec_ok'] for row in rows) / len(rows):.1f} %"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 when no row could be scored or the self-test failed."""
    parser = argparse.ArgumentParser(prog="python -m mmrecoder_jax.env.score", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=Path, help="input, one JSON object a line: id, gt_code, gen_code")
    parser.add_argument("--out", type=Path, help="output, one JSON object a line")
    parser.add_argument("--mode", choices=sorted(MODES), default="official")
    parser.add_argument("--keep", choices=FILTERS, default="code_pass", help="what a crashed script scores in official mode")
    parser.add_argument("--workers", type=int, default=2, help="executors; about one a core")
    parser.add_argument("--selftest", action="store_true", help="print what known changes to a few charts score")
    args = parser.parse_args(argv)
    if not args.selftest and not (args.pairs and args.out):
        parser.error("give --pairs and --out, or --selftest")
    with ExecutorPool(EnvConfig(workers=args.workers)) as pool:
        if args.selftest:
            return 0 if selftest(pool) else 1
        return _score_file(pool, args)


def _score_file(pool: ExecutorPool, args: argparse.Namespace) -> int:
    lines = [line for line in args.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = []

    def report(number: int, problem: str) -> None:
        print(f"\r{args.pairs}:{number}: {problem}", file=sys.stderr)

    with args.out.open("w", encoding="utf-8") as out:
        for done, row in enumerate(score_lines(pool, iter(lines), args.mode, args.keep, report), 1):
            if row is not None:
                rows.append(row)
                out.write(json.dumps(row) + "\n")
            bar = "#" * (30 * done // len(lines))
            print(f"\r[{bar:<30}] {done}/{len(lines)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(summary(rows, args.mode, args.keep))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())

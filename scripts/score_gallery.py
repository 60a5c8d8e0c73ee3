"""Whether real charts score exactly 1 against themselves, in two executions of their own.

    python scripts/score_gallery.py GALLERY [--count 0] [--workers 1] [--python P --other Q]

GALLERY is a chart directory (docs/data.md). Each row's code runs in two executors that share
nothing; their records are scored against each other in training mode, and the second against the
record stored in the directory. Prints every chart of which a part is below 1, and counts. Exit
status 1 when two executions do not agree; a stored record may follow older rules, and is only
counted. With `--python` and `--other` the two executors run on other interpreters, so that the
scores of two releases of matplotlib are compared.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmrecoder_jax.benchmarks.score import PARTS
from mmrecoder_jax.env import EnvConfig, ExecutorPool, Record
from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.execution import Replay


def below_one(scores: Scores) -> str:
    """The parts that are not exactly 1, empty when all are."""
    return " ".join(
        f"{part} {getattr(scores, part):.6f}" for part in PARTS if getattr(scores, part) != 1.0
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gallery", type=Path)
    parser.add_argument(
        "--count", type=int, default=0, help="rows, spread over the directory; 0 is all"
    )
    parser.add_argument("--python", default="", help="of the first executor; '': this one")
    parser.add_argument("--other", default="", help="of the second executor; '': this one")
    parser.add_argument("--workers", type=int, default=1, help="executors of each of the two pools")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.gallery / "charts.jsonl").read_text().splitlines()]
    rows = rows[:: max(1, len(rows) // args.count)][: args.count] if args.count else rows
    meta = json.loads((args.gallery / "meta.json").read_text())
    config = EnvConfig(
        workers=args.workers,
        dpi=meta["dpi"],
        rc_params=meta["rc_params"],
        wall_seconds=120.0,
        cpu_seconds=60.0,
        cache_size=0,
        replay_share=0.0,
    )
    watched = dataclasses.replace(config, python=args.python, replay_share=1.0)
    config = dataclasses.replace(config, python=args.other)
    failed = differing = outdated = undecided = 0
    with ExecutorPool(watched) as first, ExecutorPool(config) as second:
        pairs = [(first.submit(row["code"]), second.submit(row["code"])) for row in rows]
        for row, (a, b) in zip(rows, pairs, strict=True):
            a, b = a.result(), b.result()
            undecided += a.replay == Replay.UNDECIDED
            if a.flags or b.flags:
                print(f"{row['id']}: flags {a.flags} and {b.flags}", flush=True)
            if a.record is None or b.record is None:
                failed += 1
                error = (a.error or b.error)[-200:] or "its record does not follow from its drawing"
                print(f"{row['id']}: {a.status} and {b.status}: {error!r}", flush=True)
                continue
            if parts := below_one(score(a.record, b.record)):
                differing += 1
                print(f"{row['id']}: two executions: {parts}", flush=True)
            if parts := below_one(score(b.record, Record.from_json(row["record"]))):
                outdated += 1
                print(f"{row['id']}: the stored record: {parts}", flush=True)
    equal = len(rows) - failed - differing
    agreement = f"{equal} score exactly 1 in two executions, {differing} do not, {failed} fail"
    print(f"{len(rows)} charts: {agreement}")
    print(f"{outdated} stored records differ; {undecided} drawings cannot be replayed")
    return bool(failed or differing)


if __name__ == "__main__":
    sys.exit(main())

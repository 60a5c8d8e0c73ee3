"""Whether real scripts come out of the sandbox as they come out of no sandbox.

    python scripts/compare_sandbox.py GALLERY [--count 0] [--wall-seconds 120]

GALLERY is a chart directory (docs/data.md). Each row's code runs in an executor with the default
sandbox and in one without any (`sandbox="unsafe"`); status, error text, picture and record must be
equal. Prints every row that differs, with both results, and what the replay of the display list
says of each (hidden texts, forged records, what cannot be replayed). Exit status 1 when a row
differs.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmrecoder_jax.env import EnvConfig, Execution, ExecutorPool
from mmrecoder_jax.env.execution import Replay
from mmrecoder_jax.env.sandbox.confinement import SandboxMode
from mmrecoder_jax.env.wire import Flag


def same(a: Execution, b: Execution) -> list[str]:
    """The names of the fields in which two executions differ."""
    names = [name for name in ("status", "error", "record") if getattr(a, name) != getattr(b, name)]
    if a.image is None or b.image is None:
        equal = a.image is b.image
    else:
        equal = np.array_equal(a.image, b.image)
    return names if equal else [*names, "image"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gallery", type=Path)
    parser.add_argument(
        "--count", type=int, default=0, help="rows, spread over the directory; 0 is all"
    )
    parser.add_argument("--wall-seconds", type=float, default=120.0)
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.gallery / "charts.jsonl").read_text().splitlines()]
    rows = rows[:: max(1, len(rows) // args.count)][: args.count] if args.count else rows
    meta = json.loads((args.gallery / "meta.json").read_text())
    config = EnvConfig(
        workers=1,
        dpi=meta["dpi"],
        rc_params=meta["rc_params"],
        cache_size=0,
        wall_seconds=args.wall_seconds,
        cpu_seconds=args.wall_seconds / 2,
    )
    contained = dataclasses.replace(config, sandbox=SandboxMode.AUTO, replay_share=1.0)
    free = dataclasses.replace(config, sandbox=SandboxMode.UNSAFE, replay_share=0.0)
    with ExecutorPool(contained) as inside, ExecutorPool(free) as outside:
        pairs = [(inside.submit(row["code"]), outside.submit(row["code"])) for row in rows]
        statuses: Counter[str] = Counter()
        differing = 0
        for row, (first, second) in zip(rows, pairs, strict=True):
            a, b = first.result(), second.result()
            statuses[str(a.status)] += 1
            if fields := same(a, b):
                differing += 1
                print(f"{row['id']}: {', '.join(fields)} differ")
                print(f"  sandbox    {a.status} {a.error!r}\n  no sandbox {b.status} {b.error!r}")
            if {Flag.HIDDEN_TEXT, Flag.FORGED} & {*a.flags} or a.replay == Replay.UNDECIDED:
                print(f"{row['id']}: replay {a.replay} {' '.join(a.flags)}", flush=True)
        cost = inside.stats()["cpu_seconds"] / outside.stats()["cpu_seconds"]
        counts = f"{len(rows)} scripts, {dict(statuses)}, {differing} differ"
        print(f"{counts}; CPU of the scripts inside / outside {cost:.3f}")
        shown = ("replays", "rate", "flag")
        stats = inside.stats().items()
        print({name: round(value, 4) for name, value in stats if name.startswith(shown)})
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())

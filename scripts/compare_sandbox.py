"""Whether real scripts come out of the sandbox as they come out of no sandbox.

    python scripts/compare_sandbox.py GALLERY [--count 0] [--wall-seconds 120]

GALLERY is a chart directory (docs/data.md). Each row's code runs in an executor with the default
sandbox and in one without any (`sandbox="unsafe"`); status, error text, picture and record must be
equal. Prints every row that differs, with both results, and what the replay of the display list
says of each (hidden texts, forged records, what cannot be replayed). Exit status 1 when a row
differs.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmrecoder_jax.env import EnvConfig, Execution, ExecutorPool


def same(a: Execution, b: Execution) -> list[str]:
    """The names of the fields in which two executions differ."""
    names = [name for name in ("status", "error", "record") if getattr(a, name) != getattr(b, name)]
    if (a.image is None) != (b.image is None) or (
        a.image is not None and not np.array_equal(a.image, b.image)
    ):
        names.append("image")
    return names


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
    limits = {"wall_seconds": args.wall_seconds, "cpu_seconds": args.wall_seconds / 2}
    config = {
        "workers": 1,
        "dpi": meta["dpi"],
        "rc_params": meta["rc_params"],
        "cache_size": 0,
        **limits,
    }
    with (
        ExecutorPool(EnvConfig(sandbox="auto", replay_share=1.0, **config)) as inside,
        ExecutorPool(EnvConfig(sandbox="unsafe", replay_share=0.0, **config)) as outside,
    ):
        pairs = [(inside.submit(row["code"]), outside.submit(row["code"])) for row in rows]
        statuses, differing = Counter(), 0
        for row, (contained, free) in zip(rows, pairs, strict=True):
            a, b = contained.result(), free.result()
            statuses[str(a.status)] += 1
            if fields := same(a, b):
                differing += 1
                print(
                    f"{row['id']}: {', '.join(fields)} differ\n  sandbox    {a.status} {a.error!r}\n  no sandbox {b.status} {b.error!r}"
                )
            if "hidden_text" in a.flags or "forged" in a.flags or a.replay == "undecided":
                print(f"{row['id']}: replay {a.replay} {' '.join(a.flags)}", flush=True)
        cost = inside.stats()["cpu_seconds"] / outside.stats()["cpu_seconds"]
        print(
            f"{len(rows)} scripts, {dict(statuses)}, {differing} differ; CPU of the scripts inside / outside {cost:.3f}"
        )
        print(
            {
                name: round(value, 4)
                for name, value in inside.stats().items()
                if name.startswith(("replays", "rate", "flag"))
            }
        )
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())

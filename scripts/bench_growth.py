"""How a rollout's cost grows with rows, length, turns, and slots that stay empty, on this machine.

    python scripts/bench_growth.py [--out docs/growth.png] [--repeats 5]

Rollouts of the tiny preset with random weights (`bench_rollout.runner`: scripts are not run). Each
point is the median of so many rollouts after one that compiles; points of a series take turns, so
that a slow minute of the machine meets all of them. An exponent is the slope of a line through
log(cost) over log(size): 1 is proportional, 0 is for nothing.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from bench_rollout import runner

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmrecoder_jax.models.config import PRESETS
from mmrecoder_jax.models.qwen2_5_vl import init_params

SERIES = {
    "rows": (8, 16, 32, 64, 128),
    "response length": (128, 256, 512, 1024, 2048),
    "turns": (1, 2, 3, 4),
    "slots, times what is needed": (1, 2, 4, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="docs/growth.png", help="the picture to write")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = dataclasses.replace(PRESETS["tiny"], dtype="float32", remat="none")
    params = init_params(config, jax.random.key(0))

    def rollout(series: str, size: int) -> Callable[[], int]:
        rows, length, turns, room = 32, 128, 1, 1
        if series == "rows":
            rows = size
        elif series == "response length":
            rows, length = 8, size
        elif series == "turns":
            length, turns = 64, size
        else:
            room = size
        return runner(config, params, rows, np.full(rows, length), 32, turns, room)

    found: dict[str, list[tuple[int, float]]] = {}
    for series, sizes in SERIES.items():
        runs = {size: rollout(series, size) for size in sizes}
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for repeat in range(args.repeats + 1):
            for size, run in runs.items():
                start = time.perf_counter()
                run()
                if repeat:  # the first compiles
                    seconds[size].append(time.perf_counter() - start)
        found[series] = [(size, statistics.median(times)) for size, times in seconds.items()]
        shown = ", ".join(f"{size}: {cost:.3f} s" for size, cost in found[series])
        print(f"{series}: {shown}; exponent {exponent(found[series]):.2f}", flush=True)
    _draw(found, args.out)


def exponent(points: list[tuple[int, float]]) -> float:
    """The slope of log(cost) over log(size)."""
    sizes, costs = np.log(np.array(points)).T
    return float(np.polyfit(sizes, costs, 1)[0])


def _draw(found: dict[str, list[tuple[int, float]]], path: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(13, 3.2), layout="constrained")
    for ax, (series, points) in zip(axes, found.items(), strict=True):
        sizes, costs = zip(*points, strict=True)
        ax.loglog(sizes, costs, "o-")
        ax.loglog(sizes, [costs[0] * size / sizes[0] for size in sizes], ":", color="grey")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.set(xlabel=series, title=f"exponent {exponent(points):.2f}")
    axes[0].set_ylabel("seconds a rollout")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

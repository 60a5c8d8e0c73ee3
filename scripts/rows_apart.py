"""What tokens in common and packing change about RL: its time, and nothing that is learnt.

    python scripts/rows_apart.py --workdir=runs/rows --cold=runs/tiny --steps=24 --minutes=30

trains stage 1 three times from one cold start with one seed. The rows of its updates

    together    share the tokens that they begin with, one behind the other: as always
    apart       stand one behind the other, and share none
    padded      are as long as a bucket of `data.lengths`, and share none

so that the runs differ by roundings alone. (A picture is read once in all of them.) Written below
the work directory: a run per kind, rows_apart.jsonl with reward and seconds of every step,
rows_apart.md and rows_apart.png, which are made from it alone (--table).

Flags `--config.FIELD=VALUE` go to every run. Everything resumes: kill it, or give --minutes, and
the same command goes on.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
from experiment import (
    ROOT,
    Flags,
    Piece,
    carry_out,
    check_fields_known,
    flags_of,
    read_rows,
    write_rows,
)
from matplotlib.figure import Figure
from rows_worker import KINDS

from mmrecoder_jax.command import ending_in_one_line
from mmrecoder_jax.config import STAGES, ConfigError
from mmrecoder_jax.pipeline import has_finished
from mmrecoder_jax.reporting.tables import table_markdown

STAGE = "stage1"
RESULTS, TABLES, CURVES = (f"rows_apart.{kind}" for kind in ("jsonl", "md", "png"))
WARM = 2  # first steps, which compile: their seconds do not count


def main() -> None:
    parser = flags_of(__doc__)
    parser.add_argument("--cold", type=Path, help="finished pipeline with cold starts and charts")
    parser.add_argument("--steps", type=int, default=24, help="updates of a run")
    args, flags = parser.parse_known_args()
    with ending_in_one_line(args.traceback):
        check_fields_known(flags, (STAGE,), args.size)
        if args.cold is None and not args.table:
            raise ConfigError("--cold: name the finished pipeline that the runs are to start from")
        if args.steps <= WARM:
            raise ConfigError(f"--steps={args.steps}: use more than {WARM}, which compile")
        workdir = args.workdir
        carry_out(
            args,
            (piece(args, tuple(flags), kind) for kind in KINDS),
            lambda: collect(workdir),
            lambda: tables(workdir),
            workdir / RESULTS,
        )


def piece(args: argparse.Namespace, flags: tuple[str, ...], kind: str) -> Piece:
    """The run of one kind."""
    directory = args.workdir / kind
    command = (
        sys.executable,
        str(ROOT / "scripts" / "rows_worker.py"),
        f"--rows={kind}",
        f"--config={STAGE}:{args.size}",
        f"--workdir={directory}",
        f"--config.init_from={args.cold / STAGES[1]}",
        f"--config.train.steps={args.steps}",
        *Flags(args.size, args.cold / "data", flags).of(STAGE),
    )
    return Piece(f"rows {kind}", command, has_finished(STAGE, str(directory)))


def collect(workdir: Path) -> None:
    """Writes `rows_apart.jsonl` from the metrics of the runs."""
    rows = []
    for kind in KINDS:
        path = workdir / kind / "metrics.jsonl"
        if not path.is_file():
            continue
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        steps = {line["step"]: line for line in lines if "turn2/reward" in line}
        rows += [
            {
                "rows": kind,
                "step": step,
                "reward": line["turn2/reward"],
                "update seconds": line["seconds/update"],
                "step seconds": line["seconds/step"],
            }
            for step, line in sorted(steps.items())
        ]
    write_rows(workdir / RESULTS, rows)


def tables(workdir: Path) -> str:
    """Writes `rows_apart.md` and draws `rows_apart.png` from `rows_apart.jsonl`; returns the text.

    Raises:
      ConfigError: there are no results.
    """
    runs: dict[str, list[dict[str, float]]] = {}
    for row in read_rows(workdir / RESULTS, "run it first"):
        runs.setdefault(row["rows"], []).append(row)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    found = []
    first = next(iter(runs.values()))
    for kind, steps in runs.items():
        reward = np.array([step["reward"] for step in steps])
        base = np.array([step["reward"] for step in first])
        seconds = np.cumsum([step["update seconds"] for step in steps])
        for ax, along in zip(axes, (np.arange(1, len(reward) + 1), seconds), strict=True):
            ax.plot(along, np.cumsum(reward) / np.arange(1, len(reward) + 1), label=kind)
        both = min(len(reward), len(base))
        apart = reward[:both] - base[:both]
        found.append(
            {
                "rows": kind,
                "steps": str(len(steps)),
                "reward of turn 2": f"{reward.mean():.4f}",
                "above the first's": f"{apart.mean():+.4f}",
                "farthest step": f"{abs(apart).max():.4f}",
                **_times("update", steps, first),
                **_times("step", steps, first),
            }
        )
    axes[0].set(xlabel="steps", ylabel="mean reward of turn 2 so far")
    axes[1].set(xlabel="seconds of updates")
    axes[1].legend()
    figure.savefig(workdir / CURVES, dpi=100)
    text = table_markdown(found) + "\n"
    (workdir / TABLES).write_text(text, encoding="utf-8")
    return text


def _times(
    what: str, steps: list[dict[str, float]], first: list[dict[str, float]]
) -> dict[str, str]:
    """The median of a time in seconds, and how many times the first's it is."""
    own, base = (
        statistics.median([step[f"{what} seconds"] for step in run][WARM:] or [np.nan])
        for run in (steps, first)
    )
    return {f"seconds per {what}": f"{own:.2f} ({own / base:.2f})"}


if __name__ == "__main__":
    main()

"""What an author makes of charts: each turn, and the turn that each way of choosing hands over.

    python scripts/try_author.py --charts=runs/tiny/data/test --count=10 --picture=docs/results.png
    python scripts/try_author.py --charts=runs/tiny/data/gallery --charts=photo.jpg

A chart directory has records, so its charts have scores; pictures have likenesses alone. The tables
are printed as Markdown. The picture shows the chart and every turn of the first charts.
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.data.sources import Chart, ChartDirectory
from mmrecoder_jax.drawing.choosing import Select, choose
from mmrecoder_jax.drawing.drawing import Drawing, draw
from mmrecoder_jax.drawing.open import Who, author_config, keep_programs, open_author
from mmrecoder_jax.drawing.pictures import Found, read
from mmrecoder_jax.images import decode

SHOWN = 10  # rows of the picture, of each set


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--charts", action="append", required=True, help="a chart directory, or a picture")
    add("--count", type=int, default=10, help="charts of a directory, evenly spread")
    add("--checkpoint", default="", help="by default the policy in the box")
    add("--turns", type=int, default=4, help="of a conversation")
    add("--samples", type=int, default=1, help="of each chart; several at temperature 1")
    add("--picture", default="", help="PNG file to write")
    args = parser.parse_args()
    with ending_in_one_line(args.traceback):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Draws, prints the tables, writes the picture."""
    who = Who(args.checkpoint)
    config = author_config(who)
    keep_programs()
    sets = {path: charts_at(path, args.count, config.data.instruction) for path in args.charts}
    drawn: dict[str, list[Drawing]] = {}
    with open_author(who, config=config) as author:
        for path, charts in sets.items():
            found = dict(
                draw(
                    author,
                    charts,
                    turns=args.turns,
                    samples=args.samples,
                    temperature=1.0 if args.samples > 1 else 0.0,
                    seed=0,
                    select=Select.VISUAL,
                )
            )
            drawn[path] = [found[number] for number in range(len(charts))]
            print(f"\n{path}: {len(charts)}\n\n{table(drawn[path], args.turns)}")
    if args.picture:
        shown = [drawing for drawings in drawn.values() for drawing in drawings[:SHOWN]]
        save(picture(shown, args.turns), args.picture)


def save(figure: Figure, path: str) -> None:
    """Writes a figure as a small PNG, of 96 colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    Image.open(buffer).convert("RGB").quantize(96).save(path, "PNG", optimize=True)


def charts_at(path: str, count: int, instruction: str) -> list[Chart]:
    """Charts of a directory, evenly spread; or the one in a picture."""
    if not os.path.isdir(path):
        return [read(Found(path), instruction)]
    charts = ChartDirectory(path, instruction)
    picks = np.unique(np.linspace(0, len(charts) - 1, min(count, len(charts))).astype(int))
    return [charts[int(number)] for number in picks]


def table(drawings: Sequence[Drawing], turns: int) -> str:
    """Means over charts: of each turn of the first sample, and of what is handed over."""
    rows = [("turn", "runs", "low-level", "likeness")]
    for turn in range(turns):
        rows.append(row(f"{turn + 1}", drawings, [(0, turn)] * len(drawings)))
    for select in (Select.VISUAL, Select.LAST):
        if select == Select.LAST and len(drawings[0].samples) > 1:
            continue
        chosen = [choose(drawing.samples, drawing.alike, select) for drawing in drawings]
        places = [None if one is None else (one.sample, one.turn) for one in chosen]
        rows.append(row(f"handed over: {select}", drawings, places))
    rows.insert(1, ("---",) * len(rows[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(
    name: str, drawings: Sequence[Drawing], places: Sequence[tuple[int, int] | None]
) -> tuple[str, str, str, str]:
    """Turns at these places: (name, percent that run, low-level score in percent, likeness). A turn
    that does not run counts as 0 in both means.
    """
    runs, scores, likenesses = [], [], []
    for drawing, place in zip(drawings, places, strict=True):
        turn = None if place is None else drawing.samples[place[0]].turns[place[1]]
        runs.append(turn is not None and turn.execution.ok)
        scores.append(0.0 if turn is None else turn.scores.overall)
        alike = math.nan if place is None else drawing.alike[place[0]][place[1]]
        likenesses.append(0.0 if math.isnan(alike) else alike)
    low = "" if np.isnan(scores).any() else f"{100 * np.mean(scores):.1f}"
    return name, f"{100 * np.mean(runs):.0f}", low, f"{np.mean(likenesses):.2f}"


def picture(drawings: Sequence[Drawing], turns: int) -> Figure:
    """A row per chart: the chart and the turns of the sample that is handed over."""
    figure = Figure(figsize=(1.9 * (turns + 1), 1.45 * len(drawings)), layout="constrained")
    grid = figure.subplots(len(drawings), turns + 1, squeeze=False)
    style = {"ha": "center", "va": "center", "fontsize": 7}
    for axes, drawing in zip(grid, drawings, strict=True):
        sample = 0 if drawing.choice is None else drawing.choice.sample
        axes[0].imshow(np.asarray(decode(drawing.chart.image)))
        axes[0].set_title("chart", fontsize=7)
        for number, (ax, turn) in enumerate(
            zip(axes[1:], drawing.samples[sample].turns, strict=True)
        ):
            chosen = drawing.choice is not None and drawing.choice.turn == number
            title = f"turn {number + 1}"
            if turn.scores.known:
                title += f": {100 * turn.scores.overall:.0f}"
            ax.set_title(title, fontsize=7, weight="bold" if chosen else "normal")
            if turn.execution.image is None:
                ax.text(0.5, 0.5, str(turn.execution.status), transform=ax.transAxes, **style)
            else:
                ax.imshow(turn.execution.image)
        for ax in axes:
            ax.axis("off")
    return figure


if __name__ == "__main__":
    sys.exit(main())

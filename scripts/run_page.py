"""What a finished pipeline run shows, for a page: its table as Markdown on the output, and a
picture of trajectories.

    python scripts/run_page.py --run=runs/tiny --picture=docs/tiny.png

The picture holds, of the last stage on the evaluation split, decoded greedily: the conversation
whose last turn gained most, the one that lost most, and two whose score did not change.
"""

import io
import json
from pathlib import Path

from absl import app, flags
from matplotlib.figure import Figure
from PIL import Image

from mmrecoder_jax.config import STAGES
from mmrecoder_jax.data.sources import ChartDirectory
from mmrecoder_jax.evaluation import table_rows
from mmrecoder_jax.reporting.html import TrajectoryView
from mmrecoder_jax.reporting.report import trajectory_views

_RUN = flags.DEFINE_string("run", "runs/tiny", "Work directory of a finished pipeline.")
_SPLIT = flags.DEFINE_string("split", "test", "Charts that the picture shows.")
_PICTURE = flags.DEFINE_string("picture", None, "PNG file to write.", required=True)


def markdown(rows: list[dict[str, str]]) -> str:
    """A table of all columns that any row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([str(row.get(column, "")) for column in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def chosen(views: list[TrajectoryView]) -> list[TrajectoryView]:
    """Most gained, most lost, two unchanged; of conversations whose first turn executes."""
    views = sorted(
        (view for view in views if view.turns[0].ok),
        key=lambda view: view.turns[1].overall - view.turns[0].overall,
    )
    same = [view for view in views[1:-1] if view.turns[1].overall == view.turns[0].overall]
    return [views[-1], views[0], *same[:2]]


def picture(views: list[TrajectoryView]) -> Figure:
    """Target, first and second turn side by side, a row a conversation."""
    figure = Figure(figsize=(6, 1.55 * len(views)), layout="constrained")
    grid = figure.subplots(len(views), 3, squeeze=False)
    for axes, view in zip(grid, views, strict=True):
        renders = [view.target_png, *(turn.render_png for turn in view.turns[:2])]
        titles = [
            "target",
            *(
                f"turn {i}: low-level {100 * turn.overall:.0f}"
                for i, turn in enumerate(view.turns[:2], start=1)
            ),
        ]
        for ax, render, title in zip(axes, renders, titles, strict=True):
            ax.set_title(title, fontsize=7)
            ax.axis("off")
            if render is None:
                ax.text(
                    0.5,
                    0.5,
                    "does not run",
                    ha="center",
                    va="center",
                    fontsize=7,
                    transform=ax.transAxes,
                )
            else:
                ax.imshow(Image.open(io.BytesIO(render)))
    return figure


def main(argv: list[str]):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    run = Path(_RUN.value)
    results = [run / stage / "evaluation.json" for stage in STAGES]
    missing = [str(path) for path in results if not path.is_file()]
    if missing:
        raise SystemExit(f"{run} is no finished pipeline run: {missing[0]} is missing")
    print(markdown(table_rows([row for path in results for row in json.loads(path.read_text())])))
    charts = ChartDirectory(run / "data" / _SPLIT.value)
    by_id = {chart.id: chart for chart in (charts[i] for i in range(len(charts)))}
    views = trajectory_views(
        str(run / STAGES[-1] / "evaluation" / f"{_SPLIT.value}-greedy"), by_id, len(by_id)
    )
    picture(chosen(views)).savefig(_PICTURE.value, dpi=150)


if __name__ == "__main__":
    app.run(main)

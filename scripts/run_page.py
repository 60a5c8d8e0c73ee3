"""What a finished pipeline run shows, for a page: a table and a picture.

    python scripts/run_page.py --run=runs/tiny --picture=docs/tiny.png

The table is printed as Markdown. The picture shows trajectories of the last stage on the evaluation
split, decoded greedily: the one whose last turn gained most, the one that lost most, and two whose
score did not change.
"""

import json
from pathlib import Path

from absl import flags
from matplotlib.figure import Figure
from PIL import Image

from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import STAGES, ConfigError
from mmrecoder_jax.evaluation import table_rows
from mmrecoder_jax.reporting.tables import table_markdown
from mmrecoder_jax.reporting.trajectories import TrajectoryView, read_views
from mmrecoder_jax.rl.correction import improved, regressed

_RUN = flags.DEFINE_string("run", "runs/tiny", "Work directory of a finished pipeline.")
_SPLIT = flags.DEFINE_string("split", "test", "Charts that the picture shows.")
_PICTURE = flags.DEFINE_string("picture", None, "PNG file to write.", required=True)


def chosen(views: list[TrajectoryView]) -> list[TrajectoryView]:
    """Most gained, most lost, two unchanged; of trajectories whose first turn executes."""
    counted = [view for view in views if view.turns[0].ok]
    counted.sort(key=lambda view: view.turns[1].overall - view.turns[0].overall)
    same = [view for view in counted[1:-1] if _is_unchanged(view)]
    return [counted[-1], counted[0], *same[:2]]


def _is_unchanged(view: TrajectoryView) -> bool:
    first, second = view.turns[0].overall, view.turns[1].overall
    return not improved(first, second) and not regressed(first, second)


def picture(views: list[TrajectoryView]) -> Figure:
    """Target, first and second turn side by side, one row per trajectory."""
    figure = Figure(figsize=(6, 1.55 * len(views)), layout="constrained")
    grid = figure.subplots(len(views), 3, squeeze=False)
    for axes, view in zip(grid, views, strict=True):
        renders = [view.target, *(turn.render for turn in view.turns[:2])]
        titles = ["target"]
        for i, turn in enumerate(view.turns[:2], start=1):
            titles.append(f"turn {i}: low-level {100 * turn.overall:.0f}")
        for ax, render, title in zip(axes, renders, titles, strict=True):
            ax.set_title(title, fontsize=7)
            ax.axis("off")
            if render is None:
                style = {"ha": "center", "va": "center", "fontsize": 7}
                ax.text(0.5, 0.5, "does not run", transform=ax.transAxes, **style)
            else:
                ax.imshow(Image.open(render))
    return figure


def main() -> None:
    run = Path(_RUN.value)
    results = [run / stage / "evaluation.json" for stage in STAGES]
    missing = [str(path) for path in results if not path.is_file()]
    if missing:
        raise ConfigError(f"{run} is no finished pipeline run: {missing[0]} is missing")
    rows = [row for path in results for row in json.loads(path.read_text())]
    print(table_markdown(table_rows(rows)))
    directory = f"{STAGES[-1]}/evaluation/{_SPLIT.value}-greedy"
    images = run / "data" / _SPLIT.value / "images"
    path = run / directory / "000000.jsonl"
    views = read_views(path, f"{directory}/0", lambda chart: images / f"{chart}.png")
    picture(chosen(views)).savefig(_PICTURE.value, dpi=150)


if __name__ == "__main__":
    run_with_flags(main, "--run=runs/tiny")

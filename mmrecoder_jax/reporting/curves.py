"""The curves of a stage's metrics as one picture.

Drawn with `Figure`, without pyplot: a report must not need a display or leave global state.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmrecoder_jax.monitoring.metrics import RESERVED

# These panels come first, then all others by name, then the last ones.
FIRST_PANELS = ("reward", "low_level", "exec_rate", "loss", "entropy", "truncated")
LAST_PANELS = ("seconds", "lr", "grad_norm")
# Readable on white and on black: the page follows the reader's light or dark setting.
COLORS = ("#3f87d6", "#e08a2e", "#2fa574", "#a36fd0", "#d6535b", "#8a8f98")
DASHES = ("-", "--", ":")
GRID = COLORS[-1]
# A colour that nothing else has: the SVG's text is drawn in it, then it is replaced by the CSS
# value `currentColor`, which Matplotlib does not know.
INK = "#0a0b0c"
INK_STYLE = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#c9d1d9}}</style>"
SMOOTH_FROM = 40  # points from which a curve is drawn with its running mean
MARKERS_BELOW = 25  # points below which each one is marked
STYLE: Any = {  # the stubs of later releases of matplotlib list each name
    "svg.fonttype": "none",  # text stays text, so that it takes the page's colour
    "svg.hashsalt": "report",  # the same rows give the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def metrics_curves(rows: Sequence[Mapping[str, Any]], stage: str) -> bytes:
    """Draws every metric of a stage over its steps.

    A metric `panel/line` is a line in its panel. A metric of a turn, `turn2/low_level`, is the line
    "turn2" in the panel of low_level, beside the other turns. A metric without a slash is the line
    "all" of its panel. Long curves are drawn pale with their running mean on top. The picture has
    no background and takes light or dark ink by the reader's setting.

    Args:
      rows: as `metrics.read_metrics` returns them; rows of other stages are left out.

    Returns:
      An SVG file.

    Raises:
      ValueError: the stage has no rows.
    """
    rows = [row for row in rows if row["stage"] == stage]
    if not rows:
        raise ValueError(
            f"no metrics of stage {stage!r} among the rows: give the name that the stage wrote "
            "its metrics under"
        )
    panels: dict[str, dict[str, str]] = {}  # panel -> line -> metric
    names = dict.fromkeys(name for row in rows for name in row if name not in RESERVED)
    for name in names:
        panel, line = _place(name)
        panels.setdefault(panel, {})[line] = name
    order = sorted(panels, key=_panel_rank)
    per_row = 3 if len(order) > 1 else 1
    height = math.ceil(len(order) / per_row)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * per_row, 2.3 * height), layout="constrained")
        for i, panel in enumerate(order, start=1):
            _draw_panel(figure.add_subplot(height, per_row, i), panel, panels[panel], rows)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().decode().replace(INK, "currentColor")
    return svg.replace("<defs>", f"{INK_STYLE}<defs>", 1).encode()


def _panel_rank(panel: str) -> tuple[int, str]:
    """Sorts panels: the first ones in their own order, then by name, then the last ones."""
    if panel in FIRST_PANELS:
        return FIRST_PANELS.index(panel), panel
    return len(FIRST_PANELS) + (panel in LAST_PANELS), panel


def _place(name: str) -> tuple[str, str]:
    """(panel, line) of a metric."""
    first, _, rest = name.partition("/")
    return (rest, first) if re.fullmatch(r"turn\d+", first) else (first, rest or "all")


def _draw_panel(
    axes: Axes, panel: str, lines: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    axes.set_title(panel.replace("_", " "), loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, alpha=0.25, linewidth=0.6)
    axes.locator_params(nbins=5)
    axes.locator_params(axis="x", integer=True)
    for i, (label, name) in enumerate(lines.items()):
        points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float)
        steps, values = points.T
        color = COLORS[i % len(COLORS)]
        dash = DASHES[i // len(COLORS) % len(DASHES)]
        width, marker = 1.4, "." if len(points) < MARKERS_BELOW else None
        if len(points) >= SMOOTH_FROM:
            axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            width, values = 1.6, _running_mean(values)
        axes.plot(steps, values, dash, color=color, linewidth=width, marker=marker, label=label)
    if list(lines) != ["all"]:
        axes.legend(fontsize=8, frameon=False, handlelength=1.2, labelspacing=0.25)


def _running_mean(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Mean over a window of a twentieth of the curve on both sides, shorter at its ends.

    Values that are not finite are left out.
    """
    half = max(len(values) // 20, 1)
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    finite = [window[np.isfinite(window)] for window in windows]
    return np.array([window.mean() if window.size else math.nan for window in finite])

"""The curves of a stage's metrics as one picture."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# first these, then the others by name
PANEL_ORDER = (
    "reward",
    "low_level",
    "exec_rate",
    "loss",
    "accuracy",
    "entropy",
    "truncated",
)
LAST_PANELS = ("seconds", "lr", "grad_norm")
# readable on white and on black
COLORS = (
    "#3f87d6",
    "#e08a2e",
    "#2fa574",
    "#a36fd0",
    "#d6535b",
    "#8a8f98",
)
INK = "#0a0b0c"  # stands for the page's text colour; replaced in the SVG
SMOOTH_FROM = 40  # points from which a curve is drawn with its running mean


def metrics_curves(rows: Sequence[Mapping[str, Any]], stage: str) -> bytes:
    """Draws every metric of a stage over its steps and returns an SVG.

    A metric `panel/line` is a line in its panel, `turn2/low_level` the line "turn2" in the panel of
    low_level, beside the other turns; a metric without a slash is the line "all" of its panel. Long
    curves are drawn pale with their running mean on top. The picture has no background and takes
    light or dark ink by the reader's setting.

    Args:
      rows: as `metrics.read_metrics` returns them; rows of other stages are left out.
    Raises:
      ValueError: when the stage has no rows.
    """
    rows = [row for row in rows if row["stage"] == stage]
    if not rows:
        raise ValueError(
            f"no metrics of stage {stage!r} among the rows: give the name that the stage wrote its metrics under"
        )
    panels: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(
        name for row in rows for name in row if name not in ("stage", "step", "time")
    ):
        panel, line = _place(name)
        panels.setdefault(panel, {})[line] = name
    order = sorted(panels, key=_panel_rank)
    per_row = 3 if len(order) > 1 else 1
    height = math.ceil(len(order) / per_row)
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.family": "sans-serif",
        "font.size": 9,
    }
    style |= {
        name: INK
        for name in (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
        )
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6 * per_row, 2.3 * height), layout="constrained")
        for i, panel in enumerate(order):
            _draw_panel(figure.add_subplot(height, per_row, i + 1), panel, panels[panel], rows)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    ink = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#c9d1d9}}</style>"
    return (
        buffer.getvalue()
        .decode()
        .replace(INK, "currentColor")
        .replace("<defs>", f"{ink}<defs>", 1)
        .encode()
    )


def _panel_rank(panel: str) -> tuple[int, str]:
    if panel in PANEL_ORDER:
        return PANEL_ORDER.index(panel), panel
    return len(PANEL_ORDER) + (panel in LAST_PANELS), panel


def _place(name: str) -> tuple[str, str]:
    """(panel, line) of a metric."""
    first, _, rest = name.partition("/")
    return (rest, first) if re.fullmatch(r"turn\d+", first) else (first, rest or "all")


def _draw_panel(
    axes, panel: str, lines: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    axes.set_title(panel.replace("_", " "), loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#8a8f98", alpha=0.25, linewidth=0.6)
    axes.locator_params(nbins=5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for i, (label, name) in enumerate(lines.items()):
        points = np.array([(row["step"], row[name]) for row in rows if name in row], dtype=float)
        color = COLORS[i % len(COLORS)]
        dash = ("-", "--", ":")[i // len(COLORS) % 3]
        if len(points) >= SMOOTH_FROM:
            axes.plot(*points.T, color=color, alpha=0.3, linewidth=0.8)
            axes.plot(
                points[:, 0],
                _running_mean(points[:, 1]),
                dash,
                color=color,
                linewidth=1.6,
                label=label,
            )
        else:
            axes.plot(
                *points.T,
                dash,
                color=color,
                linewidth=1.4,
                marker="." if len(points) < 25 else None,
                label=label,
            )
    if list(lines) != ["all"]:
        axes.legend(fontsize=8, frameon=False, handlelength=1.2, labelspacing=0.25)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve on both sides, shorter at its ends; values
    that are not finite are left out.
    """
    half = max(len(values) // 20, 1)
    windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    finite = [window[np.isfinite(window)] for window in windows]
    return np.array([window.mean() if window.size else math.nan for window in finite])

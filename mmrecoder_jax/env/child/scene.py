"""What a picture shows, from plain data: the boxes of its axes, its marks, and the ink they left.

`recorder` calls this in the process of the script; `display_list` calls it again, with what was
written down, where no model code runs.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from mmrecoder_jax.env.child.ink import Ink, is_flat

MAX_COLORS, MAX_PANELS = 256, 1000
# Below these an axes shows nothing; the shorter side may be small, as colorbars are narrow.
_MIN_SHORT_SIDE, _MIN_LONG_SIDE = 2.0, 8.0
# Of all axes together: a chart that is a speck in the picture shows nothing.
_MIN_CHART_SIDE, _MIN_CHART_SHARE = 32.0, 0.1
# Functions that draw the same kind of mark share a colour group.
_COLOR_GROUPS = {
    "barh": "bar",
    "errorbar": "plot",
    "fill_betweenx": "fill_between",
    "violin": "violinplot",
}


class Panel(NamedTuple):
    """An axes.

    Attributes:
      box: left, top, right and bottom in pixels of the canvas.
      cell: its grid position (`records.Record.layout`); None where it is on no grid, or empty.
    """

    box: tuple[float, float, float, float]
    cell: tuple[int, ...] | None


class Mark(NamedTuple):
    """The artists of one call that have the same colours.

    Attributes:
      call: the number of the call.
      kind: the type that the call makes.
      colors: names of its colours, "#RRGGBB" or a colormap's.
      panel: the index of its axes; -1 for one that is directly on the figure.
    """

    call: int
    kind: str
    colors: tuple[str, ...]
    panel: int


Marks = tuple[Mark, ...]  # an artist may be part of several


def describe(panels: list[Panel], ink: Ink) -> dict[str, Any]:
    """Layout, types and colours of a picture as it is now: a record without its texts.

    Args:
      panels: of the axes that are visible, all of them.
      ink: whose marks are `Marks`.
    """
    shown = _shown(panels, ink.canvas())
    calls: set[tuple[int, str]] = set()
    found: set[str] = set()
    for marks in set() if ink.is_flat() else ink.shown():
        for mark in marks:
            if mark.panel != -1 and mark.panel not in shown:
                continue
            calls.add((mark.call, mark.kind))
            group = _COLOR_GROUPS.get(mark.kind, mark.kind)
            found.update(
                f"{group}--{name}"
                for name in mark.colors
                if not name.startswith("#") or ink.has_paint(marks, name)
            )
    types = Counter(kind for _, kind in calls)
    cells = (panel.cell for number, panel in enumerate(panels) if number in shown)
    return {
        "layout": [list(cell) for cell in cells if cell is not None][:MAX_PANELS],
        "types": dict(sorted(types.items())),
        "colors": sorted(found)[:MAX_COLORS],
    }


def _shown(panels: list[Panel], canvas: np.ndarray) -> set[int]:
    """The numbers of the axes that show something; none where all of them together are a speck."""
    height, width, _ = canvas.shape
    shown = set()
    parts = []
    for number, panel in enumerate(panels):
        left, top = max(panel.box[0], 0.0), max(panel.box[1], 0.0)
        right, bottom = min(panel.box[2], width), min(panel.box[3], height)
        short, long = sorted((right - left, bottom - top))
        if short >= _MIN_SHORT_SIDE and long >= _MIN_LONG_SIDE and not _is_flat(canvas, panel.box):
            shown.add(number)
            parts.append((left, top, -right, -bottom))
    if not parts:
        return shown
    left, top, right, bottom = np.min(parts, axis=0) * (1, 1, -1, -1)
    if (
        min(right - left, bottom - top) < _MIN_CHART_SIDE
        or (right - left) * (bottom - top) < _MIN_CHART_SHARE * width * height
    ):
        return set()
    return shown


def _is_flat(canvas: np.ndarray, box: tuple[float, float, float, float]) -> bool:
    """Whether an axes is one colour: something was laid over all of it, or nothing was drawn."""
    left, top, right, bottom = box
    return is_flat(
        canvas[
            max(int(top) - 1, 0) : max(int(bottom) + 2, 0),
            max(int(left) - 1, 0) : max(int(right) + 2, 0),
        ]
    )

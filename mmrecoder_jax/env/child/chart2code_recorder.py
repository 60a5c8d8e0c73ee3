"""Records what Chart2Code's code-level evaluators see. Runs in the process of the untrusted script.

The script runs to its end with `plt.savefig` and `plt.show` doing nothing; what counts is the open
figure with the highest number. Colours, layout and grids are read before it is drawn, the rest
after, in the evaluators' order. Where they go through a Python set, whose order changes with the
hash seed, entries are sorted.
"""

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgba
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle, Wedge

from mmrecoder_jax.env.child.capture import restore_saving
from mmrecoder_jax.env.child.long_texts import shortened
from mmrecoder_jax.env.child.main_module import become_main

_MOST_TEXTS = 300  # of a kind
_MOST_ELEMENTS = 300
_MOST_CHARACTERS = 600_000  # of all elements, as JSON
_MOST_MIXED = 50  # numbers that are also kept as texts, to be compared with a list of texts
_MOST_VALUES = 5000  # distinct ones of a list


def run(code: str) -> tuple[str, dict[str, Any] | None]:
    """Runs a script; returns (error, `records.Chart2CodeRecord` as JSON).

    A script that raises, exits or leaves no figure open has no record.
    """
    restore_saving()
    plt.savefig = plt.show = lambda *args, **kwargs: None
    try:
        compiled, names = become_main(code)
        exec(compiled, names)
        numbers = plt.get_fignums()
        if not numbers:
            return "the script left no figure open", None
        return "", _described(plt.figure(numbers[-1]))
    except BaseException as problem:
        return f"{type(problem).__name__}: {problem}", None


def _described(figure: Figure) -> dict[str, Any]:
    record: dict[str, Any] = {
        "colors": _colors(figure),
        "layout": _layout(figure),
        "grids": _grids(figure),
    }
    figure.canvas.draw()
    return record | {
        "legends": _legends(figure),
        "elements": _elements(figure),
        "texts": _texts(figure),
        "types": sorted(_types(figure)),
    }


# ------------------------------------------------------------------------------------------- colour


def _hex(color: Any) -> str | None:
    """#RRGGBB; None for no colour and for a transparent one."""
    try:
        if color is None or (isinstance(color, str) and color.lower() == "none"):
            return None
        rgba = to_rgba(color)
        return None if rgba[3] == 0 else to_hex(rgba, keep_alpha=False).upper()
    except (ValueError, TypeError):
        return None


class _Colors:
    """Colours by class and key."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = defaultdict(dict)
        self._numbers: dict[str, int] = defaultdict(int)

    def put(self, kind: str, key: str, color: str | None, first: bool = False) -> None:
        """Keeps a colour; with `first` only where the key has none."""
        if color and not (first and key in self.found[kind]):
            self.found[kind][key] = color

    def numbered(self, kind: str, name: str) -> str:
        """The next running key of a class, over all axes."""
        self._numbers[kind] += 1
        return f"{name}_{self._numbers[kind] - 1}"


def _colors(figure: Figure) -> list[list[str]]:
    colors = _Colors()
    colors.put("figure_bg", "figure", _hex(figure.patch.get_facecolor()))
    for number, ax in enumerate(figure.axes):
        # The evaluator's key is the address of the axes: that of another figure is never the same.
        colors.put("axes_bg", f"ax_{number}", _hex(ax.patch.get_facecolor()))
        _legend_colors(ax, colors)
        for read in (_patch_colors, _line_colors, _collection_colors, _text_colors):
            with contextlib.suppress(Exception):  # it goes on with the next kind of artist
                read(ax, colors)
        colors.put("title", "title", _hex(ax.title.get_color()))
        colors.put("axis_label", "xlabel", _hex(ax.xaxis.label.get_color()))
        colors.put("axis_label", "ylabel", _hex(ax.yaxis.label.get_color()))
    return [
        [kind, shortened(key), color]
        for kind, of_kind in colors.found.items()
        for key, color in list(of_kind.items())[:_MOST_VALUES]
    ]


def _legend_colors(ax: Axes, colors: _Colors) -> None:
    legend = ax.get_legend()
    if legend is None:
        return
    handle: Any
    for handle, label in zip(legend.legend_handles, legend.get_texts(), strict=False):
        color = None
        if hasattr(handle, "get_facecolor"):
            color = _hex(handle.get_facecolor())
        elif hasattr(handle, "get_color"):
            color = _hex(handle.get_color())
        if label.get_text():
            kind = "patch_face" if isinstance(handle, Rectangle) else "line_color"
            colors.put(kind, label.get_text(), color)


def _patch_colors(ax: Axes, colors: _Colors) -> None:
    ticks = [tick.get_text() for tick in ax.get_xticklabels()]
    for number, patch in enumerate(ax.patches):
        tick = ticks[number] if number < len(ticks) else ""
        if face := _hex(patch.get_facecolor()):
            key = tick or colors.numbered("patch_face", "patch")
            colors.put("patch_face", key, face, first=True)
        colors.put("patch_edge", tick or f"patch_edge_{number}", _hex(patch.get_edgecolor()))


def _line_colors(ax: Axes, colors: _Colors) -> None:
    for line in ax.lines:
        if color := _hex(line.get_color()):
            key = _label(line) or colors.numbered("line_color", "line")
            colors.put("line_color", key, color, first=True)


def _collection_colors(ax: Axes, colors: _Colors) -> None:
    for collection in ax.collections:
        faces = np.asarray(collection.get_facecolor())
        if not len(faces):
            continue
        if len(set(map(tuple, faces))) == 1:
            if color := _hex(faces[0]):
                key = _label(collection) or colors.numbered("scatter_color", "scatter_group")
                colors.put("scatter_color", key, color, first=True)
            continue
        for name in sorted({_hex(face) or "" for face in faces}):
            # A transparent colour takes a number and weighs, but is like none.
            key = colors.numbered("scatter_palette", "palette_color")
            colors.found["scatter_palette"][key] = name


def _text_colors(ax: Axes, colors: _Colors) -> None:
    for text in ax.texts:
        if text.get_text():
            colors.put("text_color", text.get_text(), _hex(text.get_color()))


def _label(artist: Any) -> str:
    """The label of an artist; "" for none and for those that matplotlib gives."""
    label = artist.get_label()
    return "" if not label or label.startswith("_") else str(label)


# ------------------------------------------------------------------------------------- other parts


def _layout(figure: Figure) -> list[list[int]]:
    cells = []
    for ax in figure.axes:
        spec = ax.get_subplotspec()
        if spec is not None:
            rows, columns = spec.get_gridspec().get_geometry()
            down, across = spec.rowspan, spec.colspan
            cells.append([rows, columns, down.start, down.stop - 1, across.start, across.stop - 1])
    return [[int(value) for value in cell] for cell in cells]


def _grids(figure: Figure) -> list[list[bool]]:
    grids = (
        [
            any(line.get_visible() for line in lines)
            for lines in (ax.get_xgridlines(), ax.get_ygridlines())
        ]
        for ax in figure.axes
    )
    return [grid for grid in grids if any(grid)]


def _legends(figure: Figure) -> list[list[Any]]:
    """[text, x0, y0, x1, y1] of each entry, with the box of its legend in pixels."""
    legends = list(figure.legends) + [ax.get_legend() for ax in figure.axes]
    entries = []
    for legend in dict.fromkeys(filter(None, legends)):
        if not legend.get_visible():
            continue
        box = legend.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        corners = [_finite(value) for value in (box.x0, box.y0, box.x1, box.y1)]
        entries += [
            [shortened(text.get_text()), *corners]
            for text in legend.get_texts()
            if text.get_visible() and text.get_text()
        ]
    return entries[:_MOST_TEXTS]


def _texts(figure: Figure) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = defaultdict(list)
    suptitle = figure._suptitle  # type: ignore[attr-defined]  # the evaluator reads it too
    found: list[tuple[str, Iterable[Any]]] = [("suptitle", [suptitle] if suptitle else [])]
    for ax in figure.axes:
        legend = ax.get_legend()
        found += [
            ("title", [ax.title]),
            ("xlabel", [ax.xaxis.label]),
            ("ylabel", [ax.yaxis.label]),
            ("tick_label", [*ax.get_xticklabels(), *ax.get_yticklabels()]),
            ("legend_text", legend.get_texts() if legend else []),
            ("annotation", ax.texts),
        ]
    for kind, artists in found:
        texts[kind] += [shortened(a.get_text()) for a in artists if a.get_text()]
    return {kind: own[:_MOST_TEXTS] for kind, own in texts.items() if own}


def _types(figure: Figure) -> set[str]:
    types: set[str] = set()
    for ax in figure.axes:
        for container in ax.containers:
            if isinstance(container, BarContainer):
                labels = [label.get_text() for label in ax.get_xticklabels()]
                plain = all(label.replace(".", "", 1).isdigit() for label in labels)
                types.add("histogram" if plain else "bar")
        if any(isinstance(artist, QuadMesh) for artist in ax.collections):
            types.add("heatmap")
        lines = any(isinstance(artist, Line2D) for artist in ax.lines)
        if lines and any(map(_is_violin, ax.collections)):
            types.add("violin")
        if lines and "violin" not in types:
            types.add("line")
        if any(isinstance(artist, PathCollection) for artist in ax.collections):
            types.add("scatter")
        if any(isinstance(artist, Wedge) for artist in ax.patches):
            types.add("pie")
        rectangles = any(isinstance(artist, Rectangle) for artist in ax.patches)
        if rectangles and not types & {"bar", "histogram"}:
            if len(ax.lines) > 2 * len(ax.patches):
                types.add("boxplot")
            elif "pie" not in types:
                types.add("bar")
        if any(isinstance(artist, AxesImage) for artist in ax.images) and "heatmap" not in types:
            types.add("image")
    return types


def _is_violin(collection: Any) -> bool:
    """The evaluator's own test, which a violin seldom passes."""
    if not isinstance(collection, PolyCollection) or not len(collection.get_paths()):
        return False
    vertices = np.asarray(collection.get_paths()[0].vertices)
    sides = np.abs(np.min(vertices[:, 0])) - np.abs(np.max(vertices[:, 0]))
    return bool(np.all(vertices[:, 1] > 0) and sides < 1e-6)


# --------------------------------------------------------------------------------------- parameters


def _elements(figure: Figure) -> list[list[Any]]:
    """[kind, {parameter: value}] of lines, rectangles, polygons and collections."""
    elements: list[list[Any]] = []
    for ax in figure.axes:
        for line in ax.lines:
            values = {
                "xdata": np.array(line.get_xdata()).tolist(),
                "ydata": np.array(line.get_ydata()).tolist(),
                "linestyle": line.get_linestyle(),
                "linewidth": line.get_linewidth(),
                "marker": line.get_marker(),
                "markersize": line.get_markersize(),
                "alpha": line.get_alpha(),
            }
            elements.append(["line", values])
        for patch in ax.patches:
            values = {"alpha": patch.get_alpha()}
            if isinstance(patch, Rectangle):
                values["xy"] = np.array(patch.get_xy()).tolist()
                values |= {"width": patch.get_width(), "height": patch.get_height()}
                elements.append(["rectangle", values])
            elif isinstance(patch, Polygon):
                elements.append(["polygon", values | {"verts": np.array(patch.get_xy()).tolist()}])
        for collection in ax.collections:
            values = {
                "alpha": collection.get_alpha(),
                "offsets": np.array(collection.get_offsets()).tolist(),
            }
            if hasattr(collection, "get_sizes"):
                values["sizes"] = np.array(collection.get_sizes()).tolist()
            elements.append(["collection", values])
    kept, room = [], _MOST_CHARACTERS
    for kind, values in elements[:_MOST_ELEMENTS]:
        element = [kind, {name: _value(value) for name, value in values.items()}]
        room -= len(json.dumps(element))
        if room < 0:
            break
        kept.append(element)
    return kept


def _value(value: Any) -> list[Any] | None:
    """A value as the evaluator compares it: None, ["number", x], ["text", t], or ["list", its
    distinct numbers or None, its distinct entries as texts, whether it has entries].
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return ["number", _finite(float(value))]
        except ValueError:
            return ["text", shortened(value)]
    if isinstance(value, int | float | np.number):
        return ["number", _finite(float(value))]
    if isinstance(value, list | np.ndarray):
        entries = list(value)
        texts = sorted({shortened(str(entry)) for entry in entries[:_MOST_VALUES]})
        try:
            flat = np.unique(np.asarray(entries, dtype=float))
        except (ValueError, TypeError):
            return ["list", None, texts, bool(entries)]
        numbers = [_finite(x) for x in flat[:_MOST_VALUES].tolist()]
        return ["list", numbers, texts if len(entries) <= _MOST_MIXED else [], bool(entries)]
    return ["other"]  # like nothing


def _finite(number: float) -> float | str:
    """A number that JSON can hold; "nan", "inf" and "-inf" as texts."""
    return float(number) if math.isfinite(number) else str(float(number))

"""Records what ChartMimic's official evaluators record, defects included.

Runs in the process of the untrusted script. The official evaluator runs every script four times:
once for each of text, layout, chart type and colour, each time with other functions replaced. What
is replaced can change the script (seaborn asks a method for its name; a hook may raise), so the
four are parts here too, and `benchmarks.chartmimic_official` asks for several at once only where
that makes no difference.

    text    the strings that reach the PDF renderer (`benchmarks.chartmimic_official` has put the
            removal of ticks into the script)
    layout  the grid positions in `plt.gcf()` when the script has ended; null for an axes without
            one
    type    outermost calls of the functions in `_TYPE_FUNCTIONS`, over all figures, counted before
            they run
    color   for each (function, initial colour) the last artist that had it, read again when the
            script has ended

Keys are those of matplotlib 3.8.4, whatever matplotlib runs.
"""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import cbook, colors, patches
from matplotlib.axes import Axes, _base
from matplotlib.backends.backend_pdf import RendererPdf
from matplotlib.image import NonUniformImage
from matplotlib.patches import Circle, Ellipse
from matplotlib.projections.polar import PolarAxes
from matplotlib.tri import tripcolor
from mpl_toolkits.mplot3d import Axes3D

from mmrecoder_jax.env.child.capture import restore_saving
from mmrecoder_jax.env.child.long_texts import shortened
from mmrecoder_jax.env.child.main_module import become_main
from mmrecoder_jax.env.wire import Part, RecordKind

DISTURBED = "the hooks disturb each other in this script"

_PARTS: dict[RecordKind, set[Part]] = {
    RecordKind.OFFICIAL_RUN: set(),
    RecordKind.OFFICIAL_TEXT: {Part.TEXT},
    RecordKind.OFFICIAL_LAYOUT: {Part.LAYOUT},
    RecordKind.OFFICIAL_TYPE: {Part.TYPE},
    RecordKind.OFFICIAL_COLOR: {Part.COLOR},
    RecordKind.OFFICIAL_CALLS: {Part.LAYOUT, Part.TYPE, Part.COLOR},
}
# The file that the official evaluator finds for each function in 3.8.4: that of matplotlib's own
# wrapper (`_preprocess_data`) where there is one.
_AXES, _PACKAGE = "matplotlib/axes/_axes.py", "matplotlib/__init__.py"
_3D = "mpl_toolkits/mplot3d/axes3d.py"
_OWN_FILE = (
    *("barh", "plot", "axhline", "axvline", "axvspan", "axhspan", "violin", "fill"),
    "_fill_between_x_or_y",
)
_WRAPPED = (
    *("bar", "hlines", "vlines", "errorbar", "boxplot", "violinplot", "hist"),
    *("fill_between", "fill_betweenx", "scatter", "quiver", "pie", "imshow", "pcolor"),
    *("contour", "contourf", "broken_barh"),
)
_FILES = {
    **dict.fromkeys(_OWN_FILE, _AXES),
    **dict.fromkeys(_WRAPPED, _PACKAGE),
    "tripcolor": "matplotlib/tri/_tripcolor.py",
}
_FILES_3D = {
    **dict.fromkeys(("scatter", "bar", "bar3d"), _PACKAGE),
    **dict.fromkeys(("plot", "plot_surface", "add_collection3d"), _3D),
}
_TYPE_FUNCTIONS = tuple(name for name in _FILES if name != "_fill_between_x_or_y")
_COLOR_FUNCTIONS = (
    *("bar", "scatter", "axhline", "axvline", "_fill_between_x_or_y", "pie", "axvspan", "axhspan"),
    *("hlines", "vlines", "boxplot", "violinplot", "hist", "quiver", "imshow", "pcolor"),
    *("contour", "contourf", "fill", "broken_barh", "tripcolor"),
)
_NETWORKX = ("draw_networkx_nodes", "draw_networkx_edges", "draw_networkx_labels")
_NETWORKX_FILE = "networkx/drawing/nx_pylab.py"


def run(code: str, kind: RecordKind) -> tuple[str, dict[str, Any] | None]:
    """Runs a script prepared by `benchmarks.chartmimic_official` with the hooks of its parts.

    Returns (error, `records.OfficialRecord` as JSON); a script that raises has no record. Call it
    once, in a process of its own: the hooks stay.
    """
    parts = _PARTS[kind]
    # only then does the script see what the official evaluator of that part has imported
    alone = len(parts) == 1
    restore_saving()
    texts: list[str] = []
    types, artists = TypeLog(), ColorLog()
    given: dict[str, Any] = {}
    optional = _optional_modules(code)
    if Part.TEXT in parts:
        _hook_text(texts)
    if Part.TYPE in parts:
        given |= _names(optional) | {"tripcolor": tripcolor} if alone else {}
        _hook_types(types, optional)
    if Part.COLOR in parts:
        own = {"matplotlib": matplotlib, "np": np, "mcolors": colors}
        given |= _names(optional) | own if alone else {}
        _hook_colors(artists, optional)
    try:
        compiled, namespace = become_main(code)
        namespace.update(given)
        exec(compiled, namespace)
    except BaseException as problem:
        return f"{type(problem).__name__}: {problem}", None
    if artists.raised and not alone:
        return DISTURBED, None
    return "", {
        "texts": texts,
        "layout": _layout(namespace) if Part.LAYOUT in parts else [],
        "types": types.counts,
        "colors": artists.final(),
    }


def _optional_modules(code: str) -> dict[str, Any]:
    """The optional drawing packages that the script may use and that are installed."""
    found = {}
    for word, name in (
        ("networkx", "networkx.drawing.nx_pylab"),
        ("squarify", "squarify"),
        ("venn", "matplotlib_venn._common"),
    ):
        if word in code:
            try:
                found[word] = importlib.import_module(name)
            except ImportError:
                continue
    return found


def _names(optional: dict[str, Any]) -> dict[str, Any]:
    """What the official type and colour evaluators leave in the script's namespace."""
    names = {
        "plt": sys.modules["matplotlib.pyplot"],
        "PolarAxes": PolarAxes,
        "Axes": Axes,
        "Axes3D": Axes3D,
    }
    names |= {"NonUniformImage": NonUniformImage, "Ellipse": Ellipse, "Circle": Circle}
    names |= {"os": os, "inspect": inspect}
    if "networkx" in optional:
        names |= {"nx": sys.modules["networkx"], "nx_pylab": optional["networkx"]}
    if "squarify" in optional:
        names["squarify"] = optional["squarify"]
    return names


# ---------------------------------------------------------------------------------- text and layout


def _hook_text(texts: list[str]) -> None:
    pdf: Any = RendererPdf  # the stubs do not allow for a method that is replaced
    draw_text = pdf.draw_text

    def wrapper(self, gc, x, y, s, *args, **kwargs):
        texts.append(shortened(s))
        return draw_text(self, gc, x, y, s, *args, **kwargs)

    pdf.draw_text = wrapper


def _layout(namespace: dict[str, Any]) -> list[list[int] | None]:
    pyplot = namespace.get("plt")
    if pyplot is None:  # the official suffix says `plt`
        return []
    cells: list[list[int] | None] = []
    for ax in pyplot.gcf().axes:
        spec = ax.get_subplotspec()
        if spec is None:
            cells.append(None)
            continue
        down, across = spec.rowspan, spec.colspan
        shape = spec.get_gridspec().get_geometry()
        cells.append([*shape, down.start, down.stop - 1, across.start, across.stop - 1])
    return cells


# --------------------------------------------------------------------------------------- chart type


class TypeLog:
    """Counts outermost calls.

    A call that raises leaves the log closed, as in the official evaluator.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.inside = False

    def wrap(self, original: Callable, file: str, name: str) -> Callable:
        log = self

        def wrapper(*args, **kwargs):
            if log.inside:
                return original(*args, **kwargs)
            log.inside = True
            polar = "_polar" if name == "plot" and args and type(args[0]) is PolarAxes else ""
            key = f"{file}{polar}-{name}"
            log.counts[key] = log.counts.get(key, 0) + 1
            result = original(*args, **kwargs)
            log.inside = False
            return result

        return wrapper


def _hook_types(log: TypeLog, optional: dict[str, Any]) -> None:
    for name in _TYPE_FUNCTIONS:
        setattr(Axes, name, log.wrap(getattr(Axes, name), _FILES[name], name))
    for name, file in _FILES_3D.items():
        setattr(Axes3D, name, log.wrap(getattr(Axes3D, name), file, name))
    for cls, file in _classes(optional):
        cls.__init__ = log.wrap(cls.__init__, file, "__init__")
    if "networkx" in optional:
        for module in (optional["networkx"], sys.modules["networkx"]):
            for name in _NETWORKX:
                original = getattr(module, name)
                hook = log.wrap(original, f"{_NETWORKX_FILE}/{name}", name)
                setattr(module, name, _with_parameters(original, hook))
    if "squarify" in optional:
        squarify = optional["squarify"]
        squarify.plot = log.wrap(squarify.plot, "squarify/__init__.py", "plot")


def _with_parameters(original: Callable, hook: Callable) -> Callable:
    """A hook that has the parameters of its function: a call that does not fit them is not logged.

    networkx reads them too.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return hook(*args, **kwargs)

    return call


def _classes(optional: dict[str, Any]) -> list[tuple[Any, str]]:
    classes: list[tuple[Any, str]] = [
        (NonUniformImage, "matplotlib/image.py"),
        (Ellipse, "matplotlib/patches.py"),
        (Circle, "matplotlib/patches.py"),
    ]
    if "venn" in optional:
        classes.append((optional["venn"].VennDiagram, "matplotlib_venn/_common.py"))
    return classes


# ------------------------------------------------------------------------------------------- colour
#
# A reader tells the colours of an artist: `each` readers look at one artist of many (every bar of a
# bar chart is remembered by its own colour), `whole` readers at a collection (remembered by the
# last of its colours).


class ColorLog:
    """Remembers artists by (function, initial colour); `final` reads their colours again."""

    def __init__(self) -> None:
        self.artists: dict[tuple[str, str], tuple[Any, Callable[[Any], list], bool]] = {}
        self.inside = False
        # A reader failed: in the official evaluator the script gets that exception.
        self.raised = False

    def remember(
        self, key: str, artist: Any, read: Callable[[Any], list], initial: list | None = None
    ) -> None:
        names = [_name(color) for color in (read(artist) if initial is None else initial)]
        if not names:
            raise UnboundLocalError("no colour to remember an artist by")
        self.artists[key, names[-1]] = (artist, read, False)

    def remember_colormap(self, key: str, artist: Any, cmap: Any) -> None:
        name = cmap if isinstance(cmap, str) else cmap.name
        self.artists[key, name] = (artist, lambda artist: [], True)

    def final(self) -> list[str]:
        """The sorted record.

        Empty when a final colour cannot be read, as when a bar was recoloured by name.
        """
        found = set()
        try:
            for (key, initial), (artist, read, fixed) in self.artists.items():
                again = "_polar" if key.endswith("_polar") else "_3d" if key.endswith("_3d") else ""
                for name in [initial] if fixed else [_name(color) for color in read(artist)]:
                    found.add(f"{key}{again}--{name}")
        except Exception:
            return []
        return sorted(found)

    def wrap(self, original: Callable, key: str, look: Callable[..., None]) -> Callable:
        """`look(log, key, result, args, kwargs)` remembers what an outermost call has drawn."""
        log = self

        def wrapper(*args, **kwargs):
            if log.inside:
                return original(*args, **kwargs)
            log.inside = True
            result = original(*args, **kwargs)
            try:
                look(log, key, result, args, kwargs)
            except Exception:
                log.raised = True
                raise
            log.inside = False
            return result

        return wrapper


def _name(color: Any) -> str:
    """A colormap's name as it is; a colour as "#RRGGBB".

    Raises:
      TypeError: where the official evaluator does.
    """
    if isinstance(color, _Colormap):
        return str(color)
    if isinstance(color, str):
        if color.startswith("#") and len(color) in (7, 9):
            return color.upper()
    elif not (isinstance(color, list | tuple | np.ndarray) and len(color) in (3, 4)):
        raise TypeError(f"not a colour: {color!r}")
    try:
        return colors.to_hex(colors.to_rgba(color)).upper()
    except ValueError as problem:
        raise TypeError(f"not a colour: {color!r}") from problem


class _Colormap(str):
    """A colormap's name, as opposed to a colour's."""


def _color(artist):
    return [artist.get_color()]


def _face(artist):
    return [artist.get_facecolor()]


def _bar_face(artist):
    return [list(artist._original_facecolor)]


def _first_face(artist):
    return [list(artist.get_facecolor()[0])]


def _first_face_if_any(artist):
    return [list(artist.get_facecolor()[0])] if len(artist.get_facecolor()) else []


def _faces(artist):
    return artist.get_facecolors().tolist()


def _edges(artist):
    return artist.get_edgecolors().tolist()


def _cmap(artist):
    return [_Colormap(artist.get_cmap().name)]


def _arrow_faces(artists):
    return [artist.get_facecolor() for artist in artists]


def _venn_faces(diagram):
    return [patch.get_facecolor() for patch in diagram.patches]


def _each(read, select=lambda result: result):
    def look(log, key, result, args, kwargs):
        for artist in select(result):
            log.remember(key, artist, read)

    return look


def _whole(read):
    def look(log, key, result, args, kwargs):
        log.remember(key, result, read)

    return look


def _created(cls, read):
    def look(log, key, result, args, kwargs):
        if type(args[0]) is cls:
            log.remember(key, args[0], read)

    return look


def _look_line(log, key, result, args, kwargs):
    log.remember(key, result[0], _color, initial=[result[1]["color"]])


def _look_scatter(log, key, result, args, kwargs):
    if type(args[0]) is PolarAxes:
        key += "_polar"
    if kwargs.get("cmap") is not None:
        log.remember_colormap(key, result, kwargs["cmap"])
    elif _first_face_if_any(result):
        log.remember(key, result, _first_face_if_any)


def _look_scatter_3d(log, key, result, args, kwargs):
    if kwargs.get("cmap") is not None:
        log.remember_colormap(key, result, kwargs["cmap"])
    else:
        log.remember(key, result, _faces)


def _look_surface(log, key, result, args, kwargs):
    if kwargs.get("cmap") is not None:
        log.remember_colormap(key, result, kwargs["cmap"])
    else:
        log.remember(key, result, lambda artist: _faces(artist)[:1])


def _look_polar_plot(log, key, result, args, kwargs):
    if type(args[0]) is PolarAxes:
        for line in result:
            log.remember(key, line, _color)


def _look_edges(log, key, result, args, kwargs):
    log.remember(key, result, _arrow_faces if type(result) is list else _edges)


def _wedges(result):
    # matplotlib 3.11 has a container
    return result.wedges if hasattr(result, "wedges") else result[0]


def _hist_patches(result):
    parts = result[2]
    return (
        [patch for part in parts for patch in part] if type(parts) is cbook.silent_list else parts
    )


_LOOKS = {
    "bar": _each(_bar_face),
    "scatter": _look_scatter,
    "axhline": _whole(_color),
    "axvline": _whole(_color),
    "_fill_between_x_or_y": _whole(_first_face),
    "pie": _each(_face, _wedges),
    "axvspan": _whole(_face),
    "axhspan": _whole(_face),
    "hlines": _whole(_edges),
    "vlines": _whole(_edges),
    "boxplot": _each(
        _face, lambda result: [box for box in result["boxes"] if type(box) is patches.PathPatch]
    ),
    "violinplot": _each(_first_face, lambda result: result["bodies"]),
    "hist": _each(_face, _hist_patches),
    "quiver": _whole(_faces),
    "fill": _each(_face),
    "broken_barh": _whole(_faces),
    **dict.fromkeys(("imshow", "pcolor", "contour", "contourf", "tripcolor"), _whole(_cmap)),
}
_LOOKS_3D = {
    "scatter": _look_scatter_3d,
    "plot": _each(_color),
    "plot_surface": _look_surface,
    "bar3d": _whole(lambda artist: _faces(artist)[:1]),
    "bar": _each(_face),
    "add_collection3d": _whole(_faces),
}
_LOOKS_NETWORKX = {
    "draw_networkx_nodes": _whole(_faces),
    "draw_networkx_edges": _look_edges,
    "draw_networkx_labels": _each(_color, lambda result: result.values()),
}


def _hook_colors(log: ColorLog, optional: dict[str, Any]) -> None:
    # Any: the stubs neither know private names nor allow for methods that are replaced.
    base: Any = _base
    lines = base._process_plot_var_args
    maker = "_makeline" if hasattr(lines, "_makeline") else "_make_line"  # since matplotlib 3.10
    line = log.wrap(getattr(lines, maker), "matplotlib/axes/_base.py/_makeline", _look_line)
    setattr(lines, maker, line)
    for name in _COLOR_FUNCTIONS:
        setattr(Axes, name, log.wrap(getattr(Axes, name), f"{_FILES[name]}/{name}", _LOOKS[name]))
    polar: Any = PolarAxes
    polar.plot = log.wrap(polar.plot, f"{_AXES}/plot_polar", _look_polar_plot)
    for name, file in _FILES_3D.items():
        setattr(Axes3D, name, log.wrap(getattr(Axes3D, name), f"{file}/{name}_3d", _LOOKS_3D[name]))
    for cls, file in _classes(optional):
        read = {NonUniformImage: _cmap, Ellipse: _face, Circle: _face}.get(cls, _venn_faces)
        cls.__init__ = log.wrap(cls.__init__, f"{file}/__init__", _created(cls, read))
    if "networkx" in optional:
        for module in (optional["networkx"], sys.modules["networkx"]):
            for name in _NETWORKX:
                original = getattr(module, name)
                hook = log.wrap(original, f"{_NETWORKX_FILE}/{name}", _LOOKS_NETWORKX[name])
                setattr(module, name, _with_parameters(original, hook))
    if "squarify" in optional:
        squarify = optional["squarify"]
        look = _each(_face, lambda ax: [patch for bars in ax.containers for patch in bars])
        squarify.plot = log.wrap(squarify.plot, "squarify/__init__.py/plot_squarify", look)

"""Records what a script draws while it draws it, for the training record.

Runs in the process of the untrusted script, so everything here is a claim
(`records.Record.from_json` validates it). Needs matplotlib and numpy only. Once in the zygote:
`install()`. Before each script: `start()`. After each render that is kept: `finish()`, which
describes the most recent draw with pixels, as its canvas is then.

The record follows ChartMimic's low-level evaluators without their defects (docs/reward.md names
each difference):

    texts   every line of text that reached the Agg renderer in that draw, left visible pixels, and
            is no tick label
    layout  the grid position of each axes of that figure which shows something
    types   calls of the drawing functions in `_HOOKS`, outermost only, of which enough ink is left
            in that figure (`ink`)
    colors  "<function>--<#RRGGBB or colormap name>" of the artists those calls returned, as they
            were painted

Nothing is drawn twice: all comes from the draw that makes the pixels. One hook costs about a
microsecond per call.
"""

import contextlib
import functools
import importlib.abc
import sys
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from matplotlib import axis, colorbar, figure, image, legend, patches, text
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends import backend_agg
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.patheffects import PathEffectRenderer
from mpl_toolkits.mplot3d import Axes3D

from mmrecoder_jax.env.child import lettering
from mmrecoder_jax.env.child.artist_colors import color_names
from mmrecoder_jax.env.child.ink import Canvas, Ink
from mmrecoder_jax.env.child.scene import MAX_PANELS, Mark, Marks, Panel, describe

MAX_TEXTS, MAX_CHARS = 2000, 500

# Drawing functions of Axes that make a chart type.
_HOOKS = (
    # those of the official evaluator
    *("bar", "barh", "plot", "axhline", "axvline", "axvspan", "axhspan", "hlines", "vlines"),
    *("errorbar", "boxplot", "violinplot", "violin", "hist", "fill_between", "fill_betweenx"),
    *("scatter", "quiver", "pie", "fill", "imshow", "pcolor", "contour", "contourf"),
    *("broken_barh", "tripcolor"),
    # those that it misses
    *("pcolormesh", "pcolorfast", "hexbin", "streamplot", "bxp", "stairs", "eventplot", "barbs"),
    *("tricontour", "tricontourf"),
)
# What puts an artist of the script's own making on the canvas: the type is the artist's class.
_ADDING = ("add_patch", "add_collection", "add_line", "add_image", "add_table", "add_artist")
_NO_CHART = (text.Text, legend.Legend)
_COUNTED_WHEN_MADE = (patches.Ellipse, patches.Circle)  # exactly these; an arc is an ellipse too
_HOOKS_3D = (
    *("scatter", "scatter3D", "plot", "plot3D", "plot_surface", "bar3d", "bar", "add_collection3d"),
    *("plot_trisurf", "plot_wireframe", "voxels", "quiver", "quiver3D", "stem", "stem3D"),
)
_TYPE_NAMES = {"bxp": "boxplot", "pcolorfast": "pcolormesh", "pcolor": "pcolormesh"}


class _Draw:
    """A draw of a figure: what reached its canvas, by mark and by text."""

    def __init__(self, fig: figure.Figure, renderer: Any, calls: list[tuple[str, Any]]):
        self.figure, self.renderer, self.calls = fig, renderer, list(calls)
        self.texts: list[lettering.Lettering] = []
        # (text, x, y): the same text at the same place counts once
        self.places: set[tuple[str, int, int]] = set()
        axes = [ax for ax in _all_axes(fig.axes) if ax.get_visible()][:MAX_PANELS]
        # ids of the axes' offset texts ("1e9"), which belong to the tick labels
        self.offsets = {id(each.get_offset_text()) for ax in axes for each in _axis_of(ax)}
        self._axes = axes
        self._numbers = {id(ax): number for number, ax in enumerate(axes)}
        self.panels: list[Panel] = []
        self.ink = Ink(np.asarray(renderer.buffer_rgba()))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around the draw: tells the ink whose turn it is."""
        own: list[tuple[Any, Any]] = []  # artists, and what they had as `draw` of their own
        try:
            for artist, marks in self._marks():
                with contextlib.suppress(Exception):  # an artist of the script's own making
                    own.append((artist, vars(artist).get("draw")))
                    artist.draw = self._watching(artist.draw, marks)
            self.renderer._renderer.ink = self.ink
            yield
            # now, as a tight box is taken back after the draw
            self.panels = [_panel(ax, self.renderer.height) for ax in self._axes]
            self.renderer._renderer.panels = self.panels
        finally:
            for artist, draw in own:
                if draw is None:
                    vars(artist).pop("draw", None)
                else:
                    artist.draw = draw

    def _marks(self) -> Iterator[tuple[Any, Marks]]:
        """Each artist that calls have returned, with the marks that it is part of."""
        found: dict[int, tuple[Any, list[Mark]]] = {}
        for number, (kind, result) in enumerate(self.calls):
            for artist in _artists(result):
                if isinstance(artist, text.Text) and kind != "draw_networkx_labels":
                    continue  # the labels of a pie are no marks
                with contextlib.suppress(Exception):
                    panel = -1 if artist.axes is None else self._numbers[id(artist.axes)]
                    mark = Mark(number, kind, tuple(color_names(artist)), panel)
                    found.setdefault(id(artist), (artist, []))[1].append(mark)
        for artist, marks in found.values():
            yield artist, tuple(marks)

    def _watching(self, draw: Any, marks: Marks) -> Any:
        def watched_draw(*args, **kwargs):
            with self.ink.drawing(marks):
                return draw(*args, **kwargs)

        return watched_draw


class _State:
    """What the current script has done so far."""

    def __init__(self) -> None:
        # (type, what the function returned), outermost calls only
        self.calls: list[tuple[str, Any]] = []
        self.inside = False  # within a hooked function
        self.in_tick = False  # within the drawing of a tick
        self.drawing: _Draw | None = None  # the draw under way; None between draws
        self.drawn: _Draw | None = None  # the last draw that came to its end
        self.filters = 0  # image filters that are open: what is drawn now may still be thrown away
        # by id of an axes with or of a colorbar: its subplotspec, its cell in 3.8.4
        self.cells: dict[int, tuple[Any, list[int]]] = {}


_state = _State()
_replaced: list[tuple[Any, str, Any]] = []  # (owner, name, original)


def install() -> None:
    """Puts the hooks into matplotlib, and into networkx and squarify when they are imported.

    Idempotent.
    """
    if _replaced:
        return
    for name in _HOOKS:
        _hook_call(Axes, name, _TYPE_NAMES.get(name, name))
    for owner in (Axes, figure.FigureBase):
        for name in _ADDING:
            if hasattr(owner, name):
                _hook_call(owner, name, None)
    for cls in _COUNTED_WHEN_MADE:
        _hook_init(cls, cls.__name__.lower())
    _hook_init(image.NonUniformImage, "imshow")
    for name in ("__init__", "update_normal"):
        _hook_quiet(colorbar.Colorbar, name)
    _hook_colorbar_grid()
    _hook_3d()
    _hook_renderer()
    _hook_optional()


def start() -> None:
    """Forgets everything recorded; call before each script."""
    global _state
    _state = _State()


def in_tick() -> bool:
    """Whether what is drawn now is part of a tick."""
    return _state.in_tick


def finish() -> dict[str, Any] | None:
    """The record of the most recent draw with pixels as JSON, None when there was none."""
    draw = _state.drawn
    return None if draw is None else _describe(draw)


def remove() -> None:
    """Puts the originals back; a benchmark measures what the hooks cost."""
    for owner, name, original in _replaced:
        setattr(owner, name, original)


# ---------------------------------------------------------------------------------------- the hooks


def _replace(owner: Any, name: str, hook: Any) -> None:
    _replaced.append((owner, name, getattr(owner, name)))
    setattr(owner, name, hook)


def _hook_call(owner: Any, name: str, kind: str | None) -> None:
    """Records the outermost calls of `owner.name`; without a kind, it is the class that it adds."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args, **kwargs):
        state = _state
        if state.inside:
            return original(*args, **kwargs)
        state.inside = True
        try:
            result = original(*args, **kwargs)
        finally:
            state.inside = False
        if kind is not None:
            state.calls.append((kind, result))
        elif not isinstance(result, _NO_CHART) and type(result) not in _COUNTED_WHEN_MADE:
            state.calls.append((_class_name(result), result))
        return result

    _replace(owner, name, call)


def _class_name(artist: Any) -> str:
    """The name of an artist's class, in matplotlib: a script may call its own what it likes."""
    for cls in type(artist).__mro__:
        if cls.__module__.startswith(("matplotlib.", "mpl_toolkits.")):
            return cls.__name__.lower()
    return "artist"


def _hook_quiet(owner: Any, name: str) -> None:
    """What `owner.name` draws is not recorded: the mesh inside a colorbar is no chart."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args, **kwargs):
        state = _state
        outer, state.inside = state.inside, True
        try:
            return original(*args, **kwargs)
        finally:
            state.inside = outer

    _replace(owner, name, call)


def _hook_colorbar_grid() -> None:
    """Records the cells of axes with a colorbar as 3.8.4 has them.

    A colorbar takes its parent into a grid of its own, whose shape differs between releases. In
    3.8.4 a colorbar to the right splits the cell into two columns, and the right one into three
    rows of which the bar is the middle one.
    """
    original = colorbar.make_axes_gridspec

    @functools.wraps(original)
    def make(parent, *args, **kwargs):
        cax, rest = original(parent, *args, **kwargs)
        where = rest["ticklocation"]
        beside, first = where in ("left", "right"), int(where in ("left", "top"))
        main = [1, 2, 0, 0, first, first] if beside else [2, 1, first, first, 0, 0]
        bar = [3, 1, 1, 1, 0, 0] if beside else [1, 3, 0, 0, 1, 1]
        _state.cells[id(parent)] = parent.get_subplotspec(), main
        _state.cells[id(cax)] = cax.get_subplotspec(), bar
        return cax, rest

    _replace(colorbar, "make_axes_gridspec", make)


def _hook_init(cls: Any, kind: str) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if type(self) is cls and not _state.inside:
            _state.calls.append((kind, self))

    _replace(cls, "__init__", init)


def _hook_3d() -> None:
    for name in _HOOKS_3D:
        kind = name.removesuffix("3D")
        _hook_call(Axes3D, name, kind if kind.endswith("3d") else kind + "3d")


def _hook_networkx(module: Any) -> None:
    package = sys.modules["networkx"]
    for name in ("draw_networkx_nodes", "draw_networkx_edges", "draw_networkx_labels"):
        original = getattr(module, name)
        _hook_call(module, name, name)
        if getattr(package, name, None) is original:  # the package has names of its own for them
            _replace(package, name, getattr(module, name))


def _hook_venn(module: Any) -> None:
    _hook_init(module.VennDiagram, "venndiagram")


def _hook_axisartist(module: Any) -> None:
    """The tick labels of axisartist are artists of their own, drawn by no tick."""
    _hook_tick(module.TickLabels)


class _LateHooks(importlib.abc.MetaPathFinder):
    """Hooks a module when a script imports it: nothing is imported for scripts that do not."""

    hooks: ClassVar = {
        "mpl_toolkits.axisartist.axis_artist": _hook_axisartist,
        "matplotlib_venn._common": _hook_venn,
        "networkx.drawing.nx_pylab": _hook_networkx,
        "squarify": lambda module: _hook_call(module, "plot", "squarify"),
    }

    def find_spec(self, name, path=None, target=None):
        hook = self.hooks.get(name)
        if hook is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def run_and_hook(module):
            run(module)
            hook(module)

        loader.exec_module = run_and_hook
        return spec


def _hook_optional() -> None:
    late = _LateHooks()
    sys.meta_path.insert(0, late)
    for name, hook in late.hooks.items():
        if name in sys.modules:
            hook(sys.modules[name])


def _hook_renderer() -> None:
    draw_figure = figure.Figure.draw
    draw_text, draw_path_text = RendererAgg.draw_text, PathEffectRenderer.draw_text

    @functools.wraps(draw_figure)
    def figure_draw(self, renderer, *args, **kwargs):
        state = _state
        # A layout pass replaces the draw_* methods of the renderer instance by no-ops: nothing is
        # recorded then.
        if not isinstance(renderer, RendererAgg) or "draw_text" in vars(renderer):
            return draw_figure(self, renderer, *args, **kwargs)
        draw = _Draw(self, renderer, state.calls)
        state.drawing = draw
        try:
            with draw.watched():
                result = draw_figure(self, renderer, *args, **kwargs)
        finally:
            state.drawing = None
        state.drawn = draw
        return result

    def recorded(original, agg):
        @functools.wraps(original)
        def record_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
            state, draw = _state, _state.drawing
            place = (s, int(x), int(y))
            if (
                draw is None
                or state.in_tick
                or state.filters
                or place in draw.places
                or id(mtext) in draw.offsets
                or lettering.text_size(self, prop) < lettering.MIN_PIXELS
                or len(draw.texts) >= MAX_TEXTS
            ):
                return original(self, gc, x, y, s, prop, angle, ismath, mtext)
            renderer = agg(self)
            area = lettering.text_area(renderer, x, y, s, prop, angle)
            window = np.asarray(renderer.buffer_rgba())[area]
            before = window.copy()
            original(self, gc, x, y, s, prop, angle, ismath, mtext)
            size = lettering.text_size(self, prop)
            needed = lettering.pixels_needed(s, ismath, size)
            line = lettering.Lettering(s[:MAX_CHARS], size, needed, area, before, window)
            if line.has_ink():
                draw.texts.append(line)
                draw.places.add(place)

        return record_text

    start_filter, stop_filter = RendererAgg.start_filter, RendererAgg.stop_filter

    @functools.wraps(start_filter)
    def start(self):
        _state.filters += 1
        return start_filter(self)

    @functools.wraps(stop_filter)
    def stop(self, post_processing):
        _state.filters -= 1
        return stop_filter(self, post_processing)

    _replace(backend_agg, "_RendererAgg", Canvas)
    _replace(RendererAgg, "start_filter", start)
    _replace(RendererAgg, "stop_filter", stop)
    _replace(figure.Figure, "draw", figure_draw)
    _hook_tick(axis.Tick)
    _replace(RendererAgg, "draw_text", recorded(draw_text, lambda renderer: renderer))
    _replace(
        PathEffectRenderer,
        "draw_text",
        recorded(draw_path_text, lambda renderer: renderer._renderer),
    )


def _hook_tick(cls: Any) -> None:
    """What `cls.draw` draws is a tick: its texts are not recorded."""
    draw = cls.draw

    @functools.wraps(draw)
    def tick_draw(self, renderer):
        state = _state
        state.in_tick = True
        try:
            return draw(self, renderer)
        finally:
            state.in_tick = False

    _replace(cls, "draw", tick_draw)


# --------------------------------------------------------------------------------------- the record


def _describe(draw: _Draw) -> dict[str, Any]:
    """The record of a draw, by its canvas as it is now."""
    texts = lettering.readable(draw.texts, draw.ink.canvas())
    return {"texts": texts, **describe(draw.panels, draw.ink)}


def _panel(ax: Any, height: float) -> Panel:
    (x0, y0), (x1, y1) = ax.bbox.min, ax.bbox.max
    cell = _cell(ax)
    box = float(x0), float(height - y1), float(x1), float(height - y0)
    return Panel(box, None if cell is None else tuple(cell))


def _all_axes(axes: Iterable[Any]) -> Iterator[Axes]:
    """Axes and, below each, its insets."""
    for ax in axes:
        yield ax
        yield from _all_axes(ax.child_axes)


def _axis_of(ax: Any) -> tuple[Any, ...]:
    return (ax.xaxis, ax.yaxis, ax.zaxis) if hasattr(ax, "zaxis") else (ax.xaxis, ax.yaxis)


def _cell(ax: Axes) -> list[int] | None:
    """The grid position (`records.Record.layout`) of an axes that shows a frame or an artist.

    None for one that is on no grid, or shows nothing.
    """
    spec = ax.get_subplotspec()
    if spec is None:
        return None
    if not ax.axison and not (
        ax.has_data() or ax.texts or ax.tables or ax.artists or ax.get_legend()
    ):
        return None
    known, cell = _state.cells.get(id(ax), (None, []))
    if known is spec:
        return list(cell)
    down, across = spec.rowspan, spec.colspan
    shape = spec.get_gridspec().get_geometry()
    return [*shape, down.start, down.stop - 1, across.start, across.stop - 1]


def _artists(result: Any) -> Iterator[Artist]:
    """The artists in what a drawing function returned.

    It may return artists, containers, tuples, the boxes of a boxplot, the bodies of a violin.
    """
    if isinstance(result, Artist):
        yield result
    elif isinstance(result, dict):
        parts = [result[key] for key in ("boxes", "bodies") if key in result] or list(
            result.values()
        )
        for part in parts:
            yield from _artists(part)
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from _artists(part)
    elif hasattr(result, "wedges"):  # PieContainer of matplotlib 3.11, a tuple before
        yield from result.wedges
    elif hasattr(result, "arrows"):  # StreamplotSet
        yield result.lines
    elif hasattr(result, "patches") and hasattr(result, "subset_labels"):  # VennDiagram
        yield from (patch for patch in result.patches if patch is not None)

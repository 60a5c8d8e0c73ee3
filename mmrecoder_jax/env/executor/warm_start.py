"""What is made in the zygote before any script asks for it: a figure, its first axes, their ticks,
and open fonts.

Making an axes and its ticks takes a third of the time of a small chart, and nothing in it depends
on the script as long as the script has not changed rcParams. So the zygote makes them once, and in
the fork `pyplot.figure`, `Figure.add_subplot` and `Axis._get_tick` hand out what is ready. Each
thing is handed out once, and only where matplotlib would make exactly the same: the first pyplot
figure without special arguments (its size may differ: everything hangs on it by transforms),
rectilinear axes that share nothing, ticks of an axis whose tick settings and first tick are as they
were. Everything else is made as ever.

Fonts: matplotlib reads glyphs through a Python file object, and opens every font anew after a fork
because forks would share the file's offset. Fonts for Agg are read from memory instead: three times
as fast, and they can stay open across the fork.
"""

import functools
import inspect
import io
import os
import types
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib import axis, figure, font_manager, ft2font
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends import backend_agg
from matplotlib.gridspec import SubplotSpec

_AXES = 4
_TICKS = 9  # a major locator makes at most nine intervals; the first tick is the axis's own


class Reserve:
    """What is ready to be handed out. `install()` once, after rcParams are as every script finds
    them; `open()` in the fork.
    """

    def __init__(self) -> None:
        self._open = False
        self._rc: dict[str, Any] = {}
        self._manager: Any = None
        self._figure: figure.Figure | None = None
        self._axes: list[Axes] = []
        self._ticks: dict[
            int, tuple[dict[str, Any], axis.Tick, list[axis.Tick]]
        ] = {}  # by id of the axis: settings, first, spare

    def install(self) -> None:
        """Makes the things and puts the hooks into matplotlib."""
        self._rc = {
            name: list(value) if isinstance(value, list) else value
            for name, value in matplotlib.rcParams.items()
        }
        self._manager = plt.new_figure_manager(1)
        self._figure = self._manager.canvas.figure
        self._axes = [Axes(self._figure, 1, 1, 1) for _ in range(_AXES)]
        for ax in self._axes:
            for each in (ax.xaxis, ax.yaxis):
                spare = [each._get_tick(major=True) for _ in range(_TICKS)]
                self._ticks[id(each)] = dict(each._major_tick_kw), each.majorTicks[0], spare
        plt.new_figure_manager = self._hook_manager(plt.new_figure_manager)
        figure.FigureBase.add_subplot = self._hook_axes(figure.FigureBase.add_subplot)
        axis.Axis._get_tick = self._hook_tick(axis.Axis._get_tick)

    def open(self) -> None:
        """From now on things are handed out."""
        self._open = True

    def _usable(self) -> bool:
        try:
            return self._open and dict.__eq__(matplotlib.rcParams, self._rc)
        except ValueError:  # a cycle of arrays, which have no truth value: not the initial settings
            return False

    def _hook_manager(self, original: Callable[..., Any]) -> Callable[..., Any]:
        defaults = {
            "dpi": None,
            "facecolor": None,
            "edgecolor": None,
            "frameon": True,
            "FigureClass": figure.Figure,
        }

        @functools.wraps(original)
        def new_figure_manager(num, *args, figsize=None, **kwargs):
            manager = self._manager
            if (
                num == 1
                and not args
                and kwargs == defaults
                and _is_size(figsize)
                and manager is not None
                and self._usable()
            ):
                self._manager = None
                if figsize is not None:
                    manager.canvas.figure.set_size_inches(figsize, forward=False)
                return manager
            return original(num, *args, figsize=figsize, **kwargs)

        return new_figure_manager

    def _hook_axes(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def add_subplot(self_, *args, **kwargs):
            shares = kwargs.keys() <= {"sharex", "sharey"} and all(
                value is None for value in kwargs.values()
            )
            if (
                self_ is self._figure
                and self._axes
                and shares
                and _is_grid(args)
                and self._usable()
            ):
                cls, settings = self_._process_projection_requirements(**kwargs)
                if cls is Axes:
                    if len(args) == 1 and isinstance(args[0], int):
                        args = tuple(map(int, str(args[0])))
                    spec = SubplotSpec._from_subplot_args(self_, args or (1, 1, 1))
                    ax = self._axes.pop(0)
                    ax.set_subplotspec(spec)
                    return self_._add_axes_internal(ax, (cls, settings))
            return original(self_, *args, **kwargs)

        return add_subplot

    def _hook_tick(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _get_tick(self_, major):
            kept = self._ticks.get(id(self_)) if major else None
            if kept is not None and kept[2]:
                settings, first, spare = kept
                # Moving a spine makes an axis drop its ticks, as later ones hang on another
                # transform.
                ticks = vars(self_).get("majorTicks")
                if (
                    ticks
                    and ticks[0] is first
                    and self_._major_tick_kw == settings
                    and self._usable()
                ):
                    return spare.pop()
            return original(self_, major)

        return _get_tick


def fonts_in_memory() -> None:
    """Gives Agg a `get_font` of its own, whose fonts are read from memory. The other backends need
    the path of an open font.
    """

    def open_font(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> ft2font.FT2Font:
        with open(path, "rb") as file:
            return ft2font.FT2Font(io.BytesIO(file.read()), *args, **kwargs)

    load = _with_names(
        font_manager._get_font.__wrapped__, ft2font=types.SimpleNamespace(FT2Font=open_font)
    )
    backend_agg.get_font = _with_names(
        inspect.unwrap(font_manager.get_font), _get_font=functools.lru_cache(64)(load)
    )


def _with_names(function: types.FunctionType, **names: Any) -> types.FunctionType:
    """`function` of font_manager, with some of the names that it uses meaning something else."""
    copy = types.FunctionType(
        function.__code__, vars(font_manager) | names, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _is_size(size: Any) -> bool:
    if size is None:
        return True
    return (
        isinstance(size, list | tuple)
        and len(size) == 2
        and all(type(n) in (int, float) and 0 < n < 1e6 for n in size)
    )


def _is_grid(args: tuple[Any, ...]) -> bool:
    """Whether these arguments of `add_subplot` name a cell of a grid in one of the plain ways."""
    if len(args) == 1:
        return type(args[0]) is SubplotSpec or (type(args[0]) is int and 100 <= args[0] <= 999)
    return not args or (len(args) == 3 and all(type(n) is int for n in args))

"""A figure, its first axes and their ticks, made in the zygote before any script asks for them.

Making an axes and its ticks takes a third of the time of a small chart, and nothing in it depends
on the script as long as the script has not changed rcParams. So the zygote makes them once, and in
the fork `pyplot.figure`, `Figure.add_subplot` and `Axis._get_tick` hand out what is ready. Each
thing is handed out once, and only where matplotlib would make exactly the same: the first pyplot
figure without special arguments (its size may differ: everything hangs on it by transforms),
rectilinear axes that share nothing, ticks of an axis whose tick settings and first tick are as they
were. Everything else is made as ever.
"""

import functools
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib import axis, figure
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.gridspec import SubplotSpec

_AXES = 4
_TICKS = 9  # a major locator makes at most nine intervals; the first tick is the axis's own
_FIGURE_DEFAULTS = {
    "dpi": None,
    "facecolor": None,
    "edgecolor": None,
    "frameon": True,
    "FigureClass": figure.Figure,
}


class _SpareTicks:
    """Ticks of one axis, and how the axis has to be for them to fit."""

    def __init__(self, owner: Any):
        self.ticks = [owner._get_tick(major=True) for _ in range(_TICKS)]
        self.settings = dict(owner._major_tick_kw)
        self.first = owner.majorTicks[0]

    def fit(self, owner: Any) -> bool:
        # Moving a spine makes an axis drop its ticks, as later ones hang on another transform.
        ticks = vars(owner).get("majorTicks")
        unchanged = ticks and ticks[0] is self.first and owner._major_tick_kw == self.settings
        return bool(self.ticks and unchanged)


class Reserve:
    """What is ready to be handed out.

    `install()` once, after rcParams are as every script finds them; `open()` in the fork.
    """

    def __init__(self) -> None:
        self._open = False
        self._rc: dict[str, Any] = {}
        self._manager: Any = None
        self._owner: Any = None  # the figure of the axes
        self._axes: list[Axes] = []
        self._ticks: dict[int, _SpareTicks] = {}  # by id of the axis

    def install(self) -> None:
        """Makes the things and puts the hooks into matplotlib."""
        self._rc = {
            name: list(value) if isinstance(value, list) else value
            for name, value in matplotlib.rcParams.items()
        }
        self._manager = plt.new_figure_manager(1)
        self._owner = self._manager.canvas.figure
        self._axes = [Axes(self._owner, 1, 1, 1) for _ in range(_AXES)]
        for ax in self._axes:
            for each in (ax.xaxis, ax.yaxis):
                self._ticks[id(each)] = _SpareTicks(each)
        # Any: the stubs of matplotlib do not allow for functions and methods that are replaced
        pyplot: Any = plt
        base: Any = figure.FigureBase
        ticked: Any = axis.Axis
        pyplot.new_figure_manager = self._hook_manager(pyplot.new_figure_manager)
        base.add_subplot = self._hook_axes(base.add_subplot)
        ticked._get_tick = self._hook_tick(ticked._get_tick)

    def open(self) -> None:
        """From now on things are handed out."""
        self._open = True

    def _usable(self) -> bool:
        try:
            return self._open and dict.__eq__(matplotlib.rcParams, self._rc)
        except ValueError:  # a cycle of arrays, which have no truth value: not the initial settings
            return False

    def _hook_manager(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def new_figure_manager(num, *args, figsize=None, **kwargs):
            manager = self._manager
            plain = num == 1 and not args and kwargs == _FIGURE_DEFAULTS and _is_size(figsize)
            if plain and manager is not None and self._usable():
                self._manager = None
                if figsize is not None:
                    manager.canvas.figure.set_size_inches(figsize, forward=False)
                return manager
            return original(num, *args, figsize=figsize, **kwargs)

        return new_figure_manager

    def _hook_axes(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def add_subplot(fig: Any, *args: Any, **kwargs: Any) -> Any:
            shares_nothing = kwargs.keys() <= {"sharex", "sharey"} and all(
                value is None for value in kwargs.values()
            )
            plain = shares_nothing and _is_grid(args)
            if fig is self._owner and self._axes and plain and self._usable():
                cls, settings = fig._process_projection_requirements(**kwargs)
                if cls is Axes:
                    if len(args) == 1 and isinstance(args[0], int):
                        args = tuple(map(int, str(args[0])))
                    spec = SubplotSpec._from_subplot_args(fig, args or (1, 1, 1))
                    ax = self._axes.pop(0)
                    ax.set_subplotspec(spec)
                    return fig._add_axes_internal(ax, (cls, settings))
            return original(fig, *args, **kwargs)

        return add_subplot

    def _hook_tick(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _get_tick(owner, major):
            spare = self._ticks.get(id(owner)) if major else None
            if spare is not None and spare.fit(owner) and self._usable():
                return spare.ticks.pop()
            return original(owner, major)

        return _get_tick


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

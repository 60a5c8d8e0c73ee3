"""The results of a sweep as two pictures.

    sweep.png     the metric over the values of each swept field: runs as dots, mean and interval
    curves.png    the metric over the steps: a line for each setting, the spread of its seeds shaded

With one swept field, or two, the first picture joins the means; the second field makes the lines.
With more, or after a random draw, there is a panel for each field and the dots tell the story.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmrecoder_jax.sweeping.points import short_names
from mmrecoder_jax.sweeping.results import Metric, Setting, ranked

_MOST_LINES = 10  # of different colours; the best settings are drawn
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_WIDTH, _HEIGHT = 5.2, 3.6  # inches of a panel
_LEGEND = 3.2  # inches of what a line is called
_APART = 0.012  # of the axis, between the bars of two lines
_LOG_RATIO = 20  # of the largest value to the smallest one, from which an axis is logarithmic


def write_plots(settings: Sequence[Setting], metric: Metric, workdir: Path) -> list[Path]:
    """Draws what has finished; returns the files, none where nothing has."""
    known = [setting for setting in settings if setting.numbers]
    if not known:
        return []
    found = [(workdir / "sweep.png", _over_values(known, metric))]
    if any(result.curve for setting in known for result in setting.results):
        found.append((workdir / "curves.png", _over_steps(known, metric)))
    for path, figure in found:
        beside = path.with_name(f".{path.name}")
        figure.savefig(beside, dpi=120, format="png")
        beside.replace(path)
    return [path for path, _ in found]


def _figure(panels: int, beside: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure and its panels.

    Args:
      beside: inches for a legend.
    """
    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure((_WIDTH * columns + beside, _HEIGHT * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _over_values(settings: Sequence[Setting], metric: Metric) -> Figure:
    fields = list(settings[0].values)
    names = short_names(fields)
    # A grid of two fields is one panel with lines; a draw has a value for each of its settings.
    joined = len(fields) == 1 or (len(fields) == 2 and _is_grid(settings, fields))
    panels = 1 if joined or not fields else len(fields)
    figure, axes = _figure(panels, beside=_LEGEND / 2 if joined and len(fields) == 2 else 0.0)
    if not fields:
        _panel(axes[0], "", settings, "", 0)
        axes[0].set_xlabel("all seeds")
    for number, ax in enumerate(axes if fields else []):
        field = fields[number]
        if joined and len(fields) == 2:
            for i, value in enumerate(_values(settings, fields[1])):
                group = [setting for setting in settings if setting.values[fields[1]] == value]
                _panel(ax, field, group, f"{names[fields[1]]}={value}", i, settings)
            ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        else:
            _panel(ax, field, settings, "", 0, line=joined)
        ax.set_xlabel(field)
    for ax in axes:
        ax.set_ylabel(metric.name)
    several = any(len(setting.numbers) > 1 for setting in settings)
    figure.suptitle(
        "a dot is a run; bars: mean and 95 % interval over seeds" if several else "a dot is a run",
        fontsize="small",
    )
    return figure


def _is_grid(settings: Sequence[Setting], fields: Sequence[str]) -> bool:
    """Whether few values of the second field share the settings among them."""
    second = _values(settings, fields[1])
    return len(second) <= len(_COLORS) and len(second) * 2 <= max(len(settings), 2)


def _values(settings: Sequence[Setting], field: str) -> list[str]:
    return list(dict.fromkeys(setting.values[field] for setting in settings))


def _panel(
    ax: Axes,
    field: str,
    settings: Sequence[Setting],
    label: str,
    color: int,
    all_settings: Sequence[Setting] | None = None,
    line: bool = True,
) -> None:
    """Draws settings over the values of a field.

    Args:
      all_settings: of the panel; a field whose values are no numbers has a place for each of them.
      line: whether the means of numbers are joined.
    """
    texts = [setting.values.get(field, "") for setting in all_settings or settings]
    numbers = _as_numbers(texts)
    places = numbers or {text: float(i) for i, text in enumerate(dict.fromkeys(texts))}
    ends = min(places.values()), max(places.values())
    log = numbers is not None and ends[0] > 0 and ends[1] / ends[0] >= _LOG_RATIO
    if numbers is None:
        ax.set_xticks(list(places.values()), [text[:20] for text in places])
        ax.margins(x=0.2)
    elif log:
        ax.set_xscale("log")
    order = sorted(settings, key=lambda setting: places[setting.values.get(field, "")])
    x = np.array([places[setting.values.get(field, "")] for setting in order])
    # Bars of several lines stand beside each other.
    if log:
        x *= (ends[1] / ends[0]) ** (_APART * color)
    else:
        x += (ends[1] - ends[0]) * _APART * color
    found = [setting.over_seeds for setting in order]
    means = np.array([one.mean for one in found])
    half = np.array([0.0 if math.isnan(one.low) else one.high - one.mean for one in found])
    shade = _COLORS[color % len(_COLORS)]
    for place, setting in zip(x, order, strict=True):
        ax.plot([place] * len(setting.numbers), setting.numbers, "o", color=shade, ms=4, alpha=0.45)
    if half.any() or line:
        ax.errorbar(
            *(x, means, half),
            fmt="D-" if line and numbers is not None else "D",
            ms=4,
            color=shade,
            capsize=3,
            lw=1.4,
            label=label,
        )


def _as_numbers(texts: Sequence[str]) -> dict[str, float] | None:
    """The numbers that texts are; None where one is none."""
    try:
        return {text: float(text) for text in texts}
    except ValueError:
        return None


def _name_of(setting: Setting) -> str:
    """What a legend calls a setting."""
    names = short_names(list(setting.values))
    return " ".join(f"{names[f]}={text[:20]}" for f, text in setting.values.items()) or "all seeds"


def _over_steps(settings: Sequence[Setting], metric: Metric) -> Figure:
    figure, (ax,) = _figure(1, beside=_LEGEND)
    shown = ranked(settings, metric.best)[:_MOST_LINES]
    for number, setting in enumerate(shown):
        curves = [dict(result.curve) for result in setting.results if result.curve]
        steps = sorted({step for curve in curves for step in curve})
        grid = np.array([[curve.get(step, np.nan) for step in steps] for curve in curves])
        counts = np.isfinite(grid).sum(axis=0)
        means = np.nansum(grid, axis=0) / counts
        shade = _COLORS[number % len(_COLORS)]
        style = "-" if number < len(_COLORS) else "--"
        ax.plot(steps, means, style, color=shade, lw=1.5, label=_name_of(setting))
        if len(curves) > 1:
            ax.fill_between(
                steps,
                np.nanmin(grid, axis=0),
                np.nanmax(grid, axis=0),
                color=shade,
                alpha=0.15,
                lw=0,
            )
    ax.set_xlabel("step")
    ax.set_ylabel(metric.name)
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    left_out = len(settings) - len(shown)
    more = f"; the best {len(shown)} of {len(settings)} settings" if left_out else ""
    figure.suptitle(f"mean over seeds, shaded from lowest to highest{more}", fontsize="small")
    return figure

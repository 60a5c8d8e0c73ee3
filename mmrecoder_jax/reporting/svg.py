"""Small pictures of numbers as inline SVG, in the colours of the page: lines over steps, points
with their intervals.

Colours are classes of the style sheet (`page.css`), so one picture serves light and dark. All text
is escaped here.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mmrecoder_jax.reporting.escape import escape

WIDTH, HEIGHT = 340, 190  # of a panel, in units of the picture
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24  # room for the numbers of the axes
COLORS = 6  # classes c0, c1, ... of the style sheet
SMOOTH_FROM = 40  # points from which a curve is drawn with its running mean
FLAT = 2e-3  # numbers that differ by less, as a share of them, are shown as a flat curve
BINS = 240  # most points of a curve; more are averaged


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: its name and colour (`COLORS`), and where it goes."""

    name: str
    color: int
    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Point:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class _Frame:
    """From numbers to places in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        low, high = self.x
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / (high - low)

    def up(self, y: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)


def lines(found: Sequence[Line], label: str, threshold: float | None = None) -> str:
    """Curves over steps; long ones pale with their running mean on top.

    Args:
      label: what a reader who does not see it is told.
      threshold: a level that is marked in red.
    """
    drawn = [(line, np.isfinite(line.y)) for line in found]
    values = [line.y[finite] for line, finite in drawn]
    every = np.concatenate([*values, [] if threshold is None else [threshold]])
    steps = np.concatenate([line.x for line in found])
    if not every.size or not steps.size:
        return _picture("", label)
    frame = _Frame(_room(steps.min(), steps.max(), 0.0), _room(every.min(), every.max(), 0.06))
    parts = [_axes(frame, _ticks(*frame.x, most=5, whole=True), _ticks(*frame.y, most=4))]
    if threshold is not None:
        level = frame.up(threshold)
        parts.append(f'<path class="limit" d="M{LEFT} {level:.1f}H{WIDTH - RIGHT}"/>')
    for line, finite in drawn:
        x, y = line.x[finite], line.y[finite]
        style = f"line c{line.color % COLORS}" + (" dashed" if line.color >= COLORS else "")
        if len(x) >= SMOOTH_FROM:
            parts.append(_path(frame, *_binned(x, y), f"{style} pale"))
            y = running_mean(y)
        if len(x) == 1:
            place = f'cx="{frame.across(x[0]):.1f}" cy="{frame.up(y[0]):.1f}"'
            parts.append(f'<circle class="dot c{line.color % COLORS}" {place} r="2.5"/>')
        else:
            parts.append(_path(frame, *_binned(x, y), style))
    return _picture("".join(parts), label)


def points(
    found: Sequence[Sequence[Point | None]],
    names: Sequence[str],
    label: str,
    zero: bool = False,
    unit: str = "",
) -> str:
    """Series of numbers with their intervals, above their names.

    Args:
      found: series, each in a colour of its own, with a number or none for each name.
      zero: whether the line at zero is drawn, and seen.
      unit: behind the numbers of the axis.
    """
    shown = [point for series in found for point in series if point is not None]
    ends = [end for point in shown for end in (point.low, point.high)]
    low, high = min([*ends, *([0.0] if zero else [])]), max([*ends, *([0.0] if zero else [])])
    frame = _Frame((-0.5, len(names) - 0.5), _room(low, high, 0.12))
    parts = [_axes(frame, [], _ticks(*frame.y, most=4), unit)]
    if zero:
        parts.append(f'<path class="zero" d="M{LEFT} {frame.up(0):.1f}H{WIDTH - RIGHT}"/>')
    for place, name in enumerate(names):
        x = frame.across(place)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" class="mid">{escape(name)}</text>')
    for number, series in enumerate(found):
        shift = 14 * (number - (len(found) - 1) / 2)
        for place, point in enumerate(series):
            if point is None:
                continue
            x = frame.across(place) + shift
            top, bottom, middle = map(frame.up, (point.high, point.low, point.value))
            parts.append(
                f'<path class="line c{number % COLORS}" d="M{x:.1f} {top:.1f}V{bottom:.1f}'
                f'M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {bottom:.1f}h8"/>'
                f'<circle class="dot c{number % COLORS}" cx="{x:.1f}" cy="{middle:.1f}" r="4"/>'
            )
    return _picture("".join(parts), label)


def running_mean(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Mean over a window of a twentieth of the curve on both sides, shorter at its ends."""
    half = max(len(values) // 20, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _binned(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """At most `BINS` points, each the mean of its neighbours."""
    if len(x) <= BINS:
        return x, y
    edges = np.linspace(0, len(x), BINS + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _path(frame: _Frame, x: np.ndarray, y: np.ndarray, style: str) -> str:
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    places = "L".join(f"{frame.across(a):.1f} {frame.up(b):.1f}" for a, b in pairs)
    return f'<path class="{style}" d="M{places}"/>'


def _axes(frame: _Frame, across: Sequence[float], up: Sequence[float], unit: str = "") -> str:
    parts = []
    for y in up:
        place = frame.up(y)
        parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
        text = escape(_number(y, up) + unit)
        parts.append(f'<text x="{LEFT - 6}" y="{place + 3.5:.1f}" class="end">{text}</text>')
    for x in across:
        text = _number(x, across)
        parts.append(f'<text x="{frame.across(x):.1f}" y="{HEIGHT - 7}" class="mid">{text}</text>')
    return "".join(parts)


def _picture(inside: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{inside}</svg>"
    )


def _room(low: float, high: float, share: float) -> tuple[float, float]:
    """An interval that holds another with room on both sides, and is never empty. It ends at zero
    where nothing is below.
    """
    low, high = float(low), float(high)
    room = (high - low) * share
    if high - low < FLAT * max(abs(low), abs(high)):
        room = max(abs(low), abs(high)) * (0.1 if low == high else FLAT)
    least = low - room if low < 0 else max(low - room, 0.0)
    return least, high + room if high + room > least else least + 1.0


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers inside an interval, about `most` of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.7)
    size = max(size, 1.0) if whole else size
    first = math.ceil(low / size - 1e-9)
    count = math.floor(high / size + 1e-9) - first + 1
    return [(first + i) * size for i in range(count)]


def _number(value: float, ticks: Sequence[float]) -> str:
    """A number of an axis, with the digits that tell it from its neighbour."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(value) or 1.0
    largest = max(abs(tick) for tick in ticks)
    if largest and (largest >= 1e5 or largest < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}"

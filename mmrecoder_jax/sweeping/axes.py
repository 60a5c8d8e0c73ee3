"""The axes of a sweep, as `--sweep=config.FIELD=VALUES` writes them, and the points on them.

    --sweep=config.reward.eta=0,0.1             these values
    --sweep=config.optim.lr=log:1e-5:1e-3:5     five values from 1e-5 to 1e-3, in even factors
    --sweep=config.reward.gamma=0:0.5:3         three values from 0 to 0.5, in even distances
    --sweep=config.optim.lr=log:1e-5:1e-3       anything between them; for --random alone

A comma inside brackets or quotes is part of a value: `(112,264),(112,208,264)` are two. Values are
read as the flag `--config.FIELD=` reads them, so what is wrong with one is said in the same words.
"""

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mmrecoder_jax.cli import with_fields
from mmrecoder_jax.config import ConfigError, has_field, suggest
from mmrecoder_jax.sweeping.points import Point, resolved, text_of

SEED = "seed"  # the field whose values are repetitions of one setting
# They name the configuration itself.
_NOT_SWEPT = ("stage", "size")
_DIGITS = 4  # significant digits of a number that is drawn or lies between the ends of a range
_LONGEST_GRID = 100_000
_RANGE = re.compile(r"(log:)?([^:]+):([^:]+)(?::([^:]+))?")


@dataclasses.dataclass(frozen=True)
class Span:
    """All numbers between two ends.

    Attributes:
      low, high: the ends, which belong to it.
      log: whether factors are even, not distances.
      whole: whether only whole numbers are meant.
    """

    low: float
    high: float
    log: bool
    whole: bool

    def at(self, share: float) -> float | int:
        """The number at a share (0 to 1) of the way from `low` to `high`."""
        if self.log:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        if self.whole:
            return round(value)
        if share in (0, 1):
            return self.high if share else self.low
        return float(f"{value:.{_DIGITS}g}")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One swept field.

    Attributes:
      field: its dotted name.
      values: in the order that they were written in; empty for a span without a count.
      span: what a random draw takes its numbers from where there are no values.
    """

    field: str
    values: tuple[Any, ...]
    span: Span | None = None


def read_axes(words: Sequence[str], config: ConfigDict) -> list[Axis]:
    """The axes of a sweep.

    Args:
      words: values of the flag `--sweep`.
      config: of every point, but for its own values.

    Raises:
      ConfigError: a field that does not exist, a value that it cannot be, or nothing to sweep; the
        message names the flag.
    """
    if not words:
        raise ConfigError("--sweep is missing: give one or more, such as --sweep=config.seed=0,1,2")
    axes = []
    for word in words:
        try:
            axes.append(_read_axis(word, config))
        except ConfigError as error:
            raise ConfigError(f"--sweep={word}: {error}") from error
    for first, second in itertools.combinations(axes, 2):
        if first.field == second.field:
            raise ConfigError(
                f"--sweep=config.{first.field} is given twice: write its values in one flag, with "
                "commas between them"
            )
    return axes


def _read_axis(word: str, config: ConfigDict) -> Axis:
    name, given, written = word.partition("=")
    field = name.strip().removeprefix("--").removeprefix("config.")
    if not given:
        raise ConfigError("write a field and its values, such as config.reward.eta=0,0.1")
    if field == name.strip():
        raise ConfigError(f"a field begins with config.: write config.{field}={written}")
    if not has_field(config, field):
        raise ConfigError(suggest(field, config))
    if field in _NOT_SWEPT:
        raise ConfigError(f"{field} belongs to the configuration: run a sweep for each")
    now = resolved(config, field)
    if isinstance(now, ConfigDict):
        raise ConfigError(f"config.{field} is a section: name one of its fields, {', '.join(now)}")
    is_number = isinstance(now, int | float) and not isinstance(now, bool)
    if is_number and (match := _RANGE.fullmatch(written.strip())):
        return _read_range(field, match, config)
    values = []
    for text in split_values(written):
        value = _parsed(field, text, config)
        if value in values:
            raise ConfigError(f"{text_of(value)} is there twice: take it out once")
        values.append(value)
    return Axis(field, tuple(values))


def _parsed(field: str, text: str, config: ConfigDict) -> Any:
    """A value as the field's flag reads it."""
    return resolved(with_fields(config, {field: text}), field)


def split_values(written: str) -> list[str]:
    """The values between the commas of a list; those inside brackets or quotes separate none.

    >>> split_values("(1,2),'a, b',c")
    ['(1,2)', 'a, b', 'c']

    Raises:
      ConfigError: an empty value, or a bracket or quote without its other end.
    """
    pieces, piece, depth, quote = [], "", 0, ""
    for character in written:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and not depth:
            pieces.append(piece)
            piece = ""
            continue
        piece += character
    if quote or depth:
        raise ConfigError("a bracket or a quote has no other end")
    found = []
    for text in (text.strip() for text in [*pieces, piece]):
        if not text:
            raise ConfigError("an empty value: take the comma out, or write '' for an empty text")
        inside = text[1:-1]
        quoted = (
            len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in inside
        )
        found.append(inside if quoted else text)
    return found


def _read_range(field: str, match: re.Match[str], config: ConfigDict) -> Axis:
    log, low, high, count = bool(match[1]), *match.group(2, 3, 4)
    ends = [_parsed(field, text, config) for text in (low, high)]
    if not all(map(math.isfinite, ends)) or ends[0] >= ends[1]:
        raise ConfigError(f"a range goes from the lower number to the higher one, not {low}:{high}")
    if log and ends[0] <= 0:
        raise ConfigError(f"log:{low}:{high} needs ends above 0: factors do not reach {low}")
    span = Span(ends[0], ends[1], log, isinstance(ends[0], int))
    if count is None:
        return Axis(field, (), span)
    if not re.fullmatch(r"\d+", count) or int(count) < 2:
        raise ConfigError(f"a range has two values or more, not {count!r}: write FROM:TO:COUNT")
    values = [span.at(i / (int(count) - 1)) for i in range(int(count))]
    if len(set(values)) < len(values):
        raise ConfigError(f"there are fewer than {count} values between {low} and {high}")
    return Axis(field, tuple(values), span)


def grid(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of values; the seed changes last, so that every setting has one run before
    any has two.

    Raises:
      ConfigError: a range without a count, or more points than anybody can mean.
    """
    for axis in axes:
        if not axis.values and axis.span:
            raise ConfigError(
                f"--sweep=config.{axis.field}: a grid needs a number of values, such as "
                f"{axis.span.low:g}:{axis.span.high:g}:5; without one give --random=N"
            )
    _check_size(math.prod(len(axis.values) for axis in axes))
    ordered = sorted(axes, key=lambda axis: axis.field != SEED)  # its sorting is stable
    combinations = itertools.product(*(axis.values for axis in ordered))
    fields = [axis.field for axis in ordered]
    return [_point(axes, dict(zip(fields, values, strict=True))) for values in combinations]


def draw(axes: Sequence[Axis], count: int, seed: int) -> list[Point]:
    """Random settings, each with every seed that is swept. The same arguments draw the same, and a
    larger count continues the draw of a smaller one.

    Args:
      count: settings.
      seed: of the draw.

    Raises:
      ConfigError: there are not so many.
    """
    if count < 1:
        raise ConfigError(f"--random={count}: use 1 or more")
    seeds = [axis for axis in axes if axis.field == SEED and axis.values]
    drawn = [axis for axis in axes if axis not in seeds]
    if not drawn:
        raise ConfigError(
            "--random draws other fields than seeds: sweep one, or leave --random out"
        )
    _check_size(count * math.prod(len(axis.values) for axis in seeds))
    total = math.prod(len(axis.values) if axis.values else math.inf for axis in drawn)
    if count > total:
        raise ConfigError(f"--random={count}: there are {total} settings; leave it out for all")
    generator = random.Random(seed)
    settings: dict[tuple[Any, ...], None] = {}
    tries = 100 * count + 1000
    while len(settings) < count and tries:
        settings[tuple(_draw_one(axis, generator) for axis in drawn)] = None
        tries -= 1
    if len(settings) < count:
        raise ConfigError(
            f"--random={count}: there are hardly more than {len(settings)} settings; lower it"
        )
    return [
        _point(axes, dict(zip([axis.field for axis in (*seeds, *drawn)], values, strict=True)))
        for values in (
            (*again, *setting)
            for again in itertools.product(*(axis.values for axis in seeds))
            for setting in settings
        )
    ]


def _draw_one(axis: Axis, generator: random.Random) -> Any:
    share = generator.random()
    if axis.span is None or axis.values:
        return axis.values[int(share * len(axis.values))]
    if not axis.span.whole or axis.span.log:
        return axis.span.at(share)
    return int(axis.span.low) + int(share * (axis.span.high - axis.span.low + 1))


def _check_size(count: int) -> None:
    if count > _LONGEST_GRID:
        raise ConfigError(
            f"this sweep has {count} points, more than {_LONGEST_GRID}: give fewer values, or "
            "--random=N"
        )


def _point(axes: Sequence[Axis], values: Mapping[str, Any]) -> Point:
    """A point with its values in the order of the axes."""
    return Point.of({axis.field: values[axis.field] for axis in axes})

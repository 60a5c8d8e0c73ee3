"""A point of a sweep: the values of its fields, and the name that they give it.

    Point.of({"reward.eta": 0.1, "seed": 2}).name     eta-0.1_seed-2

The name is that of the point's directory, so it depends on the values alone: another sweep of the
same fields with more values finds the runs of the first one.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError

_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]")
_LONGEST_VALUE, _LONGEST_NAME = 40, 120  # characters; file systems allow 255
_DIGEST = 8  # characters


@dataclasses.dataclass(frozen=True)
class Point:
    """One training run of a sweep.

    Attributes:
      name: of its directory; safe in file systems and shells.
      values: by dotted name of the field, in the order of the axes.
    """

    name: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The point with these values."""
        names = short_names(list(values))
        name = "_".join(f"{names[field]}-{_safe(value)}" for field, value in values.items())
        if len(name) > _LONGEST_NAME:
            name = f"{name[: _LONGEST_NAME - _DIGEST - 1]}-{_digest(repr(dict(values)))}"
        return cls(name, values)

    def texts(self) -> dict[str, str]:
        """The values as the flags `--config.FIELD=` are given them."""
        return {field: text_of(value) for field, value in self.values.items()}

    def flags(self) -> list[str]:
        """The flags of the training command."""
        return [f"--config.{field}={text}" for field, text in self.texts().items()]


def text_of(value: Any) -> str:
    """A value as a flag is given it; numbers in their shortest form.

    >>> [text_of(value) for value in (0.0, 1e-5, 0.25, 3, True, (112, 264), "render")]
    ['0', '1e-05', '0.25', '3', 'True', '(112, 264)', 'render']
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return value if isinstance(value, str) else repr(value)


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted names that tell them apart.

    >>> short_names(["optim.lr", "stages.stage1.rl.group", "stages.stage2.rl.group"])
    {'optim.lr': 'lr', 'stages.stage1.rl.group': 'stage1.rl.group', \
'stages.stage2.rl.group': 'stage2.rl.group'}
    """
    parts = {field: field.split(".") for field in fields}
    names = {}
    for field, words in parts.items():
        others = [other for other in fields if other != field]
        names[field] = next(
            end
            for end in (".".join(words[-count:]) for count in range(1, len(words) + 1))
            if not any(other == end or other.endswith(f".{end}") for other in others)
            or end == field
        )
    return names


def _safe(value: Any) -> str:
    """A value as a part of a file's name, with a digest of the whole where it loses something."""
    text = text_of(value)
    safe = _UNSAFE.sub("-", text)[:_LONGEST_VALUE]
    # File systems that take a for A would let two texts share a directory.
    lossy = safe != text or (isinstance(value, str) and text != text.lower())
    return f"{safe}-{_digest(text)}" if lossy or not text else safe


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]


def shard(points: Sequence[Point], text: str) -> list[Point]:
    """The points of one machine.

    Args:
      text: "i/n" for machine i of n, the first is 0; "" for all points.

    Raises:
      ConfigError: it is no such text.
    """
    if not text:
        return list(points)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        most = f"0/{match[2]} to {int(match[2]) - 1}/{match[2]}" if match and int(match[2]) else ""
        raise ConfigError(f"--shard={text}: use {most or 'i/n, such as 0/4 to 3/4 for 4 machines'}")
    return list(points[int(match[1]) :: int(match[2])])


def check_fixed(axes: Sequence[str], fixed: Mapping[str, Any]) -> None:
    """Raises ConfigError where a swept field has a fixed value too."""
    for field in axes:
        if field in fixed:
            raise ConfigError(
                f"config.{field} is swept and given as --config.{field}={fixed[field]}: leave one "
                "of the two out"
            )


def resolved(config: ConfigDict, field: str) -> Any:
    """The value of a field by its dotted name."""
    value: Any = config
    for part in field.split("."):
        value = value[part]
    return value

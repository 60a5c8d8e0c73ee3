"""Which device gets which rows of which micro-batch, so that all have about as much to do.

A micro-batch is as slow as its fullest part, and every part has as many token slots as the fullest
of all. Rows that have tokens in common stay together (`Unit`), or those would be computed twice.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

Parts = list[list["Unit"]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Rows that stay in one part.

    Attributes:
      numbers: of the rows.
      tokens: distinct ones.
      images: distinct ones.
    """

    numbers: tuple[int, ...]
    tokens: int
    images: int = 0


@dataclasses.dataclass(frozen=True)
class Room:
    """What a part has places for, at most."""

    rows: int
    images: int


def deal(units: Sequence[Unit], parts: int, room: Room) -> Parts | None:
    """Units over parts, so that none has many more tokens than another.

    The largest come first, each into the part that has the fewest tokens. Then the fullest part
    changes a unit with another one's, as long as that helps. None where they do not fit.

        two rows a part, units of 9, 8, 3, 2 tokens    parts [9 2] [8 3]
    """
    order = sorted(units, key=lambda u: (-len(u.numbers), -u.tokens, u.numbers))
    sizes = np.array([(len(u.numbers), u.images, u.tokens) for u in order]).reshape(-1, 3)
    most = np.array([room.rows, room.images, sizes[:, 2].sum()])
    held = np.zeros((parts, 3), int)
    where = np.zeros(len(order), int)
    for i, size in enumerate(sizes):
        fits = np.flatnonzero((held + size <= most).all(axis=1))
        if not len(fits):
            return None
        where[i] = fits[held[fits, 2].argmin()]
        held[where[i]] += size
    _even(sizes, where, held, most)
    dealt: Parts = [[] for _ in range(parts)]
    for unit, part in zip(order, where, strict=True):
        dealt[part].append(unit)
    return dealt


def _even(
    sizes: Int[np.ndarray, "N 3"],
    where: Int[np.ndarray, " N"],
    held: Int[np.ndarray, "parts 3"],
    most: Int[np.ndarray, " 3"],
) -> None:
    """Lets the fullest part change units with others, in place, until that does not help."""
    while True:
        fullest = int(held[:, 2].argmax())
        best = int(held[fullest, 2]), -1, -1
        for i in map(int, np.flatnonzero(where == fullest)):
            less = sizes[i] - sizes  # of the fullest, if it has the other unit instead
            allowed: Bool[np.ndarray, " N"] = (less[:, 2] > 0) & (where != fullest)
            allowed &= (held[fullest] - less <= most).all(axis=1)
            allowed &= (held[where] + less <= most).all(axis=1)
            others = np.flatnonzero(allowed)
            if len(others):
                after = np.maximum(held[fullest] - less[others], held[where[others]] + less[others])
                least = int(after[:, 2].argmin())
                best = min(best, (int(after[least, 2]), i, int(others[least])))
        tokens, i, j = best
        if tokens >= held[fullest, 2]:
            return
        held[fullest] -= sizes[i] - sizes[j]
        held[where[j]] += sizes[i] - sizes[j]
        where[i], where[j] = where[j], where[i]


def fewest_micro_batches(units: Sequence[Unit], ways: int, room: Room) -> int:
    """How many micro-batches of `ways` parts hold the units, each of which a part has room for."""
    rows = sum(len(unit.numbers) for unit in units)
    counts = itertools.count(max(1, -(-rows // (room.rows * ways))))
    return next(count for count in counts if deal(units, count * ways, room) is not None)

"""What of a data set can be learnt from: bad rows, and rows that no bucket holds.

Lengths are measured before training, without pixels: the head of an image says how many visual
tokens it becomes. So what is left out is known before the first step, and shares and epochs speak
of the rows that are left. A picture whose body is cut is found when its turn comes.

    rows in the file       0 1 2 3 4 5
    too long, or bad           2     5
    kept                   0 1   3 4          what is shuffled, mixed and counted
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mmrecoder_jax.data.sources import RandomAccess

Item = TypeVar("Item")
Made = TypeVar("Made")
_BAD = -1  # in place of a length
_PROBES = 16  # rows that are measured again to see whether a file of lengths still fits


class TooManyBadRows(ValueError):
    """More rows are bad than `data.max_bad_rows` allows; the message names the last one."""


@dataclasses.dataclass(eq=False)
class BadRows:
    """Counts the bad rows of one data set, says each once, and raises after the last allowed one.

    Attributes:
      allowed: bad rows that a run may meet.
      say: told of each.
    """

    allowed: int
    say: Callable[[str], None] = print
    _seen: set[int | str] = dataclasses.field(default_factory=set)
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    @classmethod
    def of(cls, limit: float, rows: int) -> "BadRows":
        """For `data.max_bad_rows`: a number of rows, or below 1 a share of them."""
        return cls(int(limit * rows) if 0 < limit < 1 else int(limit))

    @property
    def count(self) -> int:
        return len(self._seen)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, bad rows are counted and not said: another process says them."""
        say, self.say = self.say, lambda message: None
        try:
            yield
        finally:
            self.say = say

    def add(self, index: int | str, message: str) -> None:
        """Counts a row, by its number or id, that was met; raises TooManyBadRows."""
        with self._lock:  # pipelines read ahead in threads
            if index in self._seen:  # epochs meet it again
                return
            self._seen.add(index)
        if self.count > self.allowed:
            raise TooManyBadRows(
                f"{message} (bad row {self.count}, data.max_bad_rows allows {self.allowed})"
            )
        self.say(f"bad row {self.count} of {self.allowed} allowed is skipped: {message}")


class Readable(Generic[Item, Made]):
    """A source whose items are made into something; None stands for a bad row, which is counted.

    grain leaves out what is None.

    Args:
      make: may raise ValueError.
      kept: numbers of the rows that there are; all by default.
    """

    def __init__(
        self,
        source: RandomAccess[Item],
        make: Callable[[Item], Made],
        bad: BadRows,
        kept: np.ndarray | None = None,
    ):
        self._source, self._make, self._bad, self._kept = source, make, bad, kept

    def __len__(self) -> int:
        return len(self._source) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int, /) -> Made | None:
        if self._kept is not None:
            index = int(self._kept[index])
        try:
            return self._make(self._source[index])
        except ValueError as error:
            self._bad.add(index, _named(self._source, index, error))
            return None


def _named(source: Any, index: int, error: ValueError) -> str:
    """What is said of a bad row, with its file and line."""
    where = source.where(index) if hasattr(source, "where") else f"row {index}"
    return str(error) if str(error).startswith(where) else f"{where}: {error}"


class Part(Generic[Item]):
    """The rows of a source that a survey keeps, as a source of their own."""

    def __init__(self, source: RandomAccess[Item], kept: np.ndarray):
        self._source, self._kept = source, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int, /) -> Item:
        return self._source[int(self._kept[index])]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a data set holds.

    Attributes:
      rows: in the file.
      kept: numbers of the rows that can be learnt from.
      too_long: rows that are longer than the largest bucket.
      too_wide: others with an image of more windows than the largest bucket.
      bad: rows that cannot be read.
      longest: tokens of the longest row.
      widest: windows of the widest image among the kept rows.
      lengths_for_half: the shortest largest bucket that would keep half of the rows.
    """

    rows: int
    kept: np.ndarray
    too_long: int
    too_wide: int
    bad: int
    longest: int
    widest: int
    lengths_for_half: int

    def counts(self) -> dict[str, int]:
        """The numbers alone, for a log."""
        names = ("rows", "too_long", "too_wide", "bad", "longest")
        return {"kept": len(self.kept)} | {name: int(getattr(self, name)) for name in names}


def survey(
    source: RandomAccess[Item],
    measure: Callable[[Item], tuple[int, int]],
    longest: int,
    widest: int,
    bad: BadRows,
    cache: Path | None = None,
    write: bool = True,
    each: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Survey:
    """Measures every row.

    Args:
      measure: gives (tokens of the row, windows of its widest image); may raise ValueError.
      longest, widest: the largest buckets.
      cache: a file of the lengths, used where it still fits and written where it does not.
      write: whether this process may write it.
      each: goes through row numbers, with a progress bar for instance.

    Raises:
      TooManyBadRows: more rows are bad than `bad` allows.
    """
    readable = Readable(source, measure, bad)

    def sizes(index: int) -> tuple[int, int]:
        return readable[index] or (_BAD, _BAD)

    found = _cached(cache, len(source), sizes)
    if found is None:
        found = np.array([sizes(i) for i in each(range(len(source)))], np.int64).reshape(-1, 2)
        if cache is not None and write:
            _write(cache, found)
    lengths, windows = found.T
    is_bad, is_long = lengths == _BAD, lengths > longest
    is_wide = ~is_long & (windows > widest)
    good = np.sort(lengths[~is_bad])
    kept = np.flatnonzero(~is_bad & ~is_long & ~is_wide)
    return Survey(
        rows=len(found),
        kept=kept,
        too_long=int(is_long.sum()),
        too_wide=int(is_wide.sum()),
        bad=int(is_bad.sum()),
        longest=int(good[-1]) if len(good) else 0,
        widest=int(windows[kept].max(initial=0)),
        lengths_for_half=int(good[len(good) // 2]) if len(good) else 0,
    )


def _cached(
    cache: Path | None, rows: int, sizes: Callable[[int], tuple[int, int]]
) -> np.ndarray | None:
    """The sizes that a file holds, where a few rows and all bad ones still measure the same."""
    if cache is None or not cache.is_file():
        return None
    try:
        found = np.load(cache, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if found.shape != (rows, 2) or found.dtype != np.int64:
        return None
    probes = {*np.linspace(0, rows - 1, min(rows, _PROBES), dtype=int).tolist()}
    probes |= {*np.flatnonzero(found[:, 0] == _BAD).tolist()}  # they are to be counted and named
    same = all(sizes(i) == tuple(found[i].tolist()) for i in sorted(probes))
    return found if same else None


def _write(cache: Path, found: np.ndarray) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")  # hosts may share the folder
    try:
        with open(temporary, "wb") as file:
            np.save(file, found)
        temporary.replace(cache)
    finally:
        temporary.unlink(missing_ok=True)

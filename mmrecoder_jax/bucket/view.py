"""A folder that stands for the address of a work directory that people look at.

    fetched            configuration, tokenizer, rows, evaluations, rollouts
    when asked for     pictures, charts (`bring`)
    never              checkpoints, which are read from the bucket

The run may be going on elsewhere, so what it is writing or has just removed is no error, and
nothing is written to the bucket but what is said by name (`put`).
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrecoder_jax.bucket.client import BucketError, Changed, ask, below, talking
from mmrecoder_jax.bucket.copy import (
    Copy,
    batches,
    is_mark,
    marked_directories,
    settled,
    stays_away,
)

_LEFT_OUT = re.compile(r"(.*/)?(data|dialogues)/.*|.*\.png")


class View(Copy):
    """A folder that is looked at.

    Args:
      address: without a slash at its end.
      command: that looks; each has a folder of its own.
      new: whether there may be nothing in the bucket yet.
      alone: whether the lock is kept until the process ends.
    """

    def __init__(self, address: str, command: str, new: bool = False, alone: bool = False):
        super().__init__(address, None, command)
        self._new, self._alone, self._held = new, alone, False
        self._found: set[str] = set()  # all that the bucket has
        self._here: set[str] = set()  # what of it has a file here
        self._left_out: dict[str, dict[str, Any]] = {}
        self._state: dict[str, tuple[int, str]] | None = None  # what the bucket held

    def fill(self) -> None:
        """Makes the folder hold what the bucket holds.

        Raises:
          BucketError: it cannot be read, or there is nothing.
        """
        with self._locking():
            settled(self._fill)

    @contextlib.contextmanager
    def _locking(self) -> Iterator[None]:
        if not self._held:
            self.lock()
            self._held = self._alone
        try:
            yield
        finally:
            if not self._alone:
                self.unlock()

    def _fill(self) -> None:
        found = below(self.address)
        if not found and not self._new:
            raise BucketError(f"{self.address}: there is nothing in the bucket; check the path")
        self._found = set(found)
        marked = marked_directories(found)
        found = {
            name: entry
            for name, entry in found.items()
            if not name.startswith(marked) and not is_mark(name) and not stays_away(name)
        }
        state = {name: (entry["size"], entry["updated"]) for name, entry in found.items()}
        if state == self._state:
            return
        self._left_out = {name: e for name, e in found.items() if _LEFT_OUT.fullmatch(name)}
        wanted = {name: e for name, e in found.items() if name not in self._left_out}
        self._take(wanted, kept=self._left_out)
        self._here = set(wanted)
        self._state = state

    def names(self, path: str | os.PathLike[str]) -> set[str]:
        """Names in a directory of the bucket."""
        inside = self._name(path)
        inside = "" if inside == "." else f"{inside}/"
        below_it = (name.removeprefix(inside) for name in self._found if name.startswith(inside))
        return {name.partition("/")[0] for name in below_it}

    def is_directory(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path is a directory of files that were left out."""
        inside = f"{self._name(path)}/"
        return any(name.startswith(inside) for name in self._left_out)

    def bring(self, path: str | os.PathLike[str]) -> None:
        """Fetches a file that was left out, where the bucket has it."""
        name = self._name(path)
        entry = self._left_out.get(name)
        if entry is not None and not self._is_same(name, entry):
            with contextlib.suppress(Changed):
                self._fetch({name: entry})

    def put(self, path: str | os.PathLike[str]) -> None:
        """Makes the bucket hold a file, what is below a directory, or nothing where it is gone."""
        files = [Path(path)]
        with talking(self.address):
            if not Path(path).exists():
                self._remove([self._name(path)])
                return
            if Path(path).is_dir():
                files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
            names = [self._name(file) for file in files]
            for some in batches(names):
                contents = {self._plain(name): (self.folder / name).read_bytes() for name in some}
                ask("_pipe", contents)
            gone = {name for name in self._here if name.startswith(f"{self._name(path)}/")}
            self._remove(sorted(gone - set(names)))
            self._here = self._here - gone | set(names)

    def _name(self, path: str | os.PathLike[str]) -> str:
        return Path(os.path.abspath(path)).relative_to(self.folder).as_posix()

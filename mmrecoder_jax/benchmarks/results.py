"""The output of a scoring command: rows that a kill does not lose and no later start overwrites.

    scores.jsonl             a row per scored input row, in the order of the input, written at once
    scores.jsonl.meta.json   what they were made of: the input's SHA-256, the rules, the libraries
    scores.jsonl.bak         what was at that place before and was made of something else

A start that finds rows made of the same goes on after them. Nothing is written or moved before the
first row is there.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mmrecoder_jax.config import ConfigError, check_local_path, check_output
from mmrecoder_jax.data.rows import JsonLines

Row = dict[str, Any]


def row_key(row: Mapping[str, Any]) -> str:
    """What tells rows apart: their id as JSON, in which 7 is not "7"."""
    return json.dumps(row["id"])


def input_file(flag: str, path: str) -> Path:
    """The file that a flag names to be read; raises ConfigError where there is none."""
    check_local_path(flag, path)
    if not Path(path).is_file():
        what = "a directory" if Path(path).is_dir() else "no such file"
        raise ConfigError(f"{flag}={path}: {what}; name a file of JSON lines")
    return Path(path)


def output_file(flag: str, path: str) -> Path:
    """The file that a flag names to be written; raises ConfigError for what cannot be one."""
    check_output(flag, path)
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(f"{flag}={path}: no file; name one that can be written")
    return Path(path)


class Results:
    """Rows in a JSON-lines file; a context manager.

    Args:
      path: the file; its folder is made where it is missing.
      source: the input, which must be another file.
      rules: what else decides the rows.

    Attributes:
      rows: those that an earlier start has written, and those added since.
      done: the keys of `rows` (`row_key`).

    Raises:
      ConfigError: the output is the input.
    """

    def __init__(self, path: Path, source: Path, rules: Mapping[str, Any]):
        if path.exists() and path.samefile(source):
            raise ConfigError(f"--out={path} is the input itself: name another file")
        self._path = path
        self._meta = path.with_name(path.name + ".meta.json")
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        self._made_of = json.loads(json.dumps({"input": digest} | dict(rules)))
        self._file: Any = None
        self._kept = self._written_before()
        self.rows: list[Row] = list(self._kept or [])
        self.done = {row_key(row) for row in self.rows}

    def _written_before(self) -> list[Row] | None:
        """The whole rows in the file; None where it was made of something else."""
        try:
            if json.loads(self._meta.read_bytes()) != self._made_of:
                return None
            lines = JsonLines(self._path, ("id",), unique=False)
            rows = [lines[index] for index in range(len(lines) - self._has_torn_line())]
        except (OSError, ValueError):
            return None
        return rows

    def _has_torn_line(self) -> bool:
        """Whether a kill came in the middle of the last line."""
        with open(self._path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
            return bool(size) and file.read(1) != b"\n"

    def add(self, row: Row) -> None:
        """Writes one row, so that a kill right after it does not lose it."""
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.rows.append(row)
        self.done.add(row_key(row))

    def _open(self) -> Any:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._kept is None:
            if self._path.exists():
                self._path.replace(self._path.with_name(self._path.name + ".bak"))
            temporary = self._meta.with_name(self._meta.name + ".tmp")
            temporary.write_text(json.dumps(self._made_of, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self._meta)
        else:  # without the line that a kill has torn
            os.truncate(self._path, _end_of_lines(self._path))
        return open(self._path, "a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()


def _end_of_lines(path: Path) -> int:
    """The bytes of a file up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1

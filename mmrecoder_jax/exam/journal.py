"""The answers of one run, on disk: what a kill does not lose and no other run overwrites.

    run.json            what the rows are made of: benchmark, charts, author, turns, seed, rules
    predictions.jsonl   a row per chart and sample, written when it is scored; sorted at the end

A start that finds a `run.json` like its own goes on after its rows. One that finds another is
refused, and says what differs.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.rows import JsonLines, RowError, json_object

RUN, PREDICTIONS = "run.json", "predictions.jsonl"
Row = dict[str, Any]
Key = tuple[str, int]  # id of the chart, sample


def key_of(row: Mapping[str, Any]) -> Key:
    """What tells rows apart."""
    return str(row["id"]), int(row["sample"])


class Journal:
    """Rows below a directory; a context manager. `add` may be called by several threads.

    Args:
      directory: made where it is missing.
      made_of: what decides the rows, as JSON.

    Attributes:
      rows: by key.

    Raises:
      ConfigError: the directory holds rows of something else.
    """

    def __init__(self, directory: Path, made_of: Mapping[str, Any]):
        self.directory = directory
        self._made_of = json.loads(json.dumps(made_of))
        self._path = directory / PREDICTIONS
        self._lock = threading.Lock()
        self._check()
        self.rows: dict[Key, Row] = {key_of(row): row for row in self._written()}
        write_atomically(directory / RUN, json.dumps(self._made_of, indent=1) + "\n")
        self._file = open(self._path, "ab")  # noqa: SIM115  closed by `finish` or `__exit__`

    def _check(self) -> None:
        run = self.directory / RUN
        if not run.is_file():
            if self._path.exists():
                raise ConfigError(
                    f"--out={self.directory}: its {PREDICTIONS} has no {RUN} beside it, so nobody "
                    "knows what it is of; name another directory"
                )
            return
        before = json_object(run)
        wrong = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in self._made_of.items()
            if before.get(name) != value
        ]
        if wrong:
            raise ConfigError(
                f"--out={self.directory} holds the predictions of another run "
                f"({'; '.join(wrong)}): name another directory, or give the flags of that run to "
                "go on with it"
            )

    def _written(self) -> list[Row]:
        """The whole rows that are there; a torn last line is none."""
        if not self._path.exists():
            return []
        try:
            os.truncate(self._path, _end_of_lines(self._path))
            lines = JsonLines(self._path, ("id", "sample", "turns"), unique=False)
            return [lines[number] for number in range(len(lines))]
        except RowError as error:
            raise ConfigError(f"{error}: move {self._path} away to answer anew") from error

    def add(self, row: Row) -> None:
        """Writes one row, so that a kill right after it does not lose it."""
        line = json.dumps(row).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            self.rows[key_of(row)] = row

    def finish(self, order: Mapping[str, int]) -> list[Row]:
        """The rows of these charts, sorted, in memory and in the file.

        Args:
          order: number of each chart by its id.
        """
        self._file.close()
        rows = sorted(
            (row for row in self.rows.values() if row["id"] in order),
            key=lambda row: (order[row["id"]], row["sample"]),
        )
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _end_of_lines(path: Path) -> int:
    """The bytes of a file up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def write_atomically(path: Path, text: str) -> None:
    """The file appears whole or not at all; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

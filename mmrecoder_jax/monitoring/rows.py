"""Rows of a run in one file: a JSON object per line, each with its stage and step.

A run may be killed at any instant. Every row is one flushed write, so a kill leaves at most one
cut-off last line, which is left out by whoever reads and removed by whoever writes on. A resumed
stage calls `rewind`, and the rows past its last checkpoint go away, so that the file holds each
step once.
"""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class RowFile:
    """A file that rows are appended to; what a kill left of its last line is removed at once."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        _replace(self.path, read_rows(self.path))
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def append(self, row: Row) -> None:
        """Writes one row, whole or cut off at its end."""
        self._file.write(_encode(row))
        self._file.flush()

    def rewind(self, stage: str, step: int) -> None:
        """Drops the rows of `stage` past `step`, which a resumed run continues from."""
        rows = read_rows(self.path)
        kept = [row for row in rows if row["stage"] != stage or row["step"] <= step]
        if len(kept) < len(rows):
            self._file.close()
            _replace(self.path, kept)
            self._file = open(self.path, "ab")  # noqa: SIM115 - closed by close()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a file in its order, without a cut-off last line; none where there is no file.

    Raises:
      ValueError: a line that is not the last one is broken.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "stage" not in row or "step" not in row:
                raise ValueError("not a row with stage and step")
        except ValueError as error:
            if number == len(lines):
                break  # the writer was killed inside this line, or is writing it now
            raise ValueError(
                f"{path}, line {number} is broken ({error}): {line[:80]!r}; remove this line and "
                "try again"
            ) from error
        rows.append(row)
    return rows


def _replace(path: Path, rows: list[Row]) -> None:
    """Makes the file hold exactly these rows, or leaves the old one."""
    data = b"".join(_encode(row) for row in rows)
    if path.exists() and path.read_bytes() == data:
        return
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(data)
    os.replace(beside, path)


def _encode(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"

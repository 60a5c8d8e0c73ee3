"""Charts and correction dialogues on disk, read by random access.

A chart directory:

    meta.json      {"name", "licence", "count", "dpi", "rc_params", "matplotlib", ...}
    charts.jsonl   one row per chart, sorted by id:
                   {"id", "image": "images/<id>.png", "code", "record": {...},
                    "licence", "source", "instruction"}
    images/        one PNG per chart

A dialogue directory is a chart directory with `dialogues.jsonl` beside the charts, and the renders
that were fed back in `feedback/`:

    {"id", "chart": <row number in charts.jsonl>, "responses": [...], "feedback_text": [...],
     "feedback_image": ["feedback/<id>-1.png" | null], "gain", "origin"}

`data.writers` makes both.
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from mmrecoder_jax.env import Record
from mmrecoder_jax.images import to_rgb

T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class RandomAccess(Protocol[T_co]):
    """Items by number: what shuffling needs of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


@dataclasses.dataclass(frozen=True)
class Chart:
    """A target to redraw.

    Attributes:
      image: PNG file.
      code: a script that draws it.
      record: what the code draws.
      instruction: what the user asks.
      source: where it comes from, in words.
    """

    id: str
    image: bytes
    code: str
    record: Record
    instruction: str
    source: str
    licence: str


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation about one chart: T responses and the T-1 feedbacks between them.

    Attributes:
      feedback_image: PNG files; None where a script drew nothing.
      gain: the low-level score of the last response minus that of the first.
      origin: where the first response comes from.
    """

    id: str
    chart: Chart
    responses: tuple[str, ...]
    feedback_text: tuple[str, ...]
    feedback_image: tuple[bytes | None, ...]
    gain: float
    origin: str


def png_bytes(image: np.ndarray | Image.Image) -> bytes:
    """PNG of uint8 pixels `[height, width, 3]` or of any Pillow image (`images.to_rgb`)."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    to_rgb(picture).save(buffer, "PNG")
    return buffer.getvalue()


class JsonLines:
    """Random access to the rows of a JSON-lines file.

    Only the offsets of the lines are held in memory, so 160 000 charts cost a megabyte. The object
    can be pickled, as grain's worker processes ask.

    Args:
      required: fields that every row must have.

    Raises:
      FileNotFoundError: no such file.
      ValueError: when a row is read that is not an object with the required fields; names file and
        line.
    """

    def __init__(self, path: str | os.PathLike[str], required: Iterable[str]):
        self.path = Path(path)
        self.required = tuple(required)
        with open(self.path, "rb") as file:
            lengths = [len(line) for line in file]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, there is no row {index}")
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        # Opened anew: an open file cannot be pickled, and threads would share its position.
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        where = self.where(index)
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object but {type(row).__name__}")
        missing = [name for name in self.required if name not in row]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}; it has {', '.join(row)}")
        return row

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path} line {index + 1}"


class ChartDirectory:
    """Random access to the charts of a directory; images are read when asked for.

    Args:
      directory: as described at the top of this module.
      instruction: what the user asks; None for each chart's own.

    Raises:
      FileNotFoundError: not a chart directory.
      ValueError: when a row is read that is not a chart; names file and line.
    """

    def __init__(self, directory: str | os.PathLike[str], instruction: str | None = None):
        self.directory = Path(directory)
        self.instruction = instruction
        meta = self.directory / "meta.json"
        if not meta.is_file():
            raise FileNotFoundError(
                f"{self.directory} is not a chart directory: there is no {meta.name} in it"
            )
        self.meta: dict[str, Any] = json.loads(meta.read_text())
        self._rows = JsonLines(
            self.directory / "charts.jsonl",
            ("id", "image", "code", "record", "licence", "source", "instruction"),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Chart]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int, /) -> Chart:
        row = self._rows[index]
        where = self._rows.where(index)
        try:
            record = Record.from_json(row["record"])
        except ValueError as error:
            raise ValueError(f"{where} has a bad record: {error}") from error
        return Chart(
            id=row["id"],
            image=_read_image(self.directory, row["image"], where),
            code=row["code"],
            record=record,
            instruction=self.instruction if self.instruction is not None else row["instruction"],
            source=row["source"],
            licence=row["licence"],
        )


class DialogueDirectory:
    """Random access to the dialogues of a directory, with the same arguments and errors as
    `ChartDirectory`.
    """

    def __init__(self, directory: str | os.PathLike[str], instruction: str | None = None):
        self.directory = Path(directory)
        self.charts = ChartDirectory(directory, instruction)
        self._rows = JsonLines(
            self.directory / "dialogues.jsonl",
            ("id", "chart", "responses", "feedback_text", "feedback_image", "gain", "origin"),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Dialogue]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int, /) -> Dialogue:
        row = self._rows[index]
        where = self._rows.where(index)
        turns = len(row["responses"])
        if not len(row["feedback_text"]) == len(row["feedback_image"]) == turns - 1:
            raise ValueError(
                f"{where} has {turns} responses, so it needs {turns - 1} feedback texts and images "
                "(null for none)"
            )
        images = (
            _read_image(self.directory, name, where) if name else None
            for name in row["feedback_image"]
        )
        return Dialogue(
            id=row["id"],
            chart=self.charts[row["chart"]],
            responses=tuple(row["responses"]),
            feedback_text=tuple(row["feedback_text"]),
            feedback_image=tuple(images),
            gain=row["gain"],
            origin=row["origin"],
        )


def _read_image(directory: Path, name: str, where: str) -> bytes:
    """A picture of a directory that may come from anywhere: no name leads out of it."""
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ValueError(f"{where} names an image outside the directory: {name}")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{where} names an image that is not there: {name}") from None

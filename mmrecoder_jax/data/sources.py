"""Charts and correction dialogues on disk, read by random access.

A chart directory:

    meta.json      {"name", "licence", "count", "dpi", "rc_params", "matplotlib", ...}
    charts.jsonl   one row per chart, sorted by id:
                   {"id", "image": "images/<id>.png", "code", "record": {...},
                    "licence", "source", "instruction"}
    images/        one PNG per chart
    more_images/   <id>-2.png, ... of charts whose question shows further ones, which their rows
                   list under "more_images"

A dialogue directory is a chart directory with `dialogues.jsonl` beside the charts, and the pictures
that were fed back in `feedback/`:

    {"id", "chart": <row number in charts.jsonl>, "responses": [...], "feedback_text": [...],
     "feedback_image": ["feedback/<id>-1.png" | null], "gain", "origin"}

A feedback of several pictures has a list of their names.

`data.writers` makes both.
"""

import contextlib
import dataclasses
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from mmrecoder_jax.data.rows import Fields, JsonLines, json_object
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
      code: a script that draws it; "" where nobody has one.
      record: what the code draws; None where there is no code.
      instruction: what the user asks.
      source: where it comes from, in words.
      more_images: PNG files that the question shows behind `image`: of a task with two charts.
    """

    id: str
    image: bytes
    code: str
    record: Record | None
    instruction: str
    source: str
    licence: str
    more_images: tuple[bytes, ...] = ()

    @property
    def images(self) -> tuple[bytes, ...]:
        """Everything that the question shows, in order."""
        return (self.image, *self.more_images)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation about one chart: T responses and the T-1 feedbacks between them.

    Attributes:
      feedback_images: PNG files of each feedback; none where a script drew nothing.
      gain: the low-level score of the last response minus that of the first.
      origin: where the first response comes from.
    """

    id: str
    chart: Chart
    responses: tuple[str, ...]
    feedback_text: tuple[str, ...]
    feedback_images: tuple[tuple[bytes, ...], ...]
    gain: float
    origin: str


@dataclasses.dataclass(frozen=True)
class Questions:
    """How many pictures the questions of charts show.

    Attributes:
      most: of one question.
      mean: of all of them.
    """

    most: int = 1
    mean: float = 1.0

    def places(self, count: int) -> int:
        """Places for the pictures of so many questions: for as many as they have on average, and
        for those of any one.

        >>> [Questions(2, 1.05).places(count) for count in (1, 8, 40)]
        [2, 9, 42]
        """
        return max(self.most, math.ceil(round(count * self.mean, 6)))

    def __or__(self, other: "Questions") -> "Questions":
        """Of questions that are drawn from both."""
        return Questions(max(self.most, other.most), max(self.mean, other.mean))


def png_bytes(image: np.ndarray | Image.Image) -> bytes:
    """PNG of uint8 pixels `[height, width, 3]` or of any Pillow image (`images.to_rgb`)."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    to_rgb(picture).save(buffer, "PNG")
    return buffer.getvalue()


class ChartDirectory:
    """Random access to the charts of a directory; images are read when asked for.

    Args:
      directory: as described at the top of this module.
      instruction: what the user asks; None for each chart's own.

    Raises:
      FileNotFoundError: not a chart directory.
      ValueError: a meta.json that does not fit, at once; a row that is not a chart, when it is
        read. Both name the file, and the line.
    """

    def __init__(self, directory: str | os.PathLike[str], instruction: str | None = None):
        self.directory = Path(directory)
        self.instruction = instruction
        meta = self.directory / "meta.json"
        if not meta.is_file():
            raise FileNotFoundError(
                f"{self.directory} is not a chart directory: there is no {meta.name} in it"
            )
        self.meta: dict[str, Any] = json_object(meta)
        self._rows = JsonLines(
            self.directory / "charts.jsonl",
            ("id", "image", "code", "record", "licence", "source", "instruction"),
        )
        # Of a dialogue directory it counts the dialogues.
        if not (self.directory / "dialogues.jsonl").is_file():
            _check_count(meta, self.meta, len(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Chart]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int, /) -> Chart:
        where = self.where(index)
        row = Fields(self._rows[index], where)
        try:
            record = Record.from_json(row.row["record"])
        except ValueError as error:
            raise ValueError(f"{where} has a bad record: {error}") from error
        instruction = row.text("instruction", empty=True)
        return Chart(
            id=row.text("id"),
            image=_read_image(self.directory, row.text("image"), where),
            code=row.text("code"),
            record=record,
            instruction=self.instruction if self.instruction is not None else instruction,
            source=row.text("source", empty=True),
            licence=row.text("licence", empty=True),
            more_images=tuple(
                _read_image(self.directory, name, where) for name in self._more_images(index)
            ),
        )

    def questions(self) -> Questions:
        """How many pictures the charts' questions show; rows that cannot be read count as one with
        one. Reads the text of all rows, and parses those of several pictures alone.
        """
        more = []
        for index in self._rows.mentioning("more_images"):
            with contextlib.suppress(ValueError):
                more.append(len(self._more_images(index)))
        mean = 1.0 + sum(more) / max(len(self), 1)
        return Questions(1 + max(more, default=0), mean)

    def _more_images(self, index: int) -> list[object]:
        """The names of a chart's further pictures."""
        row = Fields(self._rows[index], self.where(index))
        return row.list_of("more_images") if "more_images" in row.row else []

    def where(self, index: int) -> str:
        """File and line of a chart, for messages."""
        return self._rows.where(index)

    def stamp(self) -> str:
        """Another text when the rows have changed."""
        return self._rows.stamp()

    def digest(self) -> str:
        """Another text when the rows are others, wherever the directory is."""
        return self._rows.digest()


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
        meta = self.directory / "meta.json"
        _check_count(meta, self.charts.meta, len(self._rows), len(self.charts))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Dialogue]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int, /) -> Dialogue:
        where = self.where(index)
        row = Fields(self._rows[index], where)
        responses, texts = row.texts("responses"), row.texts("feedback_text")
        names = [_names(entry) for entry in row.list_of("feedback_image")]
        if not responses:
            raise ValueError(f"{where} has no response")
        turns = len(responses)
        if not len(texts) == len(names) == turns - 1:
            raise ValueError(
                f"{where} has {turns} responses, so it needs {turns - 1} feedback texts and images "
                "(null for none)"
            )
        return Dialogue(
            id=row.text("id"),
            chart=self.charts[row.index("chart", len(self.charts))],
            responses=responses,
            feedback_text=texts,
            feedback_images=tuple(
                tuple(_read_image(self.directory, name, where) for name in of_turn)
                for of_turn in names
            ),
            gain=row.number("gain"),
            origin=row.text("origin", empty=True),
        )

    def most_pictures(self) -> int:
        """How many pictures the dialogue with the most has in its feedbacks; rows that cannot be
        read count for nothing. Reads all rows, without pictures.
        """
        most = 0
        for index in range(len(self)):
            with contextlib.suppress(ValueError):
                names = Fields(self._rows[index], self.where(index)).list_of("feedback_image")
                most = max(most, sum(len(_names(entry)) for entry in names))
        return most

    def questions(self) -> Questions:
        """How many pictures the questions of the dialogues' charts show."""
        return self.charts.questions()

    def where(self, index: int) -> str:
        """File and line of a dialogue, for messages."""
        return self._rows.where(index)

    def stamp(self) -> str:
        """Another text when the rows have changed."""
        return f"{self._rows.stamp()} {self.charts.stamp()}"

    def digest(self) -> str:
        """Another text when the rows are others, wherever the directory is."""
        return f"{self._rows.digest()} {self.charts.digest()}"


def _names(entry: object) -> list[object]:
    """The names of one feedback's pictures, as a row has them."""
    if entry is None:
        return []
    return entry if isinstance(entry, list) else [entry]


def _check_count(path: Path, meta: dict[str, Any], *counts: int) -> None:
    """Raises ValueError where a meta.json says a count that is none of `counts`."""
    said = meta.get("count", counts[0])
    if said not in counts or isinstance(said, bool):
        raise ValueError(
            f"{path} says count={said!r}, but there are {counts[0]} rows: rows were lost or added; "
            "mend the count if that is meant"
        )


def _read_image(directory: Path, name: object, where: str) -> bytes:
    """A picture of a directory that may come from anywhere: no name leads out of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where}: an image is {name!r}, not a name")
    try:
        path = (directory / name).resolve()
        if not path.is_relative_to(directory.resolve()):
            raise ValueError(f"{where} names an image outside the directory: {name}")
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{where} names an image that is not there: {name}") from None
    except (OSError, RuntimeError) as error:  # a folder, a name too long, links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{where} names an image that cannot be read: {name}: {reason}") from None

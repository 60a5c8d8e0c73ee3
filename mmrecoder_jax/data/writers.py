"""Writes chart and dialogue directories (`data.sources`), whole or not at all.

A directory is written beside its place and renamed at the end. A writer that is killed at any
point leaves its rows; the next one with the same meta resumes from them:

    charts.partial/journal.jsonl    the meta, then a row per chart, in the order of writing
    charts.partial/images/...       written before their row
    charts/                         rows sorted by id, no journal
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.sources import Chart, ChartDirectory, Dialogue, DialogueDirectory

_JOURNAL = "journal.jsonl"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}")

Row = dict[str, Any]


class _Writer:
    """Journals rows in `<directory>.partial`; `_finish` puts the directory in its place.

    What a killed writer left is taken over when its meta is the same, else thrown away.

    Attributes:
      done: ids that are written already.
    """

    def __init__(self, directory: str | os.PathLike[str], meta: Mapping[str, Any]):
        self.directory = Path(directory)
        if self.directory.exists():
            raise FileExistsError(f"{self.directory} exists already; remove it to build it anew")
        self._partial = self.directory.with_name(self.directory.name + ".partial")
        # Through JSON, so that it compares equal to what a journal says (tuples become lists).
        self._meta = json.loads(json.dumps(dict(meta)))
        self._journal = self._partial / _JOURNAL
        lines = self._recover()
        if self._partial.exists() and not self._is_ours():
            raise FileExistsError(
                f"{self._partial} is there and no writer left it, but {self.directory} is written "
                "there first: move it away"
            )
        if not lines or lines[0] != self._meta:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            lines = [self._meta]
            _write_atomically(self._journal, json.dumps(self._meta) + "\n")
        self._rows = lines[1:]
        self.done = {row["id"] for row in self._rows}

    def _is_ours(self) -> bool:
        """Whether a writer left the partial directory; a kill may have come before its journal."""
        left = {path.name for path in self._partial.iterdir()} if self._partial.is_dir() else None
        return left is not None and (_JOURNAL in left or left <= {f"{_JOURNAL}.tmp"})

    def _recover(self) -> list[Row]:
        """The whole lines of the journal; cuts off the torn one that a kill may leave at its
        end.
        """
        if not self._journal.is_file():
            return []
        lines, end = [], 0
        with open(self._journal, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                lines.append(json.loads(line))
                end += len(line)
        os.truncate(self._journal, end)
        return lines

    def _append(self, row: Row, images: Mapping[str, bytes]) -> None:
        """Writes images, then the row: a row that is there is complete."""
        if not _ID.fullmatch(row["id"]):
            raise ValueError(
                f"id {row['id']!r} is no file name: use letters, digits, '.', '_' and '-'"
            )
        if row["id"] in self.done:
            raise ValueError(f"id {row['id']!r} is there already")
        # No fsync: this survives a killed process, not a machine that loses power.
        for name, image in images.items():
            path = self._partial / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._rows.append(row)
        self.done.add(row["id"])

    def _sorted(self) -> list[Row]:
        """Rows by id: the order in which executions ended leaves no trace."""
        return sorted(self._rows, key=lambda row: row["id"])

    def _finish(self, files: Mapping[str, Sequence[Row]], count: int) -> None:
        """Writes the JSON-lines files and the meta, and puts the directory in its place."""
        for name, rows in files.items():
            _write_atomically(self._partial / name, "".join(json.dumps(row) + "\n" for row in rows))
        meta = json.dumps(self._meta | {"count": count}, indent=1)
        _write_atomically(self._partial / "meta.json", meta)
        self._partial.rename(self.directory)
        # Last: a kill before the rename leaves a journal to resume from.
        (self.directory / _JOURNAL).unlink()


class ChartWriter(_Writer):
    """Writes a chart directory: `add` charts whose id is not in `done`, in any order, then
    `finish`.

    Args:
      directory: must not exist yet.
      meta: what it is made from; a killed writer is taken over where it is the same.

    Raises:
      FileExistsError: `directory` is there already, or its `.partial` is somebody else's.
      ValueError: from `add`, for an id that is there already or no file name.
    """

    def add(self, chart: Chart) -> None:
        """Writes one chart."""
        self._append(_chart_row(chart), dict(zip(_image_names(chart), chart.images, strict=True)))

    def attach(self, name: str, text: str) -> None:
        """Writes a file beside the rows: a licence, a report."""
        _write_atomically(self._partial / name, text)

    def repeated_images(self) -> dict[str, str]:
        """Ids of charts whose image an earlier chart (by id) has too -> the id of that chart."""
        first: dict[bytes, str] = {}
        repeated = {}
        for row in self._sorted():
            digest = hashlib.sha256((self._partial / row["image"]).read_bytes()).digest()
            if first.setdefault(digest, row["id"]) != row["id"]:
                repeated[row["id"]] = first[digest]
        return repeated

    def finish(self, without: Container[str] = ()) -> ChartDirectory:
        """Puts the directory in its place; charts in `without` are left out."""
        rows = [row for row in self._sorted() if row["id"] not in without]
        self._finish({"charts.jsonl": rows}, len(rows))
        for row in self._rows:
            if row["id"] in without:
                for name in (row["image"], *row.get("more_images", ())):
                    (self.directory / name).unlink()
        return ChartDirectory(self.directory)


class DialogueWriter(_Writer):
    """Writes a dialogue directory, like `ChartWriter`. A chart is stored once, however many
    dialogues are about it.
    """

    def add(self, dialogue: Dialogue) -> None:
        """Writes one dialogue."""
        chart = dialogue.chart
        images = dict(zip(_image_names(chart), chart.images, strict=True))
        names: list[str | list[str] | None] = []
        for turn, pictures in enumerate(dialogue.feedback_images, start=1):
            first = f"feedback/{dialogue.id}-{turn}"
            more = [f"{first}-{number}.png" for number in range(2, len(pictures) + 1)]
            of_turn = [f"{first}.png", *more][: len(pictures)]
            images |= dict(zip(of_turn, pictures, strict=True))
            names.append(of_turn if more else of_turn[0] if of_turn else None)
        row = {
            "id": dialogue.id,
            "chart": _chart_row(chart),  # `finish` moves it to charts.jsonl
            "responses": list(dialogue.responses),
            "feedback_text": list(dialogue.feedback_text),
            "feedback_image": names,
            "gain": dialogue.gain,
            "origin": dialogue.origin,
        }
        self._append(row, images)

    def finish(self) -> DialogueDirectory:
        """Puts the directory in its place."""
        rows = self._sorted()
        charts = {row["chart"]["id"]: row["chart"] for row in rows}
        numbers = {name: number for number, name in enumerate(sorted(charts))}
        files = {
            "charts.jsonl": [charts[name] for name in numbers],
            "dialogues.jsonl": [row | {"chart": numbers[row["chart"]["id"]]} for row in rows],
        }
        self._finish(files, len(rows))
        return DialogueDirectory(self.directory)


def _image_names(chart: Chart) -> list[str]:
    more = range(2, len(chart.images) + 1)
    return [f"images/{chart.id}.png", *(f"more_images/{chart.id}-{number}.png" for number in more)]


def _chart_row(chart: Chart) -> Row:
    if chart.record is None:
        raise ValueError(f"chart {chart.id} has no record: it cannot be learnt from or scored")
    first, *more = _image_names(chart)
    row = {
        "id": chart.id,
        "image": first,
        "code": chart.code,
        "record": chart.record.to_json(),
        "licence": chart.licence,
        "source": chart.source,
        "instruction": chart.instruction,
    }
    return row | ({"more_images": more} if more else {})


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

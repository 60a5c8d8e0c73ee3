"""Drawings on disk.

    DIR/index.html               all drawings in the folder
    DIR/<name>/index.html        the chart, every turn with its render, code and changes
        chart.png                what the author was shown
        final.py final.png       the turn that is handed over; missing where no turn runs
        turn-1.py turn-1.png     what turn 1 wrote and drew; `turn-1.error.txt` instead of a render
        turn-1.response.txt      all that it wrote
        sample-2/turn-1.py ...   in place of these where there are several samples
        drawing.json             what it was made of and what came of it; is written last

A drawing's folder is whole or not there: it is made beside its place and renamed. One that is there
is not made again, and never written over by one that was made in another way.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmrecoder_jax.config import ConfigError, check_output_dir
from mmrecoder_jax.data.rows import RowError, json_object
from mmrecoder_jax.data.sources import Chart, png_bytes
from mmrecoder_jax.drawing.drawing import Drawing
from mmrecoder_jax.drawing.page import drawing_page, index_page
from mmrecoder_jax.drawing.pictures import digest
from mmrecoder_jax.env.response import extract_code
from mmrecoder_jax.rl.trajectory import Turn

ROW = "drawing.json"
_PART = ".part"  # ends the name of a folder that is being made


@dataclasses.dataclass(frozen=True)
class Kept:
    """A drawing that is on disk.

    Attributes:
      code: of the turn that was handed over; None where no turn ran.
    """

    name: str
    row: Mapping[str, Any]
    code: str | None
    summary: str


class Folder:
    """The drawings of one directory, made with one set of settings.

    Args:
      settings: all that decides a drawing besides the chart, as JSON can hold it.
      overwrite: whether drawings made with other settings are replaced.

    Raises:
      ConfigError: the directory cannot be written to.
    """

    def __init__(self, directory: str, settings: Mapping[str, Any], overwrite: bool = False):
        check_output_dir("--out", directory)
        self.directory, self._overwrite = Path(directory), overwrite
        self._settings = json.loads(json.dumps(settings))
        self._names: dict[str, str] = {}  # name -> digest of the chart that has it

    def place(self, chart: Chart) -> str:
        """The name of the folder for a chart: its id, followed by the beginning of its digest where
        another chart of that name is there.

        Raises:
          ConfigError: what is at that place must not be replaced.
        """
        mine = digest(chart)
        for name in (chart.id, f"{chart.id}-{mine[:8]}"):
            row = self._row(name)
            owner = self._names.get(name) or (row or {}).get("chart")
            if owner in (None, mine):
                self._names[name] = mine
                self._check(name, row)
                return name
        raise ConfigError(f"--out={str(self.directory)!r}: {name} is another chart's; move it away")

    def kept(self, name: str) -> Kept | None:
        """The drawing of that name, where it was made with these settings."""
        row = self._row(name)
        if row is None or row["settings"] != self._settings:
            return None
        final = self.directory / name / "final.py"
        code = final.read_text(encoding="utf-8") if final.is_file() else None
        return Kept(name, row, code, row["summary"])

    def write(self, name: str, drawing: Drawing) -> Path:
        """Writes a drawing; returns the path of its page."""
        place = self.directory / name
        part = self.directory / f".{name}{_PART}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write_turns(part, drawing)
        (part / "chart.png").write_bytes(drawing.chart.image)
        if drawing.code is not None and drawing.render is not None:
            (part / "final.py").write_bytes(_utf8(_ended(drawing.code)))
            (part / "final.png").write_bytes(png_bytes(drawing.render))
        drawing_page(part / "index.html", name, drawing, self._settings)
        row = _row_of(drawing) | {"settings": self._settings}
        (part / ROW).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        if place.exists():  # made with other settings, which `place` has allowed
            shutil.rmtree(place)
        part.rename(place)
        return place / "index.html"

    def write_index(self) -> Path:
        """Writes the page of all drawings in the directory; returns its path."""
        return index_page(self.directory, dict(self._all()))

    def _all(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for path in sorted(self.directory.iterdir()):
            row = self._row(path.name) if path.is_dir() and path.suffix != _PART else None
            if row is not None:
                yield path.name, row

    def _row(self, name: str) -> dict[str, Any] | None:
        path = self.directory / name / ROW
        try:
            row = json_object(path)
        except (OSError, RowError):
            return None
        return row if {"chart", "settings", "summary"} <= row.keys() else None

    def _check(self, name: str, row: Mapping[str, Any] | None) -> None:
        place = self.directory / name
        if row is None and place.exists():
            raise ConfigError(
                f"{place} is there and holds no drawing of ours: name another --out, or move it"
            )
        if row is None or self._overwrite or row["settings"] == self._settings:
            return
        theirs = row["settings"]
        changed = [
            f"{field} {theirs.get(field)!r}, now {value!r}"
            for field, value in self._settings.items()
            if theirs.get(field) != value
        ]
        raise ConfigError(
            f"{place} holds a drawing that was made otherwise ({'; '.join(changed)}): name another "
            "--out, or replace it with --overwrite"
        )


def _row_of(drawing: Drawing) -> dict[str, Any]:
    choice = drawing.choice
    return {
        "chart": digest(drawing.chart),
        "source": drawing.chart.source,
        "summary": drawing.summary,
        "chosen": None
        if choice is None
        else {"sample": choice.sample + 1, "turn": choice.turn + 1},
        "samples": [
            [
                {
                    "status": str(turn.execution.status),
                    "error": turn.execution.error,
                    "likeness": None if math.isnan(alike) else alike,
                    "judge": None if turn.verdict is None else turn.verdict.score,
                    "finished": turn.finished,
                }
                for turn, alike in zip(trajectory.turns, likenesses, strict=True)
            ]
            for trajectory, likenesses in zip(drawing.samples, drawing.alike, strict=True)
        ],
    }


def _write_turns(part: Path, drawing: Drawing) -> None:
    for sample, trajectory in enumerate(drawing.samples, 1):
        directory = part / f"sample-{sample}" if len(drawing.samples) > 1 else part
        directory.mkdir(exist_ok=True)
        for number, turn in enumerate(trajectory.turns, 1):
            for ending, content in _files(turn).items():
                (directory / f"turn-{number}.{ending}").write_bytes(content)


def _files(turn: Turn) -> dict[str, bytes]:
    """What a turn leaves, by the ending of the file."""
    code, image = extract_code(turn.text), turn.execution.image
    files = {"response.txt": _utf8(turn.text)}
    if code is not None:
        files["py"] = _utf8(_ended(code))
    if image is not None:
        files["png"] = png_bytes(image)
    if turn.execution.error:
        files["error.txt"] = _utf8(_ended(turn.execution.error))
    return files


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"

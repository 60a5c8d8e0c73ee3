"""Charts and correction dialogues on disk, read by random access.

A chart directory:

    meta.json      {"name", "licence", "count", "dpi", "rc_params", "matplotlib", ...}
    charts.jsonl   one row a chart: {"id", "image": "images/<id>.png", "code", "record": {...}, "licence", "source", "instruction"}
    images/        one PNG a chart

A dialogue directory is a chart directory with `dialogues.jsonl` beside it, and the renders that
were fed back in `feedback/`:

    {"id", "chart": <row of charts.jsonl>, "responses": [...], "feedback_text": [...],
    "feedback_image": ["feedback/<id>-1.png" | null],
     "gain", "origin"}

Directories appear whole or not at all: they are written beside their place (`<dir>.partial`) and
renamed at the end. A writer that was killed goes on from the rows it finds there.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrecoder_jax.data import synthetic
from mmrecoder_jax.env import EnvConfig, Execution, ExecutorPool, Record, Status

_JOURNAL = "journal.jsonl"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}")


@dataclasses.dataclass(frozen=True)
class Chart:
    """A target: `image` is PNG bytes, `record` what its code draws, `instruction` what the user
    asks.
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

    `gain` is the low-level score of the last response less that of the first; `origin` says where
    the first response came from.
    """

    id: str
    chart: Chart
    responses: tuple[str, ...]
    feedback_text: tuple[str, ...]
    feedback_image: tuple[bytes | None, ...]
    gain: float
    origin: str


def png_bytes(image: np.ndarray | Image.Image) -> bytes:
    """PNG of uint8 pixels [H, W, 3] or of any Pillow image, transparency laid on white."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if picture.mode in ("RGBA", "LA", "P", "PA"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


class JsonLines:
    """Random access to the rows of a JSON-lines file, of which only the line starts are held in
    memory. Can be pickled.

    Raises FileNotFoundError for no file; ValueError, naming file and line, for a row that is not an
    object with the `required` fields.
    """

    def __init__(self, path: str | os.PathLike, required: Iterable[str]):
        self.path = Path(path)
        self.required = tuple(required)
        with open(self.path, "rb") as file:
            lengths = [len(line) for line in file]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, there is no row {index}")
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path} line {index + 1} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.path} line {index + 1} is not an object but {type(row).__name__}"
            )
        missing = [name for name in self.required if name not in row]
        if missing:
            raise ValueError(
                f"{self.path} line {index + 1} lacks {', '.join(missing)}; it has {', '.join(row)}"
            )
        return row


class ChartDirectory:
    """Random access to the charts of a directory; images are read when asked for.

    Args:
      directory: as described at the top of this module.
      instruction: what the user asks; None for each chart's own.
    Raises:
      FileNotFoundError: not a chart directory.
      ValueError: when a row is read that is not a chart; names file and line.
    """

    def __init__(self, directory: str | os.PathLike, instruction: str | None = None):
        self.directory = Path(directory)
        self.instruction = instruction
        meta = self.directory / "meta.json"
        if not meta.is_file():
            raise FileNotFoundError(
                f"{self.directory} is not a chart directory: there is no {meta.name} in it"
            )
        self.meta = json.loads(meta.read_text())
        self._rows = JsonLines(
            self.directory / "charts.jsonl",
            ("id", "image", "code", "record", "licence", "source", "instruction"),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Chart:
        row = self._rows[index]
        where = f"{self._rows.path} line {index + 1}"
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
    """Random access to the dialogues of a directory. Arguments and errors as of
    `ChartDirectory`.
    """

    def __init__(self, directory: str | os.PathLike, instruction: str | None = None):
        self.directory = Path(directory)
        self.charts = ChartDirectory(directory, instruction)
        self.meta = self.charts.meta
        self._rows = JsonLines(
            self.directory / "dialogues.jsonl",
            ("id", "chart", "responses", "feedback_text", "feedback_image", "gain", "origin"),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Dialogue:
        row = self._rows[index]
        where = f"{self._rows.path} line {index + 1}"
        turns = len(row["responses"])
        if not len(row["feedback_text"]) == len(row["feedback_image"]) == turns - 1:
            raise ValueError(
                f"{where} has {turns} responses, so it needs {turns - 1} feedback texts and images (null for none)"
            )
        return Dialogue(
            id=row["id"],
            chart=self.charts[row["chart"]],
            responses=tuple(row["responses"]),
            feedback_text=tuple(row["feedback_text"]),
            feedback_image=tuple(
                name and _read_image(self.directory, name, where) for name in row["feedback_image"]
            ),
            gain=row["gain"],
            origin=row["origin"],
        )


def _read_image(directory: Path, name: str, where: str) -> bytes:
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ValueError(f"{where} names an image outside the directory: {name}")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{where} names an image that is not there: {name}") from None


class _Writer:
    """Journals rows in `<directory>.partial`; `_finish` puts the directory in its place. `done`
    holds the ids already written.

    The first line of the journal is the meta. What a killed writer left is taken over when its meta
    is the same, else thrown away.
    """

    def __init__(self, directory: str | os.PathLike, meta: Mapping[str, Any]):
        self.directory = Path(directory)
        if self.directory.exists():
            raise FileExistsError(f"{self.directory} exists already; remove it to build it anew")
        self._partial = self.directory.with_name(self.directory.name + ".partial")
        self._meta = json.loads(json.dumps(dict(meta)))
        self._journal = self._partial / _JOURNAL
        lines = self._recover()
        if not lines or lines[0] != self._meta:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            lines = [self._meta]
            _write_atomically(self._journal, json.dumps(self._meta) + "\n")
        self._rows = lines[1:]
        self.done = {row["id"] for row in self._rows}

    def _recover(self) -> list[dict[str, Any]]:
        """The whole lines of the journal; the torn one that a kill may leave at its end is cut
        off.
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

    def _append(self, row: dict[str, Any], images: Mapping[str, bytes]):
        """The images first: a row that is there is complete."""
        if not _ID.fullmatch(row["id"]):
            raise ValueError(
                f"id {row['id']!r} is no file name: use letters, digits, '.', '_' and '-'"
            )
        if row["id"] in self.done:
            raise ValueError(f"id {row['id']!r} is there already")
        for name, image in images.items():
            path = self._partial / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._rows.append(row)
        self.done.add(row["id"])

    def attach(self, name: str, text: str):
        """A file beside the rows: a licence, a report."""
        _write_atomically(self._partial / name, text)

    def _finish(self, files: Mapping[str, list[dict[str, Any]]], count: int):
        """`files` are the JSON-lines files of the directory."""
        for name, rows in files.items():
            _write_atomically(self._partial / name, "".join(json.dumps(row) + "\n" for row in rows))
        _write_atomically(
            self._partial / "meta.json", json.dumps(self._meta | {"count": count}, indent=1)
        )
        self._partial.rename(self.directory)
        (self.directory / _JOURNAL).unlink()


class ChartWriter(_Writer):
    """Writes a chart directory, resumably: `add` charts whose id is not in `done`, in any order,
    then `finish`.
    """

    def add(self, chart: Chart):
        name = f"images/{chart.id}.png"
        self._append(_chart_row(chart), {name: chart.image})

    def repeated_images(self) -> dict[str, str]:
        """Ids of charts whose image an earlier chart (by id) has too -> the id of that chart."""
        first, repeated = {}, {}
        for row in sorted(self._rows, key=lambda row: row["id"]):
            digest = hashlib.sha256((self._partial / row["image"]).read_bytes()).digest()
            if first.setdefault(digest, row["id"]) != row["id"]:
                repeated[row["id"]] = first[digest]
        return repeated

    def finish(self, without: Container[str] = ()) -> ChartDirectory:
        """Rows are sorted by id, so that the order in which executions ended leaves no trace;
        charts in `without` are left out.
        """
        rows = sorted(
            (row for row in self._rows if row["id"] not in without), key=lambda row: row["id"]
        )
        self._finish({"charts.jsonl": rows}, len(rows))
        for row in self._rows:
            if row["id"] in without:
                (self.directory / row["image"]).unlink()
        return ChartDirectory(self.directory)


class DialogueWriter(_Writer):
    """Writes a dialogue directory, resumably, like `ChartWriter`. A chart is stored once however
    many dialogues are about it.
    """

    def add(self, dialogue: Dialogue):
        chart = dialogue.chart
        images = {f"images/{chart.id}.png": chart.image}
        names = [
            f"feedback/{dialogue.id}-{turn + 1}.png" if image else None
            for turn, image in enumerate(dialogue.feedback_image)
        ]
        images |= {
            name: image for name, image in zip(names, dialogue.feedback_image, strict=True) if name
        }
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
        rows = sorted(self._rows, key=lambda row: row["id"])
        charts = {row["chart"]["id"]: row["chart"] for row in rows}
        numbers = {name: number for number, name in enumerate(sorted(charts))}
        dialogues = [row | {"chart": numbers[row["chart"]["id"]]} for row in rows]
        self._finish(
            {"charts.jsonl": [charts[name] for name in numbers], "dialogues.jsonl": dialogues},
            len(rows),
        )
        return DialogueDirectory(self.directory)


def _chart_row(chart: Chart) -> dict[str, Any]:
    return {
        "id": chart.id,
        "image": f"images/{chart.id}.png",
        "code": chart.code,
        "record": chart.record.to_json(),
        "licence": chart.licence,
        "source": chart.source,
        "instruction": chart.instruction,
    }


def _write_atomically(path: Path, text: str):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_chart_directory(
    directory: str | os.PathLike, charts: Iterable[Chart], meta: Mapping[str, Any]
) -> ChartDirectory:
    """Writes all `charts`; takes over what a killed call with the same `meta` left.

    Raises FileExistsError where `directory` is there already, ValueError for an id that is twice
    there or no file name.
    """
    writer = ChartWriter(directory, meta)
    for chart in charts:
        if chart.id not in writer.done:
            writer.add(chart)
    return writer.finish()


def stream_in_chunks(
    pool: ExecutorPool, codes: Sequence[str | None], chunk: int = 256
) -> Iterator[tuple[int, Execution]]:
    """`pool.stream` that holds at most `chunk` renders in memory."""
    for start in range(0, len(codes), chunk):
        for index, execution in pool.stream(codes[start : start + chunk]):
            yield start + index, execution


def environment_meta(config: EnvConfig) -> dict[str, Any]:
    """What of the environment decides how charts look: part of the meta of every data set that was
    rendered.
    """
    import matplotlib

    return {
        "dpi": config.dpi,
        "rc_params": dict(config.rc_params),
        "matplotlib": matplotlib.__version__,
    }


def synthetic_env(**changes: Any) -> EnvConfig:
    """The environment of the synthetic charts: their house style; `changes` set other fields."""
    return EnvConfig(
        **{
            "dpi": synthetic.DPI,
            "rc_params": synthetic.RC_PARAMS,
            "preload": ("numpy", "matplotlib"),
        }
        | changes
    )


def build_synthetic(
    directory: str | os.PathLike,
    split: str,
    count: int,
    seed: int,
    pool: ExecutorPool,
    progress: Callable[[int, int], None] | None = None,
) -> ChartDirectory:
    """The first `count` synthetic charts of a split, rendered in `pool`. Nothing is done where they
    are there already.

    Args:
      progress: called with (charts done, charts in all) after each chart.
    Raises:
      ValueError: `directory` holds something else (another seed, count, grammar or style).
      RuntimeError: a chart of the grammar does not run in `pool`.
    """
    directory = Path(directory)
    specs = {
        f"{split}-{index:06d}": synthetic.chart_spec(seed, index, split) for index in range(count)
    }
    grammar = hashlib.sha256(
        "\n".join(spec.code() for spec in specs.values()).encode()
    ).hexdigest()[:16]
    meta = {
        "name": f"synthetic-{split}",
        "licence": "Apache-2.0",
        "seed": seed,
        "count": count,
        "grammar": grammar,
    }
    meta = json.loads(json.dumps(meta | environment_meta(pool.config)))
    if directory.exists():
        charts = ChartDirectory(directory)
        wrong = [name for name in meta if charts.meta.get(name) != meta[name]]
        if wrong:
            raise ValueError(
                f"{directory} holds other charts ({', '.join(wrong)} differ); remove it or build elsewhere"
            )
        return charts
    writer = ChartWriter(directory, meta)
    todo = [name for name in specs if name not in writer.done]
    for index, execution in stream_in_chunks(pool, [specs[name].code() for name in todo]):
        name = todo[index]
        code = specs[name].code()
        if execution.status != Status.OK:
            raise RuntimeError(
                f"synthetic chart {name} does not run ({execution.status}): {execution.error}\n{code}"
            )
        image = png_bytes(execution.image)
        writer.add(
            Chart(
                name,
                image,
                code,
                execution.record,
                synthetic.INSTRUCTION,
                f"synthetic seed {seed}",
                "Apache-2.0",
            )
        )
        if progress:
            progress(len(writer.done), count)
    return writer.finish()

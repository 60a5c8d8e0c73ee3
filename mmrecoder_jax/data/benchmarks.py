"""Published chart-to-code data as they are on disk, and their way into a chart directory.

    chart2code   one JSON list of {"id", "image", "conversations": [{"from": "human", "value"},
                 {"from": "gpt", "value"}]} (Chart2Code-160k)
    chartmimic   ChartMimic v2: direct_600/<type>_<n>.py with the .png of the same name
    plot2code    metadata.jsonl of {"file_name", "code", "instruction"}
    chartx       one JSON list of {"chart_type", "imgname", "img", "redrawing": {"output"}, ...}

Image names are relative to the folder of the list. Each reader yields `RawChart`s. A bad row raises
a ValueError that names file and row (from 0; of JSON lines the line, from 1); where the caller
passes a list as `bad`, the message goes there and reading goes on (published files hold bad rows).

An id keeps its identity: one that is no file name gets a hash (`rows.file_name`), and so does the
second of two that would share a name: the text "7" after the number 7, "a_b" after "a b", and "a"
after "A", which some file systems cannot tell apart. Only a row whose id was there before, the very
same, is a bad one.

`import_charts` runs the code of each: what a chart directory needs beyond the published data is the
record of what the code draws.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.build import drawn, environment_meta, stream_in_chunks
from mmrecoder_jax.data.rows import (
    JsonLines,
    file_name,
    hashed_name,
    is_unicode,
    json_list,
    read_script,
)
from mmrecoder_jax.data.sources import Chart, ChartDirectory, png_bytes
from mmrecoder_jax.data.synthetic import INSTRUCTION
from mmrecoder_jax.data.writers import ChartWriter
from mmrecoder_jax.env import Execution, ExecutorPool
from mmrecoder_jax.env.response import answer_code
from mmrecoder_jax.images import BadImage, decode

CHUNK = 64  # real charts are large: fewer renders in memory than of synthetic ones
_LICENCE = "as published with the data set"
_REASON_CHARS = 200  # of an error's last line


@dataclasses.dataclass(frozen=True)
class RawChart:
    """A chart whose code has not been run.

    Attributes:
      codes: scripts that are tried in turn until one draws.
      image: a file; None for the code's own render.
    """

    id: str
    codes: tuple[str, ...]
    image: Path | None
    source: str
    licence: str
    instruction: str = INSTRUCTION


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A chart that did not come through, and why, in one line."""

    source: str
    reason: str


def import_charts(
    directory: str | os.PathLike[str],
    raws: Sequence[RawChart],
    pool: ExecutorPool,
    meta: Mapping[str, Any],
    skipped: Sequence[Skipped] = (),
    attachments: Mapping[str, str] | None = None,
    curate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ChartDirectory:
    """Runs the code of each raw chart and writes a chart directory with a `skipped.jsonl`.

    Code that draws nothing and images that cannot be read are left out, with their reason.
    Resumable and atomic like every builder here.

    Args:
      skipped: what the caller has left out already; goes into the same report.
      attachments: further files of the directory, text by name.
      curate: also leave out charts without any chart type in their record, and those whose image an
        earlier one has. For a gallery; a benchmark is taken as it is.
      progress: called with (charts looked at, charts in all).
    """
    report = list(skipped)
    first: dict[str, RawChart] = {}
    for raw in raws:
        if first.setdefault(raw.id, raw) is not raw:
            report.append(Skipped(raw.source, f"its id {raw.id} is that of {first[raw.id].source}"))
    made_of = {**meta, "rows": _digest(raws), **environment_meta(pool.config)}
    writer = ChartWriter(directory, made_of)
    todo = [raw for raw in first.values() if raw.id not in writer.done]
    looked_at = len(raws) - len(todo)
    for attempt in range(max((len(raw.codes) for raw in todo), default=0)):
        # Executions end in any order: what goes into the next attempt is sorted again.
        again: list[tuple[int, RawChart]] = []
        codes = [raw.codes[attempt] for raw in todo]
        for index, execution in stream_in_chunks(pool, codes, CHUNK):
            raw = todo[index]
            if not execution.ok and attempt + 1 < len(raw.codes):
                again.append((index, raw))
                continue
            outcome = _executed(raw, codes[index], execution, curate)
            if isinstance(outcome, Chart):
                writer.add(outcome)
            else:
                report.append(outcome)
            looked_at += 1
            if progress:
                progress(looked_at, len(raws))
        todo = [raw for _, raw in sorted(again, key=lambda pair: pair[0])]
    # Only now: which of two equal charts comes first must not depend on which was drawn first.
    repeated = writer.repeated_images() if curate else {}
    report += [
        Skipped(first[name].source, f"same image as {first[other].source}")
        for name, other in repeated.items()
    ]
    lines = sorted(json.dumps(dataclasses.asdict(entry)) for entry in report)
    writer.attach("skipped.jsonl", "".join(line + "\n" for line in lines))
    for name, text in (attachments or {}).items():
        writer.attach(name, text)
    return writer.finish(without=repeated)


def _digest(raws: Iterable[RawChart]) -> str:
    """Another text for other raw charts: a killed import of theirs is not this one's beginning."""
    digest = hashlib.sha256()
    for raw in raws:
        digest.update(json.dumps(dataclasses.asdict(raw), default=str).encode())
    return digest.hexdigest()[:16]


def _executed(raw: RawChart, code: str, execution: Execution, curate: bool) -> Chart | Skipped:
    """The chart that an execution gives, or why it gives none."""
    if not execution.ok:
        last_line = execution.error.strip().rpartition("\n")[2]
        return Skipped(raw.source, f"{execution.status}: {last_line[:_REASON_CHARS]}")
    render, record = drawn(execution)
    if curate and not record.types:
        return Skipped(raw.source, "no chart type in it")
    if raw.image is None:
        image = png_bytes(render)
    else:
        try:
            image = png_bytes(decode(raw.image))
        except BadImage as error:
            return Skipped(raw.source, f"its image is bad: {error}")
    return Chart(raw.id, image, code, record, raw.instruction, raw.source, raw.licence)


# ---------------------------------------------------------------- readers


def _image_path(root: Path, name: Any) -> Path:
    """Raises ValueError for a name that is no file below `root`."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"its image is {name!r}, not a relative path")
    try:
        path = (root / name).resolve()  # a published list may name anything, links included
        if not path.is_relative_to(root.resolve()):
            raise ValueError(f"its image {name} is outside {root}")
        there = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        raise ValueError(f"its image {name[:80]} cannot be looked up: {error}") from error
    if not there:
        raise ValueError(f"its image {path} is not there")
    return path


def _field(row: Any, *names: str) -> Any:
    """row[names[0]][names[1]]...; raises ValueError that says which field is missing."""
    value = row
    for i, name in enumerate(names):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"it has no field {'.'.join(names[: i + 1])}")
        value = value[name]
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"its {what} is {kind}, not text")
    if not is_unicode(value):
        raise ValueError(f"its {what} holds half of a surrogate pair")
    return value


def _code(text: Any) -> str:
    """The code of an answer (`response.answer_code`); raises ValueError for no code."""
    code = answer_code(_text(text, "code"))
    if not code.strip():
        raise ValueError("its code is empty")
    return code.strip("\n")


Id = str | int | float


def _id(value: Any) -> Id:
    """An id as it is in the file; raises ValueError for what is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"its id is {json.dumps(value)[:80]}, neither text nor a number")
    return value


# (what messages call a row, what reads it): the id as it is in the file, and the chart under
# `file_name(str(id))`. Reading may raise ValueError.
Entry = tuple[str, Callable[[], tuple[Id, RawChart]]]


def _each(entries: Iterable[Entry], bad: list[str] | None) -> Iterator[RawChart]:
    """The charts of the entries, each under a name of its own."""
    seen: set[str] = set()  # ids as JSON, which tells 7 from "7"
    names: set[str] = set()  # in lower case, as some file systems know them
    for where, read in entries:
        try:
            identity, raw = read()
            key = json.dumps(identity)
            if key in seen:
                raise ValueError(f"its id {identity} was there before")
        except ValueError as error:
            message = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if bad is None:
                raise ValueError(message) from error
            bad.append(message)
            continue
        if raw.id.lower() in names:
            raw = dataclasses.replace(raw, id=hashed_name(key))
        seen.add(key)
        names.add(raw.id.lower())
        yield raw


def _rows(path: Path, build: Callable[[Any], tuple[Id, RawChart]]) -> Iterator[Entry]:
    """The entries of a JSON list."""
    for number, row in enumerate(json_list(path)):
        yield f"{path} row {number}", functools.partial(build, row)


def read_chart2code(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    bad: list[str] | None = None,
) -> Iterator[RawChart]:
    """Chart2Code-160k (LLaVA style). Only the first question and answer of a row are used.

    Args:
      path: the JSON list.
      images: the folder that image names are relative to; that of `path` by default.
    """
    path = Path(path)
    root = Path(images) if images is not None else path.parent

    def build(row: Any) -> tuple[Id, RawChart]:
        said = _field(row, "conversations")
        speakers = [_field(one, "from") for one in said[:2]] if isinstance(said, list) else []
        if speakers != ["human", "gpt"]:
            raise ValueError(f"its conversation does not start with human, gpt but with {speakers}")
        question = _text(_field(said[0], "value"), "instruction")
        code = _code(_field(said[1], "value"))
        identity = _id(_field(row, "id"))
        return identity, RawChart(
            file_name(str(identity)),
            (code,),
            _image_path(root, _field(row, "image")),
            f"Chart2Code-160k/{identity}",
            _LICENCE,
            question.replace("<image>", "").strip() or INSTRUCTION,
        )

    yield from _each(_rows(path, build), bad)


def read_chartmimic(
    directory: str | os.PathLike[str], bad: list[str] | None = None
) -> Iterator[RawChart]:
    """One folder of ChartMimic v2 (`direct_600`, `customized_600`, ...).

    Raises:
      FileNotFoundError: a folder without scripts.
    """
    directory = Path(directory)
    scripts = sorted(directory.glob("*.py"))
    if not scripts:
        raise FileNotFoundError(
            f"{directory} holds no .py files; pass a folder of ChartMimic v2 such as direct_600"
        )

    def build(script: Path) -> tuple[Id, RawChart]:
        image = _image_path(directory, f"{script.stem}.png")
        source = f"ChartMimic/{directory.name}/{script.name}"
        code = read_script(script).strip("\n")
        if not code.strip():
            raise ValueError("its code is empty")
        return script.stem, RawChart(file_name(script.stem), (code,), image, source, _LICENCE)

    yield from _each(((str(path), functools.partial(build, path)) for path in scripts), bad)


def read_plot2code(
    directory: str | os.PathLike[str], bad: list[str] | None = None
) -> Iterator[RawChart]:
    """A Plot2Code image folder (`data/python_matplotlib/test`).

    Its `instruction` describes the figure in words and is not used.
    """
    directory = Path(directory)
    rows = JsonLines(directory / "metadata.jsonl", ())

    def build(number: int) -> tuple[Id, RawChart]:
        row = rows[number]  # read here, so that a broken line is a bad row and not the end
        name = _text(_field(row, "file_name"), "file_name")
        return name, RawChart(
            file_name(Path(name).stem),
            (_code(_field(row, "code")),),
            _image_path(directory, name),
            f"Plot2Code/{name}",
            _LICENCE,
        )

    yield from _each(
        ((rows.where(number), functools.partial(build, number)) for number in range(len(rows))), bad
    )


def read_chartx(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    bad: list[str] | None = None,
) -> Iterator[RawChart]:
    """ChartX.

    Args:
      path: the JSON list.
      images: the folder that `img` names are relative to; that of `path` by default.
    """
    path = Path(path)
    root = Path(images) if images is not None else path.parent

    def build(row: Any) -> tuple[Id, RawChart]:
        name = _id(_field(row, "imgname"))
        kind = _text(_field(row, "chart_type"), "chart_type")
        code = _code(_field(row, "redrawing", "output"))
        image = _image_path(root, _field(row, "img"))
        identity = f"{kind}-{name}"
        return identity, RawChart(file_name(identity), (code,), image, f"ChartX/{name}", _LICENCE)

    yield from _each(_rows(path, build), bad)

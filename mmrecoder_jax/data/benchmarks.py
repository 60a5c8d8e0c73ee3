"""Published chart-to-code data as they are on disk, and their way into a chart directory.

    chart2code   one JSON list of {"id", "image", "conversations": [{"from": "human", "value"},
                 {"from": "gpt", "value"}]} (Chart2Code-160k)
    chartmimic   ChartMimic v2: direct_600/<type>_<n>.py with the .png of the same name
    plot2code    metadata.jsonl of {"file_name", "code", "instruction"}
    chartx       one JSON list of {"chart_type", "imgname", "img", "redrawing": {"output"}, ...}

Image names are relative to the folder of the list. Each reader yields `RawChart`s. A bad row raises
a ValueError that names file and row; where the caller passes a list as `bad`, the message goes
there and reading goes on (the published files do hold bad rows).

`import_charts` runs the code of each: what a chart directory needs beyond the published data is the
record of what the code draws.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mmrecoder_jax.data.build import drawn, environment_meta, stream_in_chunks
from mmrecoder_jax.data.sources import Chart, ChartDirectory, JsonLines, png_bytes
from mmrecoder_jax.data.synthetic import INSTRUCTION
from mmrecoder_jax.data.writers import ChartWriter
from mmrecoder_jax.env import Execution, ExecutorPool
from mmrecoder_jax.env.response import extract_code
from mmrecoder_jax.images import BadImage, decode

CHUNK = 64  # real charts are large: fewer renders in memory than of synthetic ones
_LICENCE = "as published with the data set"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_REASON_CHARS = 200  # of an error's last line

Item = TypeVar("Item")


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


def safe_id(name: str) -> str:
    """`name` as an id: letters, digits, '.', '_' and '-'."""
    # A leading dot would hide the file, a leading dash reads as a flag; 255 bytes is what file
    # systems take, and ids get prefixes and suffixes.
    return _UNSAFE.sub("_", name).lstrip(".-")[:150]


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
    writer = ChartWriter(directory, {**meta, **environment_meta(pool.config)})
    report = list(skipped)
    todo = [raw for raw in raws if raw.id not in writer.done]
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
    sources = {raw.id: raw.source for raw in raws}
    report += [
        Skipped(sources[name], f"same image as {sources[first]}")
        for name, first in repeated.items()
    ]
    lines = sorted(json.dumps(dataclasses.asdict(entry)) for entry in report)
    writer.attach("skipped.jsonl", "".join(line + "\n" for line in lines))
    for name, text in (attachments or {}).items():
        writer.attach(name, text)
    return writer.finish(without=repeated)


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


def _json_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} is not a JSON list but {type(rows).__name__}")
    return rows


def _image_path(root: Path, name: Any) -> Path:
    """Raises ValueError for a name that is no file below `root`."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"its image is {name!r}, not a relative path")
    path = (root / name).resolve()  # a published list may name anything, links included
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"its image {name} is outside {root}")
    if not path.is_file():
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


def _code(text: Any) -> str:
    """The code of an answer: its fenced block, or all of it where there is no fence.

    Raises ValueError for no code.
    """
    if not isinstance(text, str):
        raise ValueError(f"its code is {type(text).__name__}, not text")
    code = extract_code(text) if "```" in text else text
    if not code or not code.strip():
        raise ValueError("it holds no ```python block" if "```" in text else "its code is empty")
    return code.strip("\n")


def _each(
    rows: Iterable[Item], path: Path, bad: list[str] | None, build: Callable[[Item], RawChart]
) -> Iterator[RawChart]:
    """`build` of each row; an id that is there twice makes its second row a bad one."""
    seen = set()
    for number, row in enumerate(rows):
        try:
            raw = build(row)
            if raw.id in seen:
                raise ValueError(f"its id {raw.id} was there before")
        except ValueError as error:
            message = f"{path} row {number}: {error}"
            if bad is None:
                raise ValueError(message) from error
            bad.append(message)
            continue
        seen.add(raw.id)
        yield raw


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

    def build(row: Any) -> RawChart:
        said = _field(row, "conversations")
        speakers = [_field(one, "from") for one in said[:2]] if isinstance(said, list) else []
        if speakers != ["human", "gpt"]:
            raise ValueError(f"its conversation does not start with human, gpt but with {speakers}")
        instruction = str(_field(said[0], "value")).replace("<image>", "").strip()
        code = _code(_field(said[1], "value"))
        name = safe_id(str(_field(row, "id")))
        return RawChart(
            name,
            (code,),
            _image_path(root, _field(row, "image")),
            f"Chart2Code-160k/{name}",
            _LICENCE,
            instruction or INSTRUCTION,
        )

    yield from _each(_json_list(path), path, bad, build)


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

    def build(script: Path) -> RawChart:
        try:
            image = _image_path(directory, f"{script.stem}.png")
        except ValueError as error:
            raise ValueError(f"{script.name}: {error}") from error
        source = f"ChartMimic/{directory.name}/{script.name}"
        return RawChart(
            safe_id(script.stem),
            (_code(script.read_text(encoding="utf-8")),),
            image,
            source,
            _LICENCE,
        )

    yield from _each(scripts, directory, bad, build)


def read_plot2code(
    directory: str | os.PathLike[str], bad: list[str] | None = None
) -> Iterator[RawChart]:
    """A Plot2Code image folder (`data/python_matplotlib/test`).

    Its `instruction` describes the figure in words and is not used.
    """
    directory = Path(directory)
    rows = JsonLines(directory / "metadata.jsonl", ())

    def build(number: int) -> RawChart:
        row = rows[number]  # read here, so that a broken line is a bad row and not the end
        name = _field(row, "file_name")
        return RawChart(
            safe_id(Path(str(name)).stem),
            (_code(_field(row, "code")),),
            _image_path(directory, name),
            f"Plot2Code/{name}",
            _LICENCE,
        )

    yield from _each(range(len(rows)), rows.path, bad, build)


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

    def build(row: Any) -> RawChart:
        name = _field(row, "imgname")
        code = _code(_field(row, "redrawing", "output"))
        image = _image_path(root, _field(row, "img"))
        return RawChart(
            safe_id(f"{_field(row, 'chart_type')}-{name}"),
            (code,),
            image,
            f"ChartX/{name}",
            _LICENCE,
        )

    yield from _each(_json_list(path), path, bad, build)

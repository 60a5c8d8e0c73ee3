"""Published chart-to-code data as they are on disk, and their way into a chart directory.

    chart2code   one JSON list of {"id", "image", "conversations": [{"from": "human", "value"},
                 {"from": "gpt", "value"}]} (Chart2Code-160k)
    chartmimic   ChartMimic v2: direct_600/<type>_<n>.py with the .png of the same name
    plot2code    metadata.jsonl of {"file_name", "code", "instruction"}
    chartx       one JSON list of {"chart_type", "imgname", "img", "redrawing": {"output"}, ...}

Image names are relative to the folder of the list. Each reader yields `RawChart`s. A bad row raises
a ValueError that names file and row (from 0; of JSON lines the line, from 1), or goes into the
caller's list `bad` (`published.each`, which says what becomes of ids).

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
from mmrecoder_jax.data.published import (
    LICENCE,
    Id,
    RawChart,
    code_of,
    each,
    field,
    id_of,
    image_path,
    kind_of,
    list_entries,
    text_of,
)
from mmrecoder_jax.data.rows import JsonLines, file_name, read_script
from mmrecoder_jax.data.sources import Chart, ChartDirectory, png_bytes
from mmrecoder_jax.data.synthetic import INSTRUCTION
from mmrecoder_jax.data.writers import ChartWriter
from mmrecoder_jax.env import Execution, ExecutorPool
from mmrecoder_jax.images import BadImage, decode

CHUNK = 64  # real charts are large: fewer renders in memory than of synthetic ones
_REASON_CHARS = 200  # of an error's last line


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
    made_of = import_meta(raws, pool, meta)
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


def import_meta(
    raws: Iterable[RawChart], pool: ExecutorPool, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """What the meta.json of `import_charts` says, but for the count.

    Another one for other raw charts: a killed import of theirs is not this one's beginning.
    """
    digest = hashlib.sha256()
    for raw in raws:
        digest.update(json.dumps(dataclasses.asdict(raw), default=str).encode())
    rows = {"rows": digest.hexdigest()[:16]}
    return {**meta, **rows, **environment_meta(pool.config)}


def _executed(raw: RawChart, code: str, execution: Execution, curate: bool) -> Chart | Skipped:
    """The chart that an execution gives, or why it gives none."""
    if not execution.ok:
        last_line = execution.error.strip().rpartition("\n")[2]
        return Skipped(raw.source, f"{execution.status}: {last_line[:_REASON_CHARS]}")
    render, record = drawn(execution)
    if curate and not record.types:
        return Skipped(raw.source, "no chart type in it")
    try:
        image = png_bytes(render if raw.image is None else decode(raw.image))
        more = tuple(png_bytes(decode(path)) for path in raw.more_images)
    except BadImage as error:
        return Skipped(raw.source, f"its image is bad: {error}")
    return Chart(raw.id, image, code, record, raw.instruction, raw.source, raw.licence, more)


# ---------------------------------------------------------------- readers


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
        said = field(row, "conversations")
        speakers = [field(one, "from") for one in said[:2]] if isinstance(said, list) else []
        if speakers != ["human", "gpt"]:
            raise ValueError(f"its conversation does not start with human, gpt but with {speakers}")
        question = text_of(field(said[0], "value"), "instruction")
        code = code_of(field(said[1], "value"))
        identity = id_of(field(row, "id"))
        return identity, RawChart(
            file_name(str(identity)),
            (code,),
            image_path(root, field(row, "image")),
            f"Chart2Code-160k/{identity}",
            LICENCE,
            question.replace("<image>", "").strip() or INSTRUCTION,
        )

    yield from each(list_entries(path, build), bad)


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
        image = image_path(directory, f"{script.stem}.png")
        source = f"ChartMimic/{directory.name}/{script.name}"
        code = read_script(script).strip("\n")
        if not code.strip():
            raise ValueError("its code is empty")
        return script.stem, RawChart(
            file_name(script.stem), (code,), image, source, LICENCE, facts=kind_of(script.stem)
        )

    yield from each(((str(path), functools.partial(build, path)) for path in scripts), bad)


def read_plot2code(
    directory: str | os.PathLike[str], bad: list[str] | None = None, conditional: bool = False
) -> Iterator[RawChart]:
    """A Plot2Code image folder (`data/python_matplotlib/test`).

    Args:
      conditional: whether the row's `instruction`, which describes the figure in words, comes
        before the question (the benchmark's second task); else it is not used.
    """
    directory = Path(directory)
    rows = JsonLines(directory / "metadata.jsonl", ())

    def build(number: int) -> tuple[Id, RawChart]:
        row = rows[number]  # read here, so that a broken line is a bad row and not the end
        name = text_of(field(row, "file_name"), "file_name")
        said = text_of(field(row, "instruction"), "instruction").strip() if conditional else ""
        return name, RawChart(
            file_name(Path(name).stem),
            (code_of(field(row, "code")),),
            image_path(directory, name),
            f"Plot2Code/{name}",
            LICENCE,
            f"{said}\n\n{INSTRUCTION}" if said else INSTRUCTION,
        )

    yield from each(
        ((rows.where(number), functools.partial(build, number)) for number in range(len(rows))), bad
    )


def read_chartx(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    bad: list[str] | None = None,
) -> Iterator[RawChart]:
    """ChartX. A chart's title and table are among its facts.

    Args:
      path: the JSON list.
      images: the folder that `img` names are relative to; that of `path` by default.
    """
    path = Path(path)
    root = Path(images) if images is not None else path.parent

    def build(row: Any) -> tuple[Id, RawChart]:
        name = id_of(field(row, "imgname"))
        kind = text_of(field(row, "chart_type"), "chart_type")
        code = code_of(field(row, "redrawing", "output"))
        image = image_path(root, field(row, "img"))
        identity = f"{kind}-{name}"
        facts = {"kind": kind} | {
            fact: row[fact] for fact in ("title", "csv") if isinstance(row.get(fact), str)
        }
        return identity, RawChart(
            file_name(identity), (code,), image, f"ChartX/{name}", LICENCE, facts=facts
        )

    yield from each(list_entries(path, build), bad)

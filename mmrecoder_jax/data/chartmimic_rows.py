"""ChartMimic's rows: its direct and its customized task with the published instructions.

    test.jsonl        ExampleID, Task, Instruction, InputFigure, GroundTruthFigureCode
    *.tsv             index, task, question, input_figure, ground_truth_figure_code
    legacy *.jsonl    idx, file, code, instruction

A figure that is named as .pdf is read from the .png beside it. The code is a path below the folder
of the rows, or the script itself. `benchmarks.read_chartmimic` reads the folders of direct charts,
which have no instructions.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mmrecoder_jax.data.published import (
    LICENCE,
    Id,
    RawChart,
    each,
    id_of,
    image_path,
    kind_of,
    text_of,
)
from mmrecoder_jax.data.rows import JsonLines, file_name, read_script
from mmrecoder_jax.data.synthetic import INSTRUCTION
from mmrecoder_jax.data.tables import tsv_rows

CUSTOMIZED = "customized"  # in the facts of a chart, under "task"
# What each field is called in the layouts there are; the first that a row has counts.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("ExampleID", "index", "idx", "id"),
    "task": ("Task", "task"),
    "instruction": ("Instruction", "question", "instruction"),
    "image": ("InputFigure", "input_figure", "file"),
    "code": ("GroundTruthFigureCode", "ground_truth_figure_code", "code"),
}


def read_chartmimic_rows(
    path: Path,
    customized: bool,
    columns: Mapping[str, str],
    files: Path | None = None,
    bad: list[str] | None = None,
) -> Iterator[RawChart]:
    """The rows of one task. Those of the customized one have {"task": "customized"} in their facts.

    Args:
      path: a file of JSON lines or of tab-separated rows.
      customized: which task; rows that do not say their task belong to either.
      columns: names of columns by field, where they are others than `COLUMNS`.
      files: the folder that names in the rows are relative to; that of `path` by default.
    """
    names = {field: (columns[field],) if field in columns else COLUMNS[field] for field in COLUMNS}
    root = files or path.parent
    wanted = (
        (where, functools.partial(_build, root, names, customized, path.name, row))
        for where, row in _rows(path)
        if isinstance(row, ValueError) or _is_of(row, names, customized)
    )
    yield from each(wanted, bad)


def _rows(path: Path) -> Iterable[tuple[str, dict[str, Any] | ValueError]]:
    if path.suffix == ".tsv":
        yield from tsv_rows(path)
        return
    lines = JsonLines(path, ())
    for number in range(len(lines)):
        try:
            yield lines.where(number), lines[number]
        except ValueError as error:  # a broken line is a bad row and not the end
            yield lines.where(number), error


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _is_of(row: Mapping[str, Any], names: Mapping[str, tuple[str, ...]], customized: bool) -> bool:
    said = _first(row, names["task"])
    return said is None or ("custom" in str(said).lower()) == customized


def _build(
    root: Path,
    names: Mapping[str, tuple[str, ...]],
    customized: bool,
    source: str,
    row: dict[str, Any] | ValueError,
) -> tuple[Id, RawChart]:
    if isinstance(row, ValueError):
        raise row

    def value(field: str) -> Any:
        found = _first(row, names[field])
        if found is None:
            raise ValueError(
                f"it has no {field}: looked for {', '.join(names[field])}; it has {', '.join(row)}"
            )
        return found

    code = text_of(value("code"), "code")
    if code.strip().endswith(".py") and "\n" not in code.strip():
        script = image_path(root, code.strip(), "code")
        name, code = script.stem, read_script(script)
    else:
        name = ""
    if not code.strip():
        raise ValueError("its code is empty")
    figure = text_of(value("image"), "image")
    if figure.endswith(".pdf"):
        figure = figure.removesuffix(".pdf") + ".png"
    name = name or PurePosixPath(figure).stem
    said = _first(row, names["instruction"])
    if said is None and customized:
        value("instruction")
    identity = id_of(value("id"))
    return f"{name} {identity}", RawChart(
        file_name(name),
        (code.strip("\n"),),
        image_path(root, figure),
        f"ChartMimic/{source}/{identity}",
        LICENCE,
        INSTRUCTION if said is None else text_of(said, "instruction"),
        facts=kind_of(name) | ({"task": CUSTOMIZED} if customized else {}),
    )

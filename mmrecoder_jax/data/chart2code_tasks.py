"""The tasks of the benchmark Chart2Code (arXiv 2510.17932): reproduce, edit, table to chart.

Not to be taken for Chart2Code-160k, the training set.

    level            the question shows                       answered by
    1 direct         a chart                                  its code
    1 customize      a chart (style), a request, data         the data in that style
    1 figure         a chart (style), a chart (data)          the data in that style
    2 edit           a chart, a request                       the edited chart
    3 table          a chart (style), a request, a table      the table in that style

Two layouts are published. JSON lists beside the folders that their values are paths in:

    task_id, "input image", "input image_2", "input data", "input excel", "instruction",
    "GT image", "GT code"        (with blanks, also around them; the instruction is a .txt)

and parquet files, whose columns are known for direct alone: input_chart_image (a picture),
python_code, chart_type. How a question is worded is ours.
"""

import enum
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.published import LICENCE, Id, RawChart, each, id_of, image_path, text_of
from mmrecoder_jax.data.rows import RowError, file_name, json_list, read_script
from mmrecoder_jax.data.synthetic import INSTRUCTION
from mmrecoder_jax.data.tables import parquet_rows, sheets_text


class Level(enum.StrEnum):
    """The five task lists, by what is asked."""

    DIRECT = "direct"
    CUSTOMIZE = "customize"
    FIGURE = "figure"
    EDIT = "edit"
    TABLE = "table"

    @property
    def published(self) -> str:
        """The name of its list."""
        return _PUBLISHED[self]

    @property
    def answers_nothing(self) -> bool:
        """Whether an answer without code counts as one in the official pass rate (an empty file is
        written for it).
        """
        return self not in (Level.DIRECT, Level.CUSTOMIZE)


_PUBLISHED = {
    Level.DIRECT: "level1_direct",
    Level.CUSTOMIZE: "level1_customize",
    Level.FIGURE: "level1_figure",
    Level.EDIT: "level2",
    Level.TABLE: "level3",
}
# What the fields are called.
JSON_COLUMNS = {
    "id": "task_id",
    "image": "input image",
    "image_2": "input image_2",
    "data": "input data",
    "excel": "input excel",
    "instruction": "instruction",
    "code": "GT code",
}
PARQUET_COLUMNS = {"id": "task_id", "image": "input_chart_image", "code": "python_code"}
_ASKED = {
    Level.CUSTOMIZE: (
        "Write Matplotlib code that draws the data below in the style of this chart. Use no data "
        "of the chart itself.\n\nRequest:\n{request}\n\nData:\n{data}"
    ),
    Level.FIGURE: (
        "Write Matplotlib code that draws the data of the second chart in the style of the first "
        "chart.\n\nRequest:\n{request}"
    ),
    Level.EDIT: (
        "Write Matplotlib code that draws this chart with a change.\n\nRequest:\n{request}"
    ),
    Level.TABLE: (
        "Write Matplotlib code that draws the table below in the style of this chart. The script "
        "holds the table itself and opens no file.\n\nRequest:\n{request}\n\nTable:\n{data}"
    ),
}


def read_chart2code_level(
    path: Path,
    level: Level,
    columns: Mapping[str, str],
    unpacked: Path,
    files: Path | None = None,
    bad: list[str] | None = None,
) -> Iterator[RawChart]:
    """The tasks of a list, in either layout.

    Args:
      path: a .json or .parquet file.
      columns: names of columns by field, where they are others than those above.
      unpacked: a folder that pictures inside a parquet file are written to.
      files: the folder that paths are relative to; that of `path` by default.

    Raises:
      RowError: the columns of this file are not known.
    """
    root = files or path.parent
    if path.suffix != ".parquet":
        names = JSON_COLUMNS | dict(columns)
        entries = (
            (f"{path} row {number}", functools.partial(_build, root, unpacked, names, level, row))
            for number, row in enumerate(json_list(path))
        )
        yield from each(entries, bad)
        return
    names = PARQUET_COLUMNS | dict(columns)
    missing = {"instruction"} - set(names) if level is not Level.DIRECT else set()
    if missing:
        raise RowError(
            f"{path}: the parquet columns of {level.published} are not known: name them, e.g. "
            "--columns=instruction=COLUMN,image_2=COLUMN,data=COLUMN, or give the JSON layout"
        )
    entries = (
        (where, functools.partial(_build, root, unpacked, names, level, row))
        for where, row in parquet_rows(path)
    )
    yield from each(entries, bad)


def _build(
    root: Path, unpacked: Path, names: Mapping[str, str], level: Level, row: Any
) -> tuple[Id, RawChart]:
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}, not an object")
    row = {str(name).strip(): value for name, value in row.items()}

    def value(field: str) -> Any:
        column = names.get(field)
        found = None if column is None else row.get(column)
        if found is None or found == "":
            raise ValueError(f"it has no {column or field!r}; it has {', '.join(map(repr, row))}")
        return found

    def words(field: str) -> str:
        """A text, or that of the file which the value names."""
        found = text_of(value(field), field)
        one_line = "\n" not in found.strip()
        if one_line and found.strip().endswith((".txt", ".csv", ".json", ".py", ".md")):
            path = image_path(root, found.strip(), field)
            return read_script(path) if path.suffix == ".py" else _read_text(path)
        return found

    identity = id_of(value("id"))
    code = words("code")
    if not code.strip():
        raise ValueError("its code is empty")
    said = row.get(names["code"])
    is_path = isinstance(said, str) and said.strip().endswith(".py")
    name = Path(said.strip()).stem if is_path else str(identity)

    def picture(field: str) -> Path:
        found = value(field)
        if isinstance(found, dict):  # of a parquet file
            data = found.get("bytes")
            if not isinstance(data, bytes):
                raise ValueError(f"its {field} holds no picture")
            unpacked.mkdir(parents=True, exist_ok=True)
            path = unpacked / f"{file_name(name)}-{field}.png"
            path.write_bytes(data)
            return path
        return image_path(root, found, field)

    more = (picture("image_2"),) if level is Level.FIGURE else ()
    asked = INSTRUCTION
    if level is not Level.DIRECT:
        data = ""
        if level is Level.CUSTOMIZE:
            data = words("data").strip()
        elif level is Level.TABLE:
            data = _table(root, row, names, words).strip()
        asked = _ASKED[level].format(request=words("instruction").strip(), data=data)
    facts = {"kind": level.published, "task": str(level)}
    return f"{name} {identity}", RawChart(
        file_name(name),
        (code.strip("\n"),),
        picture("image"),
        f"Chart2Code/{level.published}/{identity}",
        LICENCE,
        asked,
        more,
        facts,
    )


def _table(root: Path, row: Mapping[str, Any], names: Mapping[str, str], words: Any) -> str:
    """The table of a level-3 task: CSV text, or a spreadsheet as text."""
    for field in ("excel", "data"):
        found = row.get(names.get(field, ""))
        if isinstance(found, str) and found.strip():
            if found.strip().endswith((".xlsx", ".xlsm")):
                return sheets_text(image_path(root, found.strip(), field))
            return words(field)
    raise ValueError(
        f"it has no table: looked for {names.get('excel')!r} and {names.get('data')!r}"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no text: {error}") from error

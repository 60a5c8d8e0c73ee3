"""Tables of others: tab-separated rows, parquet files, spreadsheets.

Parquet needs pyarrow and spreadsheets need openpyxl. Nothing else here does, so neither is a
dependency: where one is missing, the error says what to install.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.rows import RowError

_LONGEST_FIELD = 1 << 26  # characters: a script, or a picture in base64

Rows = Iterator[tuple[str, dict[str, Any]]]  # (what messages call a row, the row)


def tsv_rows(path: Path) -> Rows:
    """The rows of a tab-separated file whose first line names its columns.

    Raises:
      RowError: it is no such file; names it, and the line where it can.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise RowError(f"{where} has another number of columns than the first line")
                yield where, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise RowError(f"{path} is no tab-separated text: {error}") from error


def parquet_rows(path: Path) -> Rows:
    """The rows of a parquet file; an image column gives {"bytes", "path"}.

    Raises:
      RowError: pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise RowError(
            f"{path} is parquet, and that needs pyarrow: `pip install pyarrow`, or give the JSON "
            "layout of the data set"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these types
        raise RowError(f"{path} cannot be read as parquet: {error}") from error


def sheets_text(path: Path) -> str:
    """A spreadsheet as text: each sheet as CSV under a line "Sheet: <name>".

    Raises:
      ValueError: openpyxl is missing, or the file is damaged.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(
            f"its table {path} is a spreadsheet, and that needs openpyxl: `pip install openpyxl`"
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zipfile, XML and openpyxl each have errors of their own
        raise ValueError(f"its table {path} is no spreadsheet: {error}") from error
    parts = []
    for sheet in book.worksheets:
        text = io.StringIO()
        rows = ([("" if cell is None else cell) for cell in row] for row in sheet.values)
        csv.writer(text, lineterminator="\n").writerows(rows)
        parts.append(f"Sheet: {sheet.title}\n{text.getvalue()}")
    book.close()
    return "\n".join(parts)

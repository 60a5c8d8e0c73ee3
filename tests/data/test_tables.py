"""Tables of others: tab-separated rows, and what is said where a library is missing."""

import sys

import pytest

from mmrecoder_jax.data.rows import RowError
from mmrecoder_jax.data.tables import parquet_rows, sheets_text, tsv_rows


def test_tab_separated_rows(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes('\ufeffindex\tquestion\n1\t"two\nlines"\n2\tplain\n'.encode())
    assert list(tsv_rows(path)) == [
        (f"{path} line 3", {"index": "1", "question": "two\nlines"}),
        (f"{path} line 4", {"index": "2", "question": "plain"}),
    ]


def test_long_fields_are_read(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("index\tcode\n1\t" + "x" * 1_000_000 + "\n")
    ((_, row),) = tsv_rows(path)
    assert len(row["code"]) == 1_000_000


@pytest.mark.parametrize("line", [b"1\n", b"1\t2\t3\n", b"\xff\xfe\t1\n"])
def test_rows_that_are_none(tmp_path, line):
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"index\tquestion\n" + line)
    with pytest.raises(RowError, match=r"rows\.tsv"):
        list(tsv_rows(path))


def test_what_to_install_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(RowError, match="pip install pyarrow"):
        list(parquet_rows(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match="pip install openpyxl"):
        sheets_text(tmp_path / "x.xlsx")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"a": [1, 2], "image": [{"bytes": b"x"}, None]}), path)
    assert list(parquet_rows(path)) == [
        (f"{path} row 0", {"a": 1, "image": {"bytes": b"x"}}),
        (f"{path} row 1", {"a": 2, "image": None}),
    ]
    path.write_bytes(b"no parquet")
    with pytest.raises(RowError, match="cannot be read as parquet"):
        list(parquet_rows(path))


def test_spreadsheets(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "Rain"
    book.active.append(["month", "mm"])
    book.active.append(["Jan, early", 3.5])
    book.create_sheet("Snow").append([None, 1])
    path = tmp_path / "x.xlsx"
    book.save(path)
    assert sheets_text(path) == ('Sheet: Rain\nmonth,mm\n"Jan, early",3.5\n\nSheet: Snow\n,1\n')
    path.write_bytes(b"no spreadsheet")
    with pytest.raises(ValueError, match="is no spreadsheet"):
        sheets_text(path)

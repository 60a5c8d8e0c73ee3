"""Rows of JSON files, names of charts, and scripts as they are met in downloads."""

import json
import pickle

import pytest

from mmrecoder_jax.data.rows import (
    Fields,
    JsonLines,
    file_name,
    json_list,
    json_object,
    read_script,
    slug,
)

ROWS = [{"id": "a", "n": 1}, {"n": 2, "id": "b"}, {"id": "c", "n": 3}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def lines_of(tmp_path, data: bytes, required=("id",)) -> JsonLines:
    (tmp_path / "rows.jsonl").write_bytes(data)
    return JsonLines(tmp_path / "rows.jsonl", required)


@pytest.mark.parametrize(
    "data",
    [
        LINES,
        b"\xef\xbb\xbf" + LINES,
        LINES.replace(b"\n", b"\r\n"),
        LINES.rstrip(b"\n"),
        b"\n  \n" + LINES.replace(b"\n", b"\n\n") + b"\r\n",
        b"\xef\xbb\xbf\n" + LINES,
    ],
    ids=["plain", "mark", "crlf", "no end", "blank", "mark alone"],
)
def test_lines_as_editors_leave_them(tmp_path, data):
    rows = lines_of(tmp_path, data)
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert pickle.loads(pickle.dumps(rows))[1] == ROWS[1]


def test_lines_keep_their_numbers(tmp_path):
    rows = lines_of(tmp_path, b"\n" + LINES + b"\n[1]\n{\n")
    assert rows.where(0).endswith("rows.jsonl line 2")
    with pytest.raises(ValueError, match=r"rows\.jsonl line 6 is not an object but list"):
        rows[3]
    with pytest.raises(ValueError, match=r"rows\.jsonl line 7 is not JSON"):
        rows[4]


def test_an_id_is_there_once(tmp_path):
    again = b'{"n": 0, "id": "\\u0061"}\n{"id": "\\u0061"}\n'
    rows = lines_of(tmp_path, LINES + again)
    for index in (3, 4):
        with pytest.raises(ValueError, match=rf"line {index + 1} has the id 'a' of line 1"):
            rows[index]
    assert lines_of(tmp_path, LINES + again, ())[4] == {"id": "a"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (json.dumps(ROWS).encode(), r"line 1 begins a JSON list, but one object per line.*jq -c"),
        (json.dumps(ROWS, indent=1).encode(), "line 1 begins a JSON list"),
        (b"\xef\xbb\xbf\n[\n" + LINES, "line 2 begins a JSON list"),
        (LINES.decode().encode("utf-16"), "line 1 begins as UTF-16"),
    ],
)
def test_files_that_hold_no_lines(tmp_path, data, message):
    with pytest.raises(ValueError, match=rf"rows\.jsonl {message}"):
        lines_of(tmp_path, data)


def test_lists_and_objects(tmp_path):
    path = tmp_path / "a.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(json.dumps(ROWS).encode(encoding))
        assert json_list(path) == ROWS
    with pytest.raises(ValueError, match=r"a\.json is not a JSON object but list"):
        json_object(path)
    path.write_bytes(LINES)
    with pytest.raises(ValueError, match=r"a\.json is not JSON: .*line 2 begins.*jq -s"):
        json_list(path)
    for text in ('{"a": 1', "", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is not JSON"):
            json_object(path)


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (lambda row: row.text("x"), None, "x is null, not text"),
        (lambda row: row.text("x"), ["a"], "x is list"),
        (lambda row: row.text("x"), " ", "x is empty"),
        (lambda row: row.text("x"), "\ud83d", "x holds half"),
        (lambda row: row.texts("x"), "ab", "x is str 'ab', not a list"),
        (lambda row: row.texts("x"), ["a", None], "an entry of x is null"),
        (lambda row: row.number("x"), float("nan"), "x is nan"),
        (lambda row: row.number("x"), True, "x is bool"),
        (lambda row: row.index("x", 3), 3, "x is 3, there are rows 0 to 2"),
        (lambda row: row.index("x", 3), -1, "x is -1"),
        (lambda row: row.index("x", 3), "1", "x is str '1', not a row number"),
        (lambda row: row.index("x", 3), 1.0, "x is float"),
    ],
)
def test_fields(read, value, message):
    with pytest.raises(ValueError, match=f"^f line 3: {message}"):
        read(Fields({"x": value}, "f line 3"))


def test_fields_that_fit():
    row = Fields({"a": "", "b": ["", "x"], "c": 0.5, "d": 2}, "f line 1")
    assert row.text("a", empty=True) == "" and row.texts("b") == ("", "x")
    assert row.number("c") == 0.5 and row.index("d", 3) == 2


def test_names_of_files():
    plain = ["bar_1", "3d_1", "HR_1", "a.b-c", "7"]
    assert [file_name(name) for name in plain] == plain
    odd = ["图表_1", "柱状图_1", "图", "a/b", "a\\b", "", "..", ".a", "-a", "x" * 200 + "1"]
    odd += ["x" * 200 + "2", "a\n", "\ud83d", "ü"]
    names = [file_name(name) for name in odd]
    assert len({*names, *plain}) == len(odd) + len(plain)
    assert all(file_name(name) == name for name in names), "a name stays one"
    assert file_name("a b") == "a_b"
    assert slug("../a b/ü.png") == "_a_b_.png"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x = 1\n", "x = 1\n"),
        (b"\xef\xbb\xbfx = 1\r\n", "x = 1\n"),
        (b"# -*- coding: latin-1 -*-\nx = 'Caf\xe9'\n", "# -*- coding: utf-8 -*-\nx = 'Café'\n"),
        (
            b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\n'\x80'",
            "#!/usr/bin/python\n# vim: set fileencoding=utf-8 :\n'€'",
        ),
        ("# coding: utf-8\n'图'\n# coding: x".encode(), "# coding: utf-8\n'图'\n# coding: x"),
    ],
)
def test_scripts_are_read_as_python_reads_them(tmp_path, data, text):
    (tmp_path / "a.py").write_bytes(data)
    assert read_script(tmp_path / "a.py") == text


@pytest.mark.parametrize(
    "data",
    [b"'\xe9'\n", b"# coding: no-such-thing\n", b"# coding: ascii\n'\xc3\xa9'", b"\xff\xfex"],
)
def test_scripts_that_cannot_be_read_are_named(tmp_path, data):
    (tmp_path / "a.py").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.py cannot be read: "):
        read_script(tmp_path / "a.py")

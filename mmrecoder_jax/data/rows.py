"""Rows of JSON files and their fields, with errors that name file and line.

Everything here reads what people merged, edited and downloaded by hand: byte-order marks, CRLF,
blank lines and cut ends are met sooner or later. What has one meaning is read (a mark, CRLF, a
blank line); everything else is a `RowError`.
"""

import codecs
import hashlib
import json
import math
import os
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# Where our writers put the id: then no line must be parsed to know it.
_ID_FIRST = re.compile(rb'\s*\{\s*"id"\s*:\s*("(?:[^"\\]|\\.)*")')
_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,149}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_COOKIE = re.compile(r"^([ \t\f]*#.*?coding[:=][ \t]*)[-\w.]+", re.ASCII)  # PEP 263


class RowError(ValueError):
    """A file of rows, a row or a field that cannot be read; names the file and mostly the line."""


# ---------------------------------------------------------------- files


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      RowError: it holds none; names the file.
    """
    value = _json(path)
    if not isinstance(value, dict):
        raise RowError(f"{path} is not a JSON object but {type(value).__name__}")
    return value


def json_list(path: Path) -> list[Any]:
    """The list that a JSON file holds.

    Raises:
      RowError: it holds none; names the file, and the remedy for JSON lines.
    """
    value = _json(path)
    if not isinstance(value, list):
        raise RowError(f"{path} is not a JSON list but {type(value).__name__}")
    return value


def _json(path: Path) -> Any:
    data = path.read_bytes()
    try:
        return json.loads(data)  # knows UTF-8 with and without a mark, UTF-16 and UTF-32
    except (ValueError, RecursionError) as error:
        remedy = ""
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            remedy = (
                f": line {error.lineno} begins another value. Are these JSON lines? They become "
                f"a list with `jq -s . {path.name}`"
            )
        raise RowError(f"{path} is not JSON: {error}{remedy}") from error


class JsonLines:
    """Random access to the rows of a JSON-lines file; blank lines are no rows.

    Only the places of the lines are held in memory, so 160 000 charts cost a few megabytes. The
    object can be pickled, as grain's worker processes ask.

    Args:
      required: fields that every row must have.
      unique: with "id" among them, each id may be there once.

    Raises:
      FileNotFoundError: no such file.
      RowError: a file that does not hold lines of UTF-8, at once; a row that is not an object
        with the required fields, when it is read. Both name file and line.
    """

    def __init__(self, path: str | os.PathLike[str], required: Iterable[str], unique: bool = True):
        self.path = Path(path)
        self.required = tuple(required)
        self._repeats: dict[int, str] = {}  # row -> what is said of it
        places: list[tuple[int, int, int]] = []
        ids: dict[str, int] = {}  # -> the line of its first row
        start = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                end = start + len(line)
                if number == 1:
                    self._check_start(line)
                    if line.startswith(codecs.BOM_UTF8):
                        start += len(codecs.BOM_UTF8)
                        line = line[len(codecs.BOM_UTF8) :]
                if line.strip():
                    if not places:
                        self._check_list(line, number)
                    name = _id_of(line) if unique and "id" in self.required else None
                    if name is not None and ids.setdefault(name, number) != number:
                        self._repeats[len(places)] = f"has the id {name!r} of line {ids[name]}"
                    places.append((start, end, number))
                start = end
        self._places = np.array(places, np.int64).reshape(-1, 3)

    def _check_start(self, line: bytes) -> None:
        if line.startswith(_MARKS):
            raise RowError(f"{self.path} line 1 begins as UTF-16 or UTF-32: save it as UTF-8")

    def _check_list(self, line: bytes, number: int) -> None:
        """Raises ValueError where the first line begins a list that fills the file."""
        if not line.lstrip().startswith(b"["):
            return
        try:
            rows = json.loads(line)
        except (ValueError, RecursionError):
            rows = [{}]  # it goes on in the next lines
        if isinstance(rows, list) and any(isinstance(row, dict) for row in rows):
            raise RowError(
                f"{self.path} line {number} begins a JSON list, but one object per line is "
                f"wanted: `jq -c '.[]' {self.path.name}` writes them"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, there is no row {index}")
        start, end, _ = map(int, self._places[index])
        # Opened anew: an open file cannot be pickled, and threads would share its position.
        with open(self.path, "rb") as file:
            file.seek(start)
            line = file.read(end - start)
        where = self.where(index)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RowError(f"{where} is not an object but {type(row).__name__}")
        missing = [name for name in self.required if name not in row]
        if missing:
            raise RowError(f"{where} lacks {', '.join(missing)}; it has {', '.join(row)}")
        if index in self._repeats:
            raise RowError(f"{where} {self._repeats[index]}")
        return row

    def mentioning(self, field: str) -> list[int]:
        """Numbers of the rows in whose text a field's name is; others need not be parsed."""
        name, found = json.dumps(field).encode(), []
        with open(self.path, "rb") as file:
            for index, (start, end, _) in enumerate(self._places.tolist()):
                file.seek(start)
                if name in file.read(end - start):
                    found.append(index)
        return found

    def digest(self) -> str:
        """Another text when the rows are others, wherever the file is."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path} line {self.line(index)}"

    def line(self, index: int) -> int:
        """The number of a row's line; the first line of the file is 1."""
        return int(self._places[index][2])

    def stamp(self) -> str:
        """Another text when the file is another or has changed."""
        state = self.path.stat()
        return f"{self.path.resolve()} {state.st_size} {state.st_mtime_ns}"


def _id_of(line: bytes) -> str | None:
    """The id of a row; None where it has none that is text, or is no row."""
    match = _ID_FIRST.match(line)
    try:
        value = json.loads(match[1]) if match else json.loads(line)["id"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None  # reading the row will say so
    return value if isinstance(value, str) else None


# ---------------------------------------------------------------- fields


class Fields:
    """Checked fields of a row; every method raises a RowError that names row and field.

    Args:
      where: what messages call the row: file and line.
    """

    def __init__(self, row: dict[str, Any], where: str):
        self.row, self.where = row, where

    def text(self, name: str, empty: bool = False) -> str:
        """A text; `empty` ones only where they are allowed."""
        return self._text(self.row[name], name, empty)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, which may be empty ones."""
        return tuple(self._text(value, f"an entry of {name}", True) for value in self.list_of(name))

    def list_of(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self.row[name]
        if not isinstance(value, list):
            raise RowError(f"{self.where}: {name} is {_kind(value)}, not a list")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.row[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RowError(f"{self.where}: {name} is {_kind(value)}, not a number")
        if not math.isfinite(value):
            raise RowError(f"{self.where}: {name} is {value}, not a finite number")
        return value

    def index(self, name: str, count: int) -> int:
        """A whole number from 0 to `count` - 1."""
        value = self.row[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise RowError(f"{self.where}: {name} is {_kind(value)}, not a row number")
        if not 0 <= value < count:
            raise RowError(f"{self.where}: {name} is {value}, there are rows 0 to {count - 1}")
        return value

    def _text(self, value: Any, name: str, empty: bool) -> str:
        if not isinstance(value, str):
            raise RowError(f"{self.where}: {name} is {_kind(value)}, not text")
        if not empty and not value.strip():
            raise RowError(f"{self.where}: {name} is empty")
        if not is_unicode(value):
            raise RowError(f"{self.where}: {name} holds half of a surrogate pair")
        return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def is_unicode(text: str) -> bool:
    r"""Whether a text can be written as UTF-8.

    JSON may hold half of a surrogate pair (`\ud83d`).
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------- names and scripts


def file_name(identity: str) -> str:
    """An id as a file name: itself where it is one, else what is left of it with a hash.

    Two ids that become the same name differ in nothing but spaces and underscores.

    >>> file_name("bar_1"), file_name("bar 1"), file_name("bar/1")
    ('bar_1', 'bar_1', 'bar_1-a9757152da')
    """
    plain = identity.replace(" ", "_")
    return plain if _PLAIN.fullmatch(plain) else hashed_name(identity)


def hashed_name(identity: str) -> str:
    """A file name that no other text gets, whatever characters are in them."""
    # surrogatepass: halves of pairs are ids too
    digest = hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{slug(identity, 80) or 'id'}-{digest}"


def slug(text: str, length: int = 150) -> str:
    """`text` with runs of other characters than letters, digits, '.', '_' and '-' as one '_'.

    Different texts may become the same.
    """
    # A leading dot would hide the file, a leading dash reads as a flag; 255 bytes is what file
    # systems take, and ids get prefixes and suffixes.
    return _UNSAFE.sub("_", text).lstrip(".-")[:length]


def read_script(path: Path) -> str:
    """The text of a Python file as Python reads it: byte-order mark, PEP 263 cookie, CRLF.

    The cookie of the text says utf-8, whatever the file's said: that is how the text is written.

    Raises:
      RowError: the file is in no encoding, or not in the one that it says; names the file.
    """
    try:
        with tokenize.open(path) as file:
            text = file.read()
    except (SyntaxError, ValueError, OSError) as error:
        raise RowError(f"{path} cannot be read: {error}") from error
    lines = text.split("\n")
    lines[:2] = [_COOKIE.sub(r"\1utf-8", line) for line in lines[:2]]
    return "\n".join(lines)

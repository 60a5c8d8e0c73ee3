"""What the readers of published data share: a chart whose code has not been run, and its fields.

A bad field raises a ValueError. `each` says which file and row it is of; where its caller passes a
list as `bad`, the message goes there and reading goes on (published files hold bad rows).

An id keeps its identity: one that is no file name gets a hash (`rows.file_name`), and so does the
second of two that would share a name: the text "7" after the number 7, "a_b" after "a b", and "a"
after "A", which some file systems cannot tell apart. Only a row whose id was there before, the very
same, is a bad one.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmrecoder_jax.data.rows import hashed_name, is_unicode, json_list
from mmrecoder_jax.data.synthetic import INSTRUCTION
from mmrecoder_jax.env.response import answer_code

LICENCE = "as published with the data set"


@dataclasses.dataclass(frozen=True)
class RawChart:
    """A chart whose code has not been run.

    Attributes:
      codes: scripts that are tried in turn until one draws.
      image: a file; None for the code's own render.
      more_images: files that the question shows behind it.
      facts: what else the row says, for whoever scores answers to it.
    """

    id: str
    codes: tuple[str, ...]
    image: Path | None
    source: str
    licence: str
    instruction: str = INSTRUCTION
    more_images: tuple[Path, ...] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def image_path(root: Path, name: Any, what: str = "image") -> Path:
    """The file of a name in a published list; raises ValueError for one that is none below `root`.

    Args:
      what: the row calls it.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"its {what} is {name!r}, not a relative path")
    try:
        path = (root / name).resolve()  # a published list may name anything, links included
        if not path.is_relative_to(root.resolve()):
            raise ValueError(f"its {what} {name} is outside {root}")
        there = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        raise ValueError(f"its {what} {name[:80]} cannot be looked up: {error}") from error
    if not there:
        raise ValueError(f"its {what} {path} is not there")
    return path


def field(row: Any, *names: str) -> Any:
    """row[names[0]][names[1]]...; raises ValueError that says which field is missing."""
    value = row
    for i, name in enumerate(names):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"it has no field {'.'.join(names[: i + 1])}")
        value = value[name]
    return value


def text_of(value: Any, what: str) -> str:
    """A text that can be written; raises ValueError for another value."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"its {what} is {kind}, not text")
    if not is_unicode(value):
        raise ValueError(f"its {what} holds half of a surrogate pair")
    return value


def code_of(value: Any) -> str:
    """The code of an answer (`response.answer_code`); raises ValueError for no code."""
    found = answer_code(text_of(value, "code"))
    if not found.strip():
        raise ValueError("its code is empty")
    return found.strip("\n")


Id = str | int | float


def id_of(value: Any) -> Id:
    """An id as it is in the file; raises ValueError for what is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"its id is {json.dumps(value)[:80]}, neither text nor a number")
    return value


def kind_of(name: str) -> dict[str, str]:
    """The facts that a name like "bar_12" says: the kind before its number.

    >>> kind_of("bar_12"), kind_of("bar")
    ({'kind': 'bar'}, {'kind': 'bar'})
    """
    return {"kind": re.sub(r"_\d+$", "", name)}


# (what messages call a row, what reads it): the id as it is in the file, and the chart under
# `file_name(str(id))`. Reading may raise ValueError.
Entry = tuple[str, Callable[[], tuple[Id, RawChart]]]


def each(entries: Iterable[Entry], bad: list[str] | None) -> Iterator[RawChart]:
    """The charts of the entries, each under a name of its own."""
    seen: set[str] = set()  # ids as JSON, which tells 7 from "7"
    names: set[str] = set()  # in lower case, as some file systems know them
    for where, read in entries:
        try:
            own, raw = read()
            key = json.dumps(own)
            if key in seen:
                raise ValueError(f"its id {own} was there before")
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


def list_entries(path: Path, build: Callable[[Any], tuple[Id, RawChart]]) -> Iterator[Entry]:
    """The entries of a JSON list."""
    for number, row in enumerate(json_list(path)):
        yield f"{path} row {number}", functools.partial(build, row)

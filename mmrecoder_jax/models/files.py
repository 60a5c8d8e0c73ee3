"""Files of published directories that are not what their name says; needs the standard library."""

import json
import os
import pathlib
from typing import Any


class CheckpointError(ValueError):
    """A published directory that cannot be read rightly.

    The message is one line with the file or field, its value, and the remedy.
    """


# What a file's first bytes say that it is, and what to do about it
_AGAIN = "download the file again"
_STAND_INS = (
    (
        b"version https://git-lfs.github.com/",
        "a git-lfs pointer, not the file: run `git lfs pull` in the clone, or download it with "
        "`hf download`",
    ),
    (b"<!doctype", f"a web page, not the file: {_AGAIN}"),
    (b"<html", f"a web page, not the file: {_AGAIN}"),
    (b"<?xml", f"an XML answer of a server, not the file: {_AGAIN}"),
)


def read_bytes(path: pathlib.Path, count: int = -1) -> bytes:
    """The first `count` bytes of a file, or all.

    Raises:
      FileNotFoundError: there is no such file; the message says what is there instead.
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path}: a link to {os.readlink(path)}, which is missing; copy the directory with "
            "`cp -rL`, which copies files instead of links"
        )
    if path.is_dir():
        raise FileNotFoundError(f"{path}: a directory where a file should be; {_AGAIN}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this file is missing; copy or download it again")
    with path.open("rb") as file:
        return file.read(count)


def check_kind(path: pathlib.Path) -> None:
    """Raises CheckpointError for an empty file, a git-lfs pointer or a server's page.

    Raises:
      FileNotFoundError: there is no such file.
    """
    start = read_bytes(path, 512)
    if not start:
        raise CheckpointError(f"{path}: an empty file; {_AGAIN}")
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what in _STAND_INS:
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {what}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; a byte-order mark before it is accepted.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is no JSON, or another value than an object.
    """
    check_kind(path)
    return parse_object(read_bytes(path), str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; raises CheckpointError, with `where` in front, for all else."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: no UTF-8 text ({error}); {_AGAIN}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: no JSON, or cut short ({error}); {_AGAIN}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; nesting
        raise CheckpointError(f"{where}: JSON that cannot be read ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: holds {shown(value)}, a JSON object is needed (`{{...}}`); {_AGAIN}"
        )
    return value


def shown(value: object) -> str:
    """A value for a message: its JSON, shortened to stay on one line."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def few(names: Any) -> str:
    """The first five names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

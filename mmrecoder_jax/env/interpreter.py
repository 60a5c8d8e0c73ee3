"""The Python of the executors: the trainer's own, or one of an environment for charts.

Scripts draw with what that Python has installed. The benchmarks' numbers were published under
certain releases (`official_requirements.txt`, beside this file); `setup.py` makes an environment
that has them, and the trainer needs no release in particular.
"""

import dataclasses
import functools
import json
import os
import re
import site
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmrecoder_jax.env import about

REQUIREMENTS = Path(__file__).with_name("official_requirements.txt")
SETUP = "python -m mmrecoder_jax.env.setup --out=DIR"
_NEEDED = {"numpy": "1.26", "matplotlib": "3.8.4"}  # the oldest release of each
_ABOUT_SECONDS = 60.0


class InterpreterError(ValueError):
    """A Python that executors cannot run on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python that executors run on.

    Attributes:
      path: the program.
      version: such as "3.11.7".
      releases: of the libraries of `about.LIBRARIES` that it has, by name.
      reads: folders and files that an executor on it reads, outer ones first.
    """

    path: str
    version: str
    releases: Mapping[str, str]
    reads: tuple[str, ...]

    def unpublished(self) -> list[str]:
        """In words, the releases that are not those of the published numbers.

        ["numpy 2.1.0 (published: 1.26.1)", "squarify is missing (published: 0.4.3)"]
        """
        return [
            f"{name} {self.releases.get(name, 'is missing')} (published: {' or '.join(right)})"
            for name, right in published().items()
            if name in about.LIBRARIES and self.releases.get(name) not in right
        ]


@functools.cache
def find(python: str, field: str = "env.python") -> Interpreter:
    """`examine`, once for each interpreter."""
    return examine(python, field)


def examine(python: str, field: str = "env.python") -> Interpreter:
    """The interpreter of that path; the trainer's own where it is empty.

    Args:
      field: what the user calls the setting.

    Raises:
      InterpreterError: executors cannot run on it.
    """
    where = f"{field}={python!r}" if python else f"{sys.executable} (set {field} to use another)"
    facts = _ask(python, where) if python else about.about()
    version = ".".join(map(str, facts["version"]))
    if tuple(facts["version"]) < about.LEAST_PYTHON:
        least = ".".join(map(str, about.LEAST_PYTHON))
        raise InterpreterError(
            f"{where} is Python {version}, and executors need {least} or newer: {_remedy()}"
        )
    releases = facts["releases"]
    for name, least in _NEEDED.items():
        if name not in releases:
            raise InterpreterError(
                f"{where} has no {name}, and executors need {_all()}: {_remedy()}"
            )
        if _numbers(releases[name]) < _numbers(least):
            raise InterpreterError(
                f"{where} has {name} {releases[name]}, and executors need {_all()}: {_remedy()}"
            )
    # Absolute, as an executor starts in a folder of its own; a link stays one, as it says whose
    # packages these are.
    path = os.path.abspath(python or sys.executable)
    return Interpreter(path, version, releases, tuple(facts["reads"]))


def _ask(python: str, where: str) -> dict[str, Any]:
    path = Path(python)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InterpreterError(
            f"{where} {kind}: name the program, such as DIR/bin/python ({SETUP})"
        )
    if not os.access(path, os.X_OK):
        raise InterpreterError(f"{where} cannot be run by this user: {_remedy()}")
    try:
        done = subprocess.run(
            [python, "-B", *user_site_flags(), about.__file__],
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUSERBASE": site.getuserbase()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ABOUT_SECONDS,
            check=True,
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        raise InterpreterError(f"{where} is no Python 3 that runs here: {_remedy()}") from problem


def user_site_flags() -> list[str]:
    """Python's flags for an executor: it sees the user's own packages where the trainer does."""
    return [] if site.ENABLE_USER_SITE else ["-s"]


@functools.cache
def published() -> dict[str, tuple[str, ...]]:
    """The releases that the benchmarks' numbers were published under, by name.

    Two where a library has one for each Python.
    """
    found: dict[str, tuple[str, ...]] = {}
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)
        if match:
            found[match[1]] = (*found.get(match[1], ()), match[2])
    return found


def _remedy() -> str:
    return f"make an environment with `{SETUP}` and name DIR/bin/python"


def _all() -> str:
    return " and ".join(f"{name}>={least}" for name, least in _NEEDED.items())


def _numbers(release: str) -> tuple[int, ...]:
    """The leading numbers of a release: (3, 11, 0) for "3.11.0rc1"."""
    leading = re.sub(r"[^\d.].*", "", release)
    return tuple(map(int, leading.strip(".").split(".")))

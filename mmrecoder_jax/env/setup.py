"""Makes a Python environment with the releases that the benchmarks' numbers were published under.

    python -m mmrecoder_jax.env.setup --out=DIR
    python -m mmrecoder_jax.env.score --python=DIR/bin/python --mode official ...

The releases are those of `official_requirements.txt`, beside this file. They need Python 3.11 or
3.12: this one where it is one of them, else one on the path. 3.11 comes first: what Plot2Code's
evaluator runs inside a function fails in comprehensions up to 3.11, as it did for the published
numbers. Nothing is done where DIR is ready; given again after a failure, the command goes on.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mmrecoder_jax.command import Parser, ending_in_one_line
from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.env import interpreter

_MARK = "made-by-mmrecoder"  # in an environment of ours: no other is written to
_COLLECTING = r"(?:Collecting|Obtaining dependency information for) ([A-Za-z0-9._-]+)=="
_PYTHONS = ((3, 11), (3, 12))  # best first; the releases have no wheels for others


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = Parser(prog="python -m mmrecoder_jax.env.setup", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="the environment's folder")
    parser.add_argument("--python", default="", help="the Python 3.11 or 3.12 that it is made of")
    args = parser.parse_args(argv)
    with ending_in_one_line(args.traceback):
        out = Path(args.out).absolute()
        program = out / "bin" / "python"
        if is_ready(program):
            print(f"{args.out} is ready")
        else:
            make(out, args.python)
        print(f"use it with --python={program} (score) or --config.env.python={program} (train)")
    return 0


def is_ready(program: Path) -> bool:
    """Whether that interpreter has all the published releases."""
    try:
        return not interpreter.examine(str(program)).unpublished()
    except interpreter.InterpreterError:
        return False


def make(out: Path, python: str) -> None:
    """Makes the environment, and says how far it is.

    Args:
      out: a folder that is empty or not there, or one that this command has begun.
      python: what it is made of; "": what `_choose` finds.

    Raises:
      ConfigError: it cannot be made.
    """
    program, mark = out / "bin" / "python", out / _MARK
    if out.exists() and not mark.is_file() and not _is_empty(out):
        raise ConfigError(f"--out={out} holds something else: name a new folder")
    chosen = _choose(python)
    print(f"making {out} of {chosen}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for _ in _lines([chosen, "-m", "venv", str(out)], out):
        pass
    names = [line.partition("==")[0] for line in _requirements()]
    count = len(set(names))
    pip = [str(program), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    collected: set[str] = set()
    for line in _lines([*pip, "-r", str(interpreter.REQUIREMENTS)], out):
        if match := re.match(_COLLECTING, line):
            collected.add(match[1].lower())
            done = len(collected & set(names))
            _show(f"[{'#' * (30 * done // count):<30}] {done}/{count} {match[1]}")
        elif line.startswith("Installing collected packages"):
            _show("installing")
    print()
    if missing := interpreter.examine(str(program)).unpublished():
        raise ConfigError(f"--out={out} has {', '.join(missing)}: remove it and start again")


def _choose(python: str) -> str:
    """The Python to make it of.

    Raises:
      ConfigError: that one will not do, or there is none.
    """
    if python:
        if _version(python) not in _PYTHONS:
            raise ConfigError(f"--python={python!r} is no Python 3.11 or 3.12 that runs here")
        return python
    for version in _PYTHONS:
        for candidate in (sys.executable, shutil.which(f"python{version[0]}.{version[1]}")):
            if candidate and _version(candidate) == version:
                return candidate
    own = ".".join(map(str, sys.version_info[:2]))
    raise ConfigError(
        f"the published releases cannot be installed on Python {own}, and no other is on the path: "
        "install Python 3.11 or 3.12 and name it with --python="
    )


def _version(python: str) -> tuple[int, ...] | None:
    """(3, 11) of a program; None where it does not run."""
    code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60
        )
        return tuple(map(int, done.stdout.split()))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _lines(command: list[str], out: Path) -> Iterator[str]:
    """What a command prints, line by line; raises ConfigError with its last error."""
    # Variables of this environment must not lead into another one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    error = ""
    with subprocess.Popen(
        command,
        env=own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            error = line.strip() if "error" in line.lower() or not error else error
            yield line.strip()
    if process.returncode:
        raise ConfigError(
            f"--out={out} cannot be made: {error or 'no reason was given'}; a package index must "
            "be in reach, and the disk have 600 MB; the same command goes on"
        )


def _requirements() -> list[str]:
    lines = interpreter.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _show(text: str) -> None:
    print(f"\r{text:<60}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())

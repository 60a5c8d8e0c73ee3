"""Runs the tests with the lowest and with the newest versions of the declared dependencies.

    python scripts/test_versions.py                               the whole suite, every combination
    python scripts/test_versions.py --only tests/models tests/env --versions lowest
    python scripts/test_versions.py --pythons python3.11 /opt/python3.12/bin/python3

For each Python and each of "lowest" and "newest" it makes a virtual environment below `--where`
(kept, and used again while setup.py is the same), installs this checkout with its extras, imports
every module and runs pytest. "lowest" holds each dependency of setup.py at its lower bound,
exactly; what those depend on in turn is free. "newest" is what pip takes by itself. Prints a line
for each combination with the versions it had, and ends with status 1 where one failed.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("test", "charts")
VERSIONS = ("lowest", "newest")
# The lower bound, or the only version, of a requirement such as "jax>=0.10,<0.13".
_BOUND = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(?:>=|==)\s*([^,;\s]+)")
_REQUIRED = """
import json, runpy, setuptools
taken = {}
setuptools.setup = lambda **kwargs: taken.update(kwargs)
runpy.run_path("setup.py", run_name="__main__")
print(json.dumps({"": taken["install_requires"]} | taken["extras_require"]))
"""
_IMPORT_ALL = """
import importlib, pkgutil, sys
import mmrecoder_jax
programs = {"mmrecoder_jax.env.executor.zygote", "mmrecoder_jax.env.sandbox.__main__"}
for module in pkgutil.walk_packages(mmrecoder_jax.__path__, "mmrecoder_jax."):
    if module.name not in programs:
        importlib.import_module(module.name)
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one combination.

    Attributes:
      python: the interpreter.
      versions: "lowest" or "newest".
      problem: the step that failed, or "".
      installed: the declared dependencies as they were there, "jax 0.10.0".
    """

    python: str
    versions: str
    problem: str
    installed: tuple[str, ...]

    def __str__(self) -> str:
        verdict = f"FAILED: {self.problem}" if self.problem else "passed"
        return f"{self.python} {self.versions}: {verdict}\n    {', '.join(self.installed)}"


def lower_bound(requirement: str) -> str:
    """`name==version` of a requirement's lowest version.

    >>> lower_bound("jax[tpu]>=0.10,<0.13")
    'jax==0.10'

    Raises:
      ValueError: the requirement has no lower bound.
    """
    match = _BOUND.match(requirement)
    if match is None:
        raise ValueError(f"{requirement!r} in setup.py has no lower bound: write name>=version")
    return f"{match[1]}=={match[2]}"


def requirements(python: str, extras: Sequence[str]) -> list[str]:
    """What setup.py declares, with these extras."""
    done = subprocess.run(
        [python, "-c", _REQUIRED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    declared = json.loads(done.stdout)
    return [line for extra in ("", *extras) for line in declared[extra]]


def environment(python: str, versions: str, extras: Sequence[str], where: Path) -> Path:
    """The interpreter of a virtual environment with these versions, which is made where there is
    none for this setup.py.

    Raises:
      subprocess.CalledProcessError: it cannot be made; pip has said why.
    """
    key = hashlib.sha256(
        "\n".join([(ROOT / "setup.py").read_text(encoding="utf-8"), python, *extras]).encode()
    ).hexdigest()[:8]
    directory = where / f"{Path(python).name}-{versions}-{key}"
    interpreter = directory / "bin" / "python"
    if not (directory / "whole").exists():
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(directory)], check=True)
        # `setup.py` is read with its setuptools, which Python 3.12 no longer brings.
        pip = [str(interpreter), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "setuptools>=77"], check=True)
        constraints = directory / "constraints.txt"
        declared = requirements(str(interpreter), extras)
        held = map(lower_bound, declared) if versions == "lowest" else ()
        constraints.write_text("".join(f"{line}\n" for line in held), encoding="utf-8")
        what = f"{ROOT}[{','.join(extras)}]"
        subprocess.run([*pip, "-c", str(constraints), "-e", what], check=True)
        (directory / "whole").touch()
    return interpreter


def installed(interpreter: Path, extras: Sequence[str]) -> tuple[str, ...]:
    """The declared dependencies with the versions that an environment has."""
    names = [
        lower_bound(line).partition("==")[0] for line in requirements(str(interpreter), extras)
    ]
    code = (
        "import sys, importlib.metadata as m\n"
        "print('\\n'.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    )
    done = subprocess.run(
        [str(interpreter), "-c", code, *names], capture_output=True, text=True, check=True
    )
    return tuple(done.stdout.splitlines())


def try_out(
    python: str, versions: str, extras: Sequence[str], where: Path, only: Sequence[str]
) -> Outcome:
    """Makes one environment, imports every module in it and runs the tests."""
    try:
        interpreter = environment(python, versions, extras, where)
    except (OSError, subprocess.CalledProcessError) as error:
        return Outcome(python, versions, f"no environment: {error}", ())
    found = installed(interpreter, extras)
    steps = {
        "an import": ["-c", _IMPORT_ALL],
        "the tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", *only],
    }
    for name, words in steps.items():
        done = subprocess.run(
            [str(interpreter), *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            check=False,
        )
        if done.returncode:
            return Outcome(python, versions, f"{name}, status {done.returncode}", found)
    return Outcome(python, versions, "", found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pythons",
        nargs="+",
        default=[name for name in ("python3.11", "python3.12", "python3.13") if shutil.which(name)],
        help="interpreters; python3.11, python3.12 and python3.13 where they are on the path",
    )
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    parser.add_argument("--only", nargs="+", default=[], help="test files, folders or pytest flags")
    parser.add_argument(
        "--extras", nargs="+", default=list(EXTRAS), help="of setup.py; test is needed"
    )
    parser.add_argument(
        "--where", type=Path, default=ROOT / "build" / "versions", help="keeps the environments"
    )
    args = parser.parse_args()
    if not args.pythons:
        parser.error("no python3.11, 3.12 or 3.13 is on the path: name interpreters with --pythons")
    args.where.mkdir(parents=True, exist_ok=True)
    outcomes = [
        try_out(python, versions, args.extras, args.where, args.only)
        for python in args.pythons
        for versions in args.versions
    ]
    print("\n".join(map(str, outcomes)))
    return any(outcome.problem for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())

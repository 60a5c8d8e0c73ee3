"""Which Python executors run on: what is refused, in one line, and that scripts run there."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mmrecoder_jax.env import EnvConfig, ExecutorPool, about, interpreter
from mmrecoder_jax.env.interpreter import InterpreterError, find

FACTS = {"version": [3, 11, 4], "releases": {"numpy": "2.0.0", "matplotlib": "3.8.4"}, "reads": []}


def stand_in(folder: Path, text: str) -> str:
    """A program that answers as an interpreter that runs `about` would."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    return str(program)


def test_the_trainers_own_is_the_default():
    own = find("")
    assert own.path == os.path.abspath(sys.executable)
    assert {"numpy", "matplotlib"} <= set(own.releases)
    assert sys.prefix in own.reads


@pytest.mark.parametrize(
    "change, said",
    [
        ({"version": [3, 9, 18], "releases": {}}, "is Python 3.9.18, and executors need 3.11"),
        ({"releases": {"numpy": "2.0.0"}}, "has no matplotlib, and executors need numpy>=1.26 and"),
        ({"releases": {"matplotlib": "3.9.0"}}, "has no numpy"),
        (
            {"releases": {"numpy": "2.0.0", "matplotlib": "3.7.5"}},
            r"has matplotlib 3.7.5, and executors need numpy>=1.26 and matplotlib>=3.8.4",
        ),
    ],
)
def test_what_executors_cannot_run_on_is_refused(tmp_path, change, said):
    python = stand_in(tmp_path, json.dumps(FACTS | change))
    with pytest.raises(InterpreterError, match=f"^env.python='{python}' {said}") as refused:
        find(python)
    assert "python -m mmrecoder_jax.env.setup --out=DIR" in str(refused.value)


@pytest.mark.parametrize("release", ["3.8.4", "3.10.0", "3.11.0rc1", "4.0"])
def test_newer_releases_are_taken(tmp_path, release):
    releases = {"releases": {"numpy": "2.0.0", "matplotlib": release}}
    assert find(stand_in(tmp_path, json.dumps(FACTS | releases))).releases["matplotlib"] == release


def test_what_is_no_python_is_refused(tmp_path):
    text = tmp_path / "text"
    text.write_text("words")
    for python, said in {
        str(tmp_path / "none"): "does not exist",
        str(tmp_path): "is a folder",
        str(text): "cannot be run",
        stand_in(tmp_path, "hello"): "is no Python 3 that runs here",
    }.items():
        with pytest.raises(InterpreterError, match=f"^--python='{re.escape(python)}' {said}"):
            find(python, "--python")
        with pytest.raises(InterpreterError, match=r"env\.setup --out=DIR"):
            ExecutorPool(EnvConfig(workers=1, python=python))


def test_an_environment_without_libraries_is_named(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(InterpreterError, match="has no numpy"):
        find(str(tmp_path / "bare" / "bin" / "python"))


def test_releases_that_are_not_the_published_ones_are_named():
    right = {name: releases[0] for name, releases in interpreter.published().items()}
    own = interpreter.Interpreter("python", "3.11.7", right, ())
    assert own.unpublished() == []
    other = dataclasses.replace(own, releases=right | {"networkx": "3.6.1", "squarify": None})
    del other.releases["squarify"]
    assert other.unpublished() == [
        "networkx 3.6.1 (published: 3.2.1)",
        "squarify is missing (published: 0.4.3)",
    ]


def test_the_published_releases_are_those_of_the_benchmarks():
    published = interpreter.published()
    assert published["matplotlib"] == ("3.8.4",) and published["networkx"] == ("3.2.1",)
    assert published["pandas"] == ("1.5.3", "2.1.4")  # one for each Python
    assert set(about.LIBRARIES) <= set(published)


@pytest.mark.parametrize("bubblewrap", [False, True])
def test_scripts_run_on_the_interpreter_that_is_named(tmp_path, bubblewrap):
    """In the sandbox, which lets them read that one's packages; it may be named by a link."""
    place = tmp_path / "charts"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    packages.rmdir()
    packages.symlink_to(sysconfig.get_path("purelib"))
    (tmp_path / "link").symlink_to(place)
    code = "import sys\nimport matplotlib.pyplot as plt\nplt.title(sys.prefix)\nplt.bar([1], [2])"
    python = str(tmp_path / "link" / "bin" / "python")
    config = EnvConfig(workers=1, python=python, preload=("numpy", "matplotlib"))
    with ExecutorPool(dataclasses.replace(config, bubblewrap=bubblewrap)) as pool:
        (execution,) = pool.run([code])
    assert execution.ok, execution.error
    assert Path(execution.record.texts[0]).resolve() == place.resolve()

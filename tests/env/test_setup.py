"""The command that makes an environment for charts: what it refuses, says and leaves alone."""

import json
import re
import sys

import pytest

from mmrecoder_jax.env import interpreter, setup

RIGHT = {name: releases[0] for name, releases in interpreter.published().items()}
# Stands in for Python: makes an environment of itself and installs nothing, in no time.
PYTHON = """\
#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
*" -c "*) echo {version};;
*" venv "*) shift 2; mkdir -p "$1/bin"; cp "$0" "$1/bin/python";;
*" pip install "*) {pip};;
*about.py*) cat <<'END'
{facts}
END
esac
"""
INSTALLS = 'for name in {}; do echo "Collecting $name==1 (from x)"; done'.format(" ".join(RIGHT))


def stand_in(folder, pip: str = INSTALLS, releases: dict = RIGHT, version: str = "3 11") -> str:
    facts = {"version": [3, 11, 4], "releases": releases, "reads": []}
    program = folder / "python3"
    log = folder / "log"
    program.write_text(
        PYTHON.format(log=log, version=version, pip=pip, facts=json.dumps(facts)), encoding="utf-8"
    )
    program.chmod(0o755)
    return str(program)


def test_it_makes_an_environment_once_and_says_how_far_it_is(tmp_path, capsys):
    python, out = stand_in(tmp_path), tmp_path / "charts"
    assert setup.main([f"--out={out}", f"--python={python}"]) == 0
    printed = capsys.readouterr().out
    count = len(RIGHT)
    assert f"making {out} of {python}" in printed and f"{count}/{count}" in printed
    assert f"--python={out}/bin/python" in printed
    calls = (tmp_path / "log").read_text()
    assert f"-r {interpreter.REQUIREMENTS}" in calls
    assert setup.main([f"--out={out}", f"--python={python}"]) == 0
    assert "is ready" in capsys.readouterr().out
    again = (tmp_path / "log").read_text().removeprefix(calls)
    assert "about.py" in again and "pip" not in again and "venv" not in again


def test_it_goes_on_where_it_failed(tmp_path):
    out = tmp_path / "charts"
    fails = stand_in(tmp_path, "echo 'ERROR: no such release'; echo more; exit 1", {})
    with pytest.raises(
        SystemExit, match=r"^error: --out=.* ERROR: no such release; a package inde"
    ):
        setup.main([f"--out={out}", f"--python={fails}"])
    assert setup.main([f"--out={out}", f"--python={stand_in(tmp_path)}"]) == 0


def test_an_environment_that_has_other_releases_is_not_called_ready(tmp_path):
    python = stand_in(tmp_path, releases=RIGHT | {"networkx": "3.6.1"})
    with pytest.raises(SystemExit, match=r"^error: .*networkx 3.6.1 \(published: 3.2.1\)"):
        setup.main([f"--out={tmp_path / 'charts'}", f"--python={python}"])


def test_nothing_is_written_into_what_it_has_not_made(tmp_path):
    out = tmp_path / "mine"
    (out / "bin").mkdir(parents=True)
    (out / "pyvenv.cfg").touch()
    with pytest.raises(SystemExit, match=r"^error: .*holds something else: name a new folder"):
        setup.main([f"--out={out}", f"--python={stand_in(tmp_path)}"])
    assert not (tmp_path / "log").exists() and len(list(out.iterdir())) == 2


@pytest.mark.parametrize("version", ["3 10", "3 13", "words", ""])
def test_a_python_that_has_no_such_releases_is_refused(tmp_path, version):
    python = stand_in(tmp_path, version=version)
    wanted = f"^error: --python={re.escape(repr(python))} is no Python 3.11 or 3.12"
    with pytest.raises(SystemExit, match=wanted):
        setup.main([f"--out={tmp_path / 'charts'}", f"--python={python}"])
    assert not (tmp_path / "charts").exists()


def test_without_a_python_for_them_it_says_which_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, version="3 13"))
    with pytest.raises(SystemExit, match=r"^error: .* install Python 3\.11 or 3\.12 and name it"):
        setup.main([f"--out={tmp_path / 'charts'}"])

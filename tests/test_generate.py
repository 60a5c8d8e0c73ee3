"""The command that redraws charts, with the policy in the box and with a server."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax import generate as command
from tests.drawing.scripted import bars
from tests.drawing.test_server import CRASHES, DRAWS, answers


def generate(*arguments, stdin=b""):
    done = subprocess.run(
        [sys.executable, "-m", "mmrecoder_jax.generate", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=300,
        check=False,
    )
    said = done.stderr.decode()
    assert "Traceback" not in said, said[-3000:]
    return done.returncode, done.stdout.decode(), said


def picture(path, height=20):
    Image.fromarray(bars(height)).save(path)
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of two pictures and one that is none, drawn by the policy in the box."""
    home = tmp_path_factory.mktemp("generate")
    (home / "charts").mkdir()
    picture(home / "charts" / "a.png")
    Image.fromarray(np.full((30, 200, 3), 90, np.uint8)).save(home / "charts" / "b.webp")
    (home / "charts" / "c.png").write_bytes(b"<html>")
    arguments = [home / "charts", f"--out={home / 'out'}", "--turns=2"]
    return home, arguments, generate(*arguments)


def test_code_alone_goes_to_the_standard_output(drawn):
    home, _, (status, out, said) = drawn
    assert status == 1  # one of the pictures cannot be read
    assert "error: " in said and "c.png cannot be read: it begins as no image" in said
    assert "the policy in the box draws 2 charts" in said and "a: turn " in said
    scripts = out.split("# b\n")
    assert scripts[0].startswith("# a\nimport matplotlib") and "plt" in scripts[1]
    for name, script in zip("ab", scripts, strict=True):
        final = (home / "out" / name / "final.py").read_text()
        assert final == script.removeprefix("# a\n")
        compile(final, name, "exec")
    assert (home / "out" / "index.html").is_file()
    assert (home / "out" / "a" / "turn-2.response.txt").is_file()


def test_the_same_command_says_the_same_and_draws_nothing_again(drawn):
    home, arguments, (_, out, _) = drawn
    before = (home / "out" / "a" / "drawing.json").stat().st_mtime_ns
    status, again, said = generate(*arguments)
    assert (status, again) == (1, out) and said.count("drawn before") == 2
    assert (home / "out" / "a" / "drawing.json").stat().st_mtime_ns == before


def test_drawings_made_otherwise_are_not_overwritten(drawn):
    _, arguments, _ = drawn
    status, out, said = generate(*arguments, "--seed=4")
    assert (status, out) == (1, "") and "seed 0, now 4" in said and "--overwrite" in said


def test_one_chart_from_the_standard_input_through_a_server(tmp_path):
    data = picture(tmp_path / "x.png").read_bytes()
    out = tmp_path / "out"
    with answers(CRASHES, DRAWS) as server:
        arguments = ("-", f"--server={server.url}", "--model=m", "--turns=2", f"--out={out}")
        status, code, said = generate(*arguments, stdin=data)
    assert status == 0 and code == (out / "stdin" / "final.py").read_text()
    assert "stdin: turn 2/2, likeness 0." in said
    assert "KeyError" in (out / "stdin" / "turn-1.error.txt").read_text()


def test_no_code_and_a_status_where_no_turn_runs(tmp_path):
    with answers(CRASHES) as server:
        status, code, said = generate(
            picture(tmp_path / "x.png"),
            f"--server={server.url}",
            "--model=m",
            "--turns=1",
            f"--out={tmp_path / 'out'}",
        )
    assert (status, code) == (1, "") and "x: no turn runs; the last: error: " in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "the following arguments are required: charts"),
        (("missing.png",), "missing.png cannot be read: No such file"),
        (("x.png", "--turns=0"), "--turns=0: use 1 or more"),
        (("x.png", "--samples=2", "--select=last"), "--samples=2 with --select=last"),
        (("x.png", "--samples=2", "--temperature=0"), "all samples would be equal"),
        (("x.png", "--temperature=nan"), "--temperature=nan"),
        (("x.png", "--select=best"), "use one of visual, last, judge"),
        (("x.png", "--select=judge"), "needs --judge=URL"),
        (("x.png", "--checkpoint=nowhere"), "--checkpoint='nowhere': no such directory"),
        (("x.png", "--server=http://h/v1"), "needs --model=NAME"),
        (("x.png", "--sandbox=off"), "--sandbox='off'"),
        (("x.png", "--turn=3"), "unrecognized arguments: --turn=3"),
        (("x.png", "--out=x.png"), "--out='x.png'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "x.png")
    with pytest.raises(SystemExit) as ended:
        sys.exit(command.main(arguments))
    shown = capsys.readouterr().err + str(ended.value.code)
    assert said in shown and "Traceback" not in shown and ended.value.code != 0
    assert os.listdir(tmp_path) == ["x.png"]

"""The command that redraws charts, with the policy in the box and with a server."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax import generate as command
from mmrecoder_jax.data.grammars import GRAMMARS
from mmrecoder_jax.drawing.open import Who, author_config
from mmrecoder_jax.env.pool import ExecutorPool
from mmrecoder_jax.env.response import response_text
from mmrecoder_jax.stage import env_config
from tests.drawing.scripted import bars
from tests.drawing.test_server import CRASHES, DRAWS, answers
from tests.rl.judge.server import GOOD, FakeServer, chat


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


def known_charts() -> list[np.ndarray]:
    """Pictures of two charts of the grammar that the policy in the box knows: it writes scripts
    that run for them.
    """
    config = author_config(Who())
    config.env.workers = 1
    grammar = GRAMMARS[config.data.grammar]
    codes = [grammar.chart_spec(0, index, "test").code() for index in range(2)]
    with ExecutorPool(env_config(config)) as pool:
        return [execution.image for execution in pool.run(codes)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of two pictures and one that is none, drawn by the policy in the box."""
    home = tmp_path_factory.mktemp("generate")
    (home / "charts").mkdir()
    for name, image in zip(("a.png", "b.webp"), known_charts(), strict=True):
        Image.fromarray(image).save(home / "charts" / name, lossless=True)
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


DRAWS_RED = "import matplotlib.pyplot as plt\nplt.bar([1], [2], color='red')\nplt.show()"
RED = response_text("red", DRAWS_RED)
POOR = GOOD.replace("18", "2")  # 64 points


@pytest.fixture
def judged(tmp_path, capfd):
    """The command with a judge that gives these answers, the last of them for good: what it
    returns and prints, and the judge.
    """

    def run(*texts, samples=1, status=200):
        said = [chat(text) for text in texts]

        def behaviour(number):
            return (status, {}, said[min(number, len(said) - 1)], 0.0)

        with answers(RED, CRASHES, DRAWS) as server, FakeServer(behaviour) as judge:
            arguments = [
                *(picture(tmp_path / "x.png"), f"--out={tmp_path / 'out'}", "--turns=3"),
                *(f"--server={server.url}", "--model=m", f"--samples={samples}"),
                *("--select=judge", f"--judge={judge.url}", "--judge-model=eyes", "--overwrite"),
            ]
            try:
                ended = command.main(list(map(str, arguments)))
            except SystemExit as problem:
                ended = problem.code
        return ended, *capfd.readouterr(), judge

    return run


def test_the_turn_that_a_judge_prefers_whichever_it_is(tmp_path, monkeypatch, judged):
    monkeypatch.setenv("MMRECODER_JUDGE_KEY", "secret-7")
    status, code, said, _ = judged(GOOD, POOR)
    assert status == 0 and code == DRAWS_RED + "\n" and "x: turn 1/3" in said
    assert "judge 0.80" in said and "secret-7" not in said
    status, code, said, judge = judged(POOR, GOOD)
    assert status == 0 and "red" not in code and "x: turn 3/3" in said
    assert code == (tmp_path / "out" / "x" / "final.py").read_text()
    row = json.loads((tmp_path / "out" / "x" / "drawing.json").read_text())
    assert [turn["judge"] for turn in row["samples"][0]] == [0.64, None, 0.8]
    assert row["settings"]["judge"] == "eyes" and "judge 0.80" in page(tmp_path)
    assert [header["Authorization"] for header in judge.headers] == ["Bearer secret-7"] * 2
    for _, question in judge.questions:  # what did not run is no question
        (message,) = question["messages"]
        kinds = [part["type"] for part in message["content"]]
        assert question["model"] == "eyes" and kinds.count("image_url") == 2


def page(tmp_path):
    return (tmp_path / "out" / "x" / "index.html").read_text()


def test_equal_renders_of_several_samples_are_judged_once(judged):
    status, _, said, judge = judged(GOOD, POOR, samples=3)
    assert status == 0 and "of sample 1/3" in said and len(judge.questions) == 2


def test_a_judge_that_scores_nothing_is_named_and_looks_decide(tmp_path, judged):
    status, code, said, _ = judged("I like it.")
    assert status == 0 and code and "likeness 0." in said
    assert "no judge's score: unreadable answer" in said
    assert "unreadable answer" in page(tmp_path)


def test_a_judge_that_refuses_ends_the_command_with_the_flags_to_check(judged):
    ended, code, _, _ = judged("no", status=401)
    assert code == "" and "HTTP 401" in ended
    assert "check --judge, --judge-model and the key in MMRECODER_JUDGE_KEY" in ended


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
        (("x.png", "--select=judge", "--judge=http://h/v1"), "needs --judge-model=NAME"),
        (("x.png", "--select=judge", "--judge=h", "--judge-model=m"), "--judge='h'"),
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

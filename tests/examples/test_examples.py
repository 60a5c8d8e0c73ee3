"""Every example runs as a program of its own and prints what its docstring promises."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    """The lines that an example prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_every_example_has_a_test():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name[5:] in names}


def test_score_one_chart():
    assert run("score_one_chart") == [
        "text     0.500",  # one of two texts on either side
        "layout   1.000",
        "type     1.000",
        "color    1.000",
        "overall  0.875",
    ]


def test_execute_one_script(tmp_path):
    picture = tmp_path / "chart.png"
    lines = run("execute_one_script", picture)
    assert lines[:3] == ["draws: ok", "  texts Three points", "fails: error"]
    assert lines[3].startswith("  feedback ValueError: x and y must have same first dimension")
    assert lines[4] == f"wrote {picture}, 640 x 480 pixels"
    with Image.open(picture) as image:
        assert image.size == (640, 480)


def test_judge_of_your_own():
    assert run("judge_of_your_own") == [
        "50 of 100 columns dark: score 1.0",
        "20 of 100 columns dark: score 0.7",
        "20 of 100 columns dark: score 0.7",
        "3 requests, 1 answered from the cache",
    ]


def test_roll_out_one_trajectory():
    text = "\n".join(run("roll_out_one_trajectory"))
    assert text.count("  execution ") == 2 and text.count("  feedback ") == 1
    # prompt, response, feedback, response: what the policy is trained on, and what not
    pieces = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("piece")]
    shown = "shown, without loss"
    assert pieces == [shown, "sampled in turn 1", shown, "sampled in turn 2"]

"""Every example runs as a program of its own and prints what its docstring promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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


NOTEBOOK = EXAMPLES / "your_own_charts.ipynb"


def cells() -> list[str]:
    """The notebook's code, cell by cell."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert not any(cell.get("outputs") for cell in notebook["cells"])  # none is kept in git
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_the_notebook_is_plain_python():
    for source in cells():
        compile(source, "cell", "exec")


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    """As one program: a cell that ends in a value shows it, which a program does not."""
    program = tmp_path / "notebook.py"
    program.write_text("\n".join([*cells(), "assert beside.width >= 340", "print('whole')"]))
    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=2400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("whole") and "turn 2: " in done.stdout
    assert (tmp_path / "your_own_charts" / "charts" / "train" / "charts.jsonl").is_file()

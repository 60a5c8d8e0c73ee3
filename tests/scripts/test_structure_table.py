"""The structure of a small tree, counted by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "structure_table.py"

GRPO = '''"""The loop.

Two lines of prose.
"""

import jax

from mmrecoder_jax import learner
from mmrecoder_jax.rl import losses as loss_room
from mmrecoder_jax.rl.rewards import reward, unused


def train(stage):
    """One step after another."""
    state = unused(stage)  # before the loop: not a part of the step
    for step in range(3):
        for _ in range(2):  # an inner loop belongs to the step
            state = loss_room.loss(state)
        learner.update(state, reward(step))
    return jax.numpy.asarray(state)
'''
FILES = {
    "mmrecoder_jax/__init__.py": "",
    "mmrecoder_jax/grpo.py": GRPO,
    "mmrecoder_jax/learner.py": "def update(*_):\n    from mmrecoder_jax.rl import rewards\n",
    "mmrecoder_jax/rl/__init__.py": "",
    "mmrecoder_jax/rl/losses.py": "def loss(x):\n    # why\n    return x\n",
    "mmrecoder_jax/rl/rewards.py": "import mmrecoder_jax.learner\n\nA = '" + "x" * 96 + "'\n",
    "tests/test_all.py": "# 1\n" * 17,
}


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def tree(tmp_path):
    return write(tmp_path / "tree", FILES)


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )


def cells(output):
    """First cell of a row -> its others."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    return {name: others for name, *others in rows}


def test_every_row_of_a_small_tree(tree):
    found = cells(run(tree).stdout)
    assert found[""] == ["now"]
    assert found["files"] == ["6"]
    # Lines: 0 and 0 in the rooms' heads, then 2, 3, 3 and 20.
    assert found["lines per file: median / p90 / longest"] == ["2 / 20 / 20"]
    assert found["lines over 100 columns"] == [f"{100 / 28:.1f} %"]
    # Code: 11 lines of the loop (4 imports and 7 in `train`), 2, 2 and 2; comments: 2 and 1.
    assert found["comments per 100 lines of code"] == [f"{300 / 17:.1f}"]
    assert found["lines of tests per line of source"] == [f"{17 / 28:.2f}"]
    assert found["files that a GRPO step names"] == ["4: grpo, learner, rl.losses, rl.rewards"]
    assert found["import circles"] == ["1: learner rl.rewards"]


def test_two_trees_are_two_columns(tree, tmp_path):
    after = write(tmp_path / "after", FILES | {"mmrecoder_jax/learner.py": "def update(*_): ...\n"})
    found = cells(run(tree, after).stdout)
    assert found[""] == ["before", "after"]
    assert found["import circles"] == ["1: learner rl.rewards", "0"]


def test_the_table_is_written_between_the_marks_again_and_again(tree, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- structure table -->\nold\n<!-- end -->\nbelow\n")
    for _ in range(2):
        done = run(tree, f"--write={page}")
        shown = f"above\n<!-- structure table -->\n{done.stdout}<!-- end -->\nbelow\n"
        assert page.read_text() == shown


@pytest.mark.parametrize("page", ["no marks", "<!-- end -->\n<!-- structure table -->\n"])
def test_a_page_without_marks_stays_as_it_is(tree, tmp_path, page):
    (tmp_path / "page.md").write_text(page)
    done = run(tree, f"--write={tmp_path / 'page.md'}")
    assert "needs a line <!-- structure table -->" in done.stderr
    assert (tmp_path / "page.md").read_text() == page


def test_a_directory_without_the_package_is_named(tmp_path):
    assert f"{tmp_path}: no checkout" in run(tmp_path).stderr

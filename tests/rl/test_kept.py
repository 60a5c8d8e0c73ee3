"""What a bound leaves of written trajectories."""

import math

import pytest

from mmrecoder_jax.rl.kept import keep_below


@pytest.fixture
def written(tmp_path):
    """Five steps of a kilobyte each, half of it in a picture."""
    for step in range(5, 30, 5):
        (tmp_path / f"{step:06d}.jsonl").write_bytes(b"x" * 500)
        (tmp_path / "renders" / f"{step:06d}").mkdir(parents=True)
        (tmp_path / "renders" / f"{step:06d}" / "a.png").write_bytes(b"x" * 500)
    return tmp_path


def steps(directory):
    """Steps that have rows, and those that have pictures."""
    rows = sorted(int(path.stem) for path in directory.glob("*.jsonl"))
    return rows, sorted(int(path.parent.name) for path in directory.glob("renders/*/*.png"))


@pytest.mark.parametrize(
    "most, left",
    [
        (math.inf, [5, 10, 15, 20, 25]),
        (5000, [5, 10, 15, 20, 25]),
        (4999, [5, 15, 20, 25]),
        (3000, [5, 20, 25]),
        (0, [5, 25]),  # the first and the newest stay in any case
    ],
)
def test_the_oldest_go_but_the_first_stays(written, most, left):
    removed = keep_below(str(written), most)
    assert steps(written) == (left, left)
    assert sorted([*map(int, removed), *left]) == [5, 10, 15, 20, 25]


def test_pictures_that_a_kill_left_without_their_rows_go(written):
    (written / "000010.jsonl").unlink()
    keep_below(str(written), 1e9)
    assert steps(written) == ([5, 15, 20, 25],) * 2


def test_pictures_of_earlier_versions_stay(written):
    (written / "renders" / "old.png").write_bytes(b"x")
    keep_below(str(written), 0)
    assert (written / "renders" / "old.png").exists()

"""Which turn is handed over."""

import math

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.drawing.choosing import Choice, check_select, choose, likeness
from tests.drawing.scripted import trajectory, turn


def chosen(select, *trajectories):
    return choose(trajectories, likeness(trajectories), select)


def test_the_last_turn_that_runs():
    assert chosen("last", trajectory(turn(20), turn(5), turn())) == Choice(0, 1)
    assert chosen("last", trajectory(turn(20), turn(5), turn(8))) == Choice(0, 2)


def test_the_turn_that_looks_most_like_the_chart():
    worse, better = trajectory(turn(5), turn(30), turn()), trajectory(turn(8), turn(20), turn(20))
    assert chosen("visual", worse, better) == Choice(1, 1)  # of equals the earliest
    alike = likeness([worse, better])
    assert alike[1][1] == 1.0 and math.isnan(alike[0][2])
    assert alike[0][1] < 1


def test_the_turn_that_the_judge_prefers():
    trajectories = trajectory(turn(20, judge=0.3), turn(5, judge=0.9), turn(20, judge=-1))
    assert chosen("judge", trajectories) == Choice(0, 1)
    assert chosen("judge", trajectory(turn(20, judge=-1), turn(5, judge=0.1))) == Choice(0, 1)
    unscored = trajectory(turn(5, judge=-1), turn(20, judge=-1))
    assert chosen("judge", unscored) == Choice(0, 1)  # then looks decide


@pytest.mark.parametrize("select", ["last", "visual", "judge"])
def test_what_does_not_run_is_never_chosen(select):
    assert chosen(select, trajectory(turn(), turn())) is None


@pytest.mark.parametrize(
    "select, samples, judged, said",
    [
        ("best", 1, False, "use one of visual, last, judge"),
        ("last", 3, False, "--samples=3 with --select=last"),
        ("judge", 1, False, "--select=judge needs --judge=URL"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(select, samples, judged, said):
    with pytest.raises(ConfigError, match=said):
        check_select(select, samples, judged)

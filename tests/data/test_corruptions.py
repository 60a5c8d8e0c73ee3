"""Mistakes: they change the code, the score sees edits, Python sees breaks."""

import collections
import random

import pytest

from mmrecoder_jax.data import synthetic
from mmrecoder_jax.data.corruptions import MOST_EDITS, break_code, corrupt
from mmrecoder_jax.env import Status
from mmrecoder_jax.env.chartmimic import score

CODES = [synthetic.chart_spec(0, index).code() for index in range(24)]


def changed_lines(wrong: str, code: str) -> int:
    return len(set(wrong.splitlines()) ^ set(code.splitlines()))


def test_edits_borrow_from_donors():
    code, donors = CODES[1], CODES[2:6]
    known = set(" ".join([code, *donors]).split("'"))
    wrongs = {corrupt(code, donors, random.Random(i)) for i in range(200)}
    assert code not in wrongs and len(wrongs) > 10
    for wrong in wrongs:
        compile(wrong, "wrong", "exec")
    changes = {changed_lines(wrong, code) for wrong in wrongs}
    assert 1 in changes  # one line dropped or added
    assert max(changes) <= 2 * MOST_EDITS  # an edit changes one line
    titled = [line for wrong in wrongs for line in wrong.splitlines() if "set_" in line]
    assert {line.split("'")[1] for line in titled} <= known


def test_edits_need_something_to_change():
    with pytest.raises(ValueError, match="no edit applies"):
        corrupt("print(1)", ["print(2)"], random.Random(0))


def test_breaks_need_something_to_break():
    with pytest.raises(ValueError, match="no break applies"):
        break_code("pass", random.Random(0))


def test_the_score_sees_edits_and_python_sees_breaks(pool):
    rng = random.Random(0)
    right = pool.run(CODES)
    edited = pool.run([corrupt(code, CODES, rng) for code in CODES])
    broken = pool.run([break_code(code, rng) for code in CODES])
    assert sum(execution.ok for execution in edited) >= 20
    assert sum(execution.status == Status.ERROR for execution in broken) >= 20
    kinds = collections.Counter(
        execution.error.rpartition("\n")[2].split(":")[0]
        for execution in broken
        if not execution.ok
    )
    assert len(kinds) >= 3, f"slips of one kind only: {kinds}"
    lower = [
        score(wrong.record, truth.record).overall < 1
        for wrong, truth in zip(edited, right, strict=True)
        if wrong.ok
    ]
    assert sum(lower) >= 0.75 * len(lower)

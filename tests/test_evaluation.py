"""Evaluation figures against numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest

from mmrecoder_jax.evaluation import Evaluation, bootstrap, correction_row, summarise, table_rows


@pytest.fixture
def evaluation():
    """Four charts, two turns: improved, regressed, repeated, and one whose first turn crashed."""
    executed = np.array([[True, True], [True, False], [True, True], [False, True]])
    scores = np.zeros((4, 2, 5))
    scores[..., 0] = [[0.5, 0.8], [0.6, 0.0], [0.7, 0.7], [0.0, 0.9]]
    repeats = np.array([[False, False], [False, False], [False, True], [False, False]])
    return Evaluation("policy", executed, scores, repeats, ())  # no trajectories are looked at


def test_self_correction_counts_only_first_turns_that_execute(evaluation):
    figures = correction_row(evaluation, 1)
    assert figures["counted"] == 3
    assert figures["improvement"] == pytest.approx((0.3 - 0.6 + 0.0) / 3)
    assert figures["improved"] == pytest.approx(1 / 3)
    assert figures["regressed"] == pytest.approx(1 / 3)
    assert figures["code_repeat"] == pytest.approx(1 / 3)


def test_rows_of_turns(evaluation):
    first, second = summarise(evaluation)
    assert first["exec_rate"] == 0.75 and first["low_level"] == pytest.approx(0.45)
    assert second["exec_rate"] == 0.75 and second["low_level"] == pytest.approx(0.6)
    assert "improvement" not in first and second["improvement"] < 0
    low, high = first["low_level_ci"]
    assert low < 0.45 < high
    shown = table_rows([row | {"set": "test", "decoding": "greedy"} for row in (first, second)])
    assert shown[0]["exec"] == "75.0" and shown[1]["improved"] == "33.3"


def test_no_first_turn_executes():
    evaluation = Evaluation(
        "policy", np.zeros((2, 2), bool), np.zeros((2, 2, 5)), np.zeros((2, 2), bool), ()
    )
    assert correction_row(evaluation, 1) == {}


def test_bootstrap_is_seeded_and_covers():
    values = np.random.default_rng(1).normal(0.3, 0.1, 400)
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)


def test_the_judge_is_named_and_what_it_could_not_score_is_left_out(evaluation):
    judged = np.array([[0.5, 0.6], [0.3, np.nan], [0.7, 0.8], [0.0, np.nan]])
    first, second = summarise(dataclasses.replace(evaluation, judge="visual", judged=judged))
    assert first["judge_score"] == pytest.approx(0.375) and first["judge_unscorable"] == 0
    assert second["judge_score"] == pytest.approx(0.7) and second["judge_unscorable"] == 2
    shown = table_rows([row | {"set": "test", "decoding": "greedy"} for row in (first, second)])
    assert shown[0]["judge visual"].startswith("37.5 [")
    assert not any(
        name.startswith("judge")
        for name in table_rows([summarise(evaluation)[0] | {"set": "a", "decoding": "b"}])[0]
    )

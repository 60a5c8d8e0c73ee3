"""Rewards of turns and trajectories against numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest

from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.rl.rewards import RewardConfig, rewards_of, trajectory_rewards, turn_rewards
from mmrecoder_jax.rl.trajectory import Trajectory, Turn
from tests.rl.charts import CHART


def weights(**chosen):
    """The format reward of the last turn alone, but for the weights that are chosen."""
    return RewardConfig(**({"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "eta": 0.0} | chosen))


def test_turn_reward_weighs_its_parts():
    # (1 - 0.6 - 0.3) * 1 + 0.6 * 0.5 + 0.3 * 0.9
    rewards = turn_rewards(np.array([[1.0, 0.5, 0.9]]), weights(alpha=0.6, beta=0.3))
    np.testing.assert_allclose(rewards, [0.1 + 0.3 + 0.27])


def test_paper_ends_at_the_last_turn():
    np.testing.assert_allclose(
        trajectory_rewards(np.array([[0.9, 0.4], [0.1, 0.8]]), weights()), [0.4, 0.8]
    )


def test_gamma_and_eta():
    config = weights(gamma=0.5, eta=0.1)
    # R2 + 0.5 R1, and 0.1 more where turn 2 beats turn 1
    np.testing.assert_allclose(
        trajectory_rewards(np.array([[0.9, 0.4], [0.1, 0.8]]), config),
        [0.4 + 0.45, 0.8 + 0.05 + 0.1],
    )


def test_the_bonus_is_for_a_better_turn_not_an_equal_one():
    rewards = np.array([[0.4, 0.4], [0.4, 0.5]])
    np.testing.assert_allclose(trajectory_rewards(rewards, weights(eta=0.1)), [0.4, 0.6])


def test_more_than_two_turns():
    # R3 + 0.5 * mean(R1, R2), and 0.1 more because turn 3 beats turn 2
    config = weights(gamma=0.5, eta=0.1)
    reward = trajectory_rewards(np.array([[0.9, 0.1, 0.4]]), config)
    np.testing.assert_allclose(reward, [0.4 + 0.25 + 0.1])


def test_single_turn_is_its_own_reward():
    np.testing.assert_allclose(
        trajectory_rewards(np.array([[0.3]]), weights(gamma=1.0, eta=1.0)), [0.3]
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.4), (-0.1, 0.0), (0.5, -0.1)])
def test_weights_that_cannot_be(alpha, beta):
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        weights(alpha=alpha, beta=beta)


def test_a_model_part_without_a_score_is_not_a_score_of_zero():
    parts = np.array([[1.0, 0.6, np.nan], [1.0, 0.6, 0.0]])
    unscorable, zero = turn_rewards(parts, weights(alpha=0.5, beta=0.3))
    assert np.isnan(unscorable) and zero == pytest.approx(0.5)
    # no weight on the judge: nothing is missing
    np.testing.assert_allclose(turn_rewards(parts, weights(alpha=0.5)), 0.8)


def test_only_turns_that_count_make_a_trajectory_unscorable():
    rewards = np.array([[np.nan, 0.4], [0.4, np.nan], [0.1, 0.4]])
    np.testing.assert_array_equal(
        np.isnan(trajectory_rewards(rewards, weights())), [False, True, False]
    )
    np.testing.assert_array_equal(
        np.isnan(trajectory_rewards(rewards, weights(gamma=0.5))), [True, True, False]
    )
    np.testing.assert_array_equal(
        np.isnan(trajectory_rewards(rewards, weights(eta=0.1))), [True, True, False]
    )


def test_a_response_that_comes_close_to_the_limit_costs_up_to_one():
    """Of 100 tokens the last 20 count: 80 cost nothing, 90 a half, 100 all of it."""
    groups = [[answered(80, 90), answered(100, 3)]]
    config = RewardConfig(alpha=0.5, beta=0.0, gamma=0.0, eta=0.0, limit=100, overlong=20)
    free = rewards_of(groups, dataclasses.replace(config, overlong=0))
    np.testing.assert_allclose(free, 0.5 + 0.5 * 0.8)
    np.testing.assert_allclose(free - rewards_of(groups, config), [[[0.0, 0.5], [1.0, 0.0]]])


def answered(*lengths):
    """A trajectory with responses of these lengths, which have the format and score 0.8."""
    nothing, scores = Execution(Status.NO_CODE), Scores(0.8, 0.8, 0.8, 0.8)
    turns = [
        Turn(np.zeros(n, np.int32), np.zeros(n, np.float32), True, "", nothing, scores, 1.0)
        for n in lengths
    ]
    return Trajectory(CHART, 0, (), tuple(turns))

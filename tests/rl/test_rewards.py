"""Rewards of turns and trajectories against numbers worked out by hand."""

import numpy as np
import pytest

from mmrecoder_jax.rl.rewards import RewardConfig, trajectory_rewards, turn_rewards


def test_turn_reward_weighs_its_parts():
    # (1 - 0.6 - 0.3) * 1 + 0.6 * 0.5 + 0.3 * 0.9
    reward = turn_rewards(np.array([1.0, 0.5, 0.9]), RewardConfig(0.6, 0.3))
    assert reward == pytest.approx(0.1 + 0.3 + 0.27)


def test_paper_ends_at_the_last_turn():
    np.testing.assert_allclose(
        trajectory_rewards(np.array([[0.9, 0.4], [0.1, 0.8]]), RewardConfig()), [0.4, 0.8]
    )


def test_gamma_and_eta():
    config = RewardConfig(gamma=0.5, eta=0.1)
    # R2 + 0.5 R1, and 0.1 more where turn 2 beats turn 1
    np.testing.assert_allclose(
        trajectory_rewards(np.array([[0.9, 0.4], [0.1, 0.8]]), config),
        [0.4 + 0.45, 0.8 + 0.05 + 0.1],
    )


def test_the_bonus_is_for_a_better_turn_not_an_equal_one():
    rewards = np.array([[0.4, 0.4], [0.4, 0.5]])
    np.testing.assert_allclose(trajectory_rewards(rewards, RewardConfig(eta=0.1)), [0.4, 0.6])


def test_more_than_two_turns():
    # R3 + 0.5 * mean(R1, R2), and 0.1 more because turn 3 beats turn 2
    config = RewardConfig(gamma=0.5, eta=0.1)
    reward = trajectory_rewards(np.array([[0.9, 0.1, 0.4]]), config)
    np.testing.assert_allclose(reward, [0.4 + 0.25 + 0.1])


def test_single_turn_is_its_own_reward():
    np.testing.assert_allclose(
        trajectory_rewards(np.array([[0.3]]), RewardConfig(gamma=1.0, eta=1.0)), [0.3]
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.4), (-0.1, 0.0), (0.5, -0.1)])
def test_weights_that_cannot_be(alpha, beta):
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        RewardConfig(alpha, beta)


def test_a_model_part_without_a_score_is_not_a_score_of_zero():
    parts = np.array([[1.0, 0.6, np.nan], [1.0, 0.6, 0.0]])
    unscorable, zero = turn_rewards(parts, RewardConfig(0.5, 0.3))
    assert np.isnan(unscorable) and zero == pytest.approx(0.5)
    # no weight on the judge: nothing is missing
    np.testing.assert_allclose(turn_rewards(parts, RewardConfig(0.5, 0.0)), 0.8)


def test_only_turns_that_count_make_a_trajectory_unscorable():
    rewards = np.array([[np.nan, 0.4], [0.4, np.nan], [0.1, 0.4]])
    np.testing.assert_array_equal(
        np.isnan(trajectory_rewards(rewards, RewardConfig())), [False, True, False]
    )
    np.testing.assert_array_equal(
        np.isnan(trajectory_rewards(rewards, RewardConfig(gamma=0.5))), [True, True, False]
    )
    np.testing.assert_array_equal(
        np.isnan(trajectory_rewards(rewards, RewardConfig(eta=0.1))), [True, True, False]
    )

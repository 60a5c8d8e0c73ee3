"""What trajectories are worth, and how a batch is cut; the loss is in tests/rl/test_losses.py."""

import numpy as np
import pytest

from mmrecoder_jax import grpo
from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.data.batching import BatchShape, Collate, Piece, TokenRow, VisionLayout
from mmrecoder_jax.rl.learner_batch import check_rl, updates_per_step
from mmrecoder_jax.rl.rewards import RewardConfig

REWARDS = np.array(  # [P, G, T]: the last group's second turns are all alike
    [[[0.0, 1.0], [1.0, 0.0], [0.0, 0.5]], [[0.2, 0.7], [0.2, 0.7], [0.4, 0.7]]]
)


def worth(monkeypatch, credit, prompts=2):
    config = load("stage2", "smoke")
    config.rl.credit, config.rl.advantage, config.rl.group = credit, "mean", 3
    monkeypatch.setattr(grpo, "rewards_of", lambda groups, reward: REWARDS)
    return grpo.valued([], RewardConfig(1.0, 0.0, 0.0, 0.0), prompts, config.rl)


def test_a_trajectory_weighs_all_its_turns_alike(monkeypatch):
    found = worth(monkeypatch, "trajectory")
    np.testing.assert_allclose(found.returns, REWARDS[..., 1])
    np.testing.assert_allclose(found.advantages[0], [[0.5, 0.5], [-0.5, -0.5], [0, 0]], atol=1e-6)
    assert (found.advantages[1] == 0).all() and found.silent.tolist() == [False, True]


def test_a_turn_weighs_by_its_own_reward_beside_the_same_turn_of_its_group(monkeypatch):
    found = worth(monkeypatch, "turn")
    expected = REWARDS - REWARDS.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found.advantages, expected, atol=1e-6)
    # the second group still says something by its first turns
    assert found.silent.tolist() == [False, False]
    np.testing.assert_allclose(found.returns, REWARDS[..., 1])


def test_groups_that_rest_leave_the_others_as_they_are(monkeypatch):
    found = worth(monkeypatch, "turn", prompts=5)
    assert found.advantages.shape == REWARDS.shape and found.silent.shape == (2,)


def row(number):
    return TokenRow((Piece(np.full(4, 100 + number, np.int32), 1),), (1,), float(number))


def test_mini_batches_are_equal_parts_with_denominators_of_their_own():
    collate = Collate(BatchShape(2, (8,), (1,), 2), VisionLayout(1, 0, 4, 12))
    rows = [row(number) for number in range(1, 8)]  # the eighth rests
    parts = grpo.mini_batches(rows, 8, 2, collate)
    assert len(parts) == 2
    seen = [set(np.unique(part["advantages"][part["weights"] > 0])) for part in parts]
    assert seen == [{1.0, 2.0, 3.0, 4.0}, {5.0, 6.0, 7.0}]
    for part in parts:
        assert part["weights"].sum() == pytest.approx(1.0)
    (whole,) = grpo.mini_batches(rows, 8, 1, collate)
    assert set(np.unique(whole["advantages"][whole["weights"] > 0])) == set(range(1, 8))


def test_a_batch_must_split_into_its_mini_batches():
    config = load("stage2", "smoke")
    assert updates_per_step(config.rl) == 1
    config.train.batch_size, config.rl.group, config.train.micro_batch_size = 4, 2, 4
    config.rl.mini_batches, config.rl.updates_per_batch = 2, 3
    assert check_rl(config, hosts=1, ways=1) == 4 and updates_per_step(config.rl) == 6
    with pytest.raises(ConfigError, match=r"rl.mini_batches=3"):
        config.rl.mini_batches = 3
        check_rl(config, hosts=1, ways=1)
    with pytest.raises(ConfigError, match=r"rl.mini_batches=4"):
        config.rl.mini_batches = 4  # 2 rows each, in micro-batches of 4
        check_rl(config, hosts=1, ways=1)

"""What trajectories are worth, and how a batch is cut; the loss is in tests/rl/test_losses.py."""

from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest

from mmrecoder_jax import grpo
from mmrecoder_jax.config import ConfigError, load
from mmrecoder_jax.data.batching import BatchShape, Collate, Piece, TokenRow, VisionLayout
from mmrecoder_jax.rl.learner_batch import check_rl, learner_rows, updates_per_step
from mmrecoder_jax.rl.rewards import RewardConfig
from mmrecoder_jax.rl.trajectory import Mode

REWARDS = np.array(  # [P, G, T]: the last group's second turns are all alike
    [[[0.0, 1.0], [1.0, 0.0], [0.0, 0.5]], [[0.2, 0.7], [0.2, 0.7], [0.4, 0.7]]]
)


def worth(monkeypatch, credit, prompts=2, rewards=REWARDS, penalties=None):
    config = load("stage2", "smoke")
    config.rl.credit, config.rl.advantage, config.rl.group = credit, "mean", 3
    monkeypatch.setattr(grpo, "rewards_of", lambda groups, reward: rewards)
    reward = RewardConfig(1.0, 0.0, 0.0, 0.0)
    return grpo.valued([], reward, prompts, config.rl, penalties)


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


PENALTIES = np.array([[[0.1, 0.2], [0.0, 0.3], [0.4, 0.5]], [[0.1, 0.0], [0.1, 0.0], [0.0, 0.3]]])


@pytest.mark.parametrize("credit", ["trajectory", "turn"])
def test_a_penalty_is_taken_off_rewards_before_groups_are_compared(monkeypatch, credit):
    found = worth(monkeypatch, credit, penalties=PENALTIES)
    if credit == "trajectory":  # both turns of a trajectory have drifted
        paid = (REWARDS[..., 1] - [[0.3, 0.3, 0.9], [0.1, 0.1, 0.3]])[..., None]
        np.testing.assert_allclose(paid[0, :, 0], [0.7, -0.3, -0.4])
    else:
        paid = REWARDS - PENALTIES
    expected = np.broadcast_to(paid - paid.mean(axis=1, keepdims=True), REWARDS.shape)
    np.testing.assert_allclose(found.advantages, expected, atol=1e-6)
    assert found.silent.tolist() == [False, False]  # the second group has drifted unequally


def test_a_trajectory_that_could_not_be_scored_stays_so(monkeypatch):
    rewards = REWARDS.copy()
    rewards[0, 0, 1] = np.nan
    found = worth(monkeypatch, "trajectory", rewards=rewards, penalties=PENALTIES)
    np.testing.assert_allclose(found.advantages[0, :, 0], [0, 0.05, -0.05], atol=1e-6)


class Fixed:
    """A token's log-probability is minus a multiple of its id."""

    def of(self, scale, batch):
        return -scale * batch["tokens"].astype(np.float32)


@pytest.mark.parametrize("parts, updates", [(1, 1), (2, 1), (1, 2)])
def test_advantages_of_rewards_less_the_divergence_reach_the_batch(monkeypatch, parts, updates):
    """k1 of a token is 0.1 of its id here; a group is paid alike, so the drift alone counts."""
    config = load("stage2", "smoke")
    rl = config.rl
    rl.credit, rl.advantage, rl.group, rl.turns = "trajectory", "mean", 2, 1
    rl.kl, rl.kl_in, rl.kl_coef, rl.mini_batches = "k1", "reward", 0.5, parts
    rl.updates_per_batch = updates
    monkeypatch.setattr(grpo, "rewards_of", lambda groups, reward: np.ones((2, 2, 1)))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # stand-ins
    groups = [[trajectory([3, 4]), trajectory([5, 6])], [trajectory([3, 3]), trajectory([8])]]
    mode = Mode.FULL_TRAJECTORY
    rows = learner_rows(groups, np.zeros((2, 2, 1)), mode, mask_truncated=False)
    shape = BatchShape(2, (8,), (1,), 2, numbered=True)
    batches = grpo.mini_batches(rows, 4, parts, Collate(shape, VisionLayout(1, 0, 4, 12)))
    advantages, batches, metrics = grpo.less_divergence(
        *(groups, rows, batches, RewardConfig(1.0, 0.0, 0.0, 0.0), (0.9, 1.0), Fixed()),
        *(2, mode, rl),
    )
    penalties = np.array([[0.35, 0.55], [0.3, 0.4]])
    expected = penalties.mean(axis=1, keepdims=True) - penalties
    np.testing.assert_allclose(advantages[..., 0], expected, atol=1e-6)
    assert metrics == pytest.approx({"kl": 3.2 / 7, "kl_penalty": 1.6 / 4})
    assert len(batches) == parts
    seen = np.concatenate([np.unique(x["advantages"][x["weights"] > 0]) for x in batches])
    np.testing.assert_allclose(np.sort(seen), np.sort(expected.ravel()), atol=1e-6)
    for batch in batches:
        assert ("old_logps" in batch) == (parts * updates > 1) and "ref_logps" not in batch
        if "old_logps" in batch:
            np.testing.assert_allclose(batch["old_logps"], -0.9 * batch["tokens"])


def trajectory(ids):
    pieces = Piece(np.array([9, 9], np.int32), 0), Piece(np.array(ids, np.int32), 1)
    return SimpleNamespace(pieces=pieces, turns=[SimpleNamespace(finished=True)])


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

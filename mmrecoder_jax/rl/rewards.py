"""Rewards of a turn and of a trajectory (arXiv 2604.01600).

    R(o)      = (1 - alpha - beta) * format + alpha * rule + beta * model
    R(o1, o2) = R(o2) + gamma * R(o1) + eta * B(R(o1), R(o2))

`format` is 1 if the response is a thought and one fenced Python block. `rule` is the ChartMimic
low-level score of the executed code. `model` is the judge's score in [0, 1], and 0 without a
render. A turn that the judge could not score has NaN there, which stays NaN in whatever depends on
it: such a trajectory is not scorable, and never counts as one with a model score of 0.

`rl.overlong = n` takes up to 1 off the reward of a response that comes close to the limit (DAPO,
arXiv 2503.14476): nothing up to `limit - n` tokens, 1 at the limit, and in between as far as it has
come.

The paper gives no numbers for alpha and beta and no formula for B: alpha and beta are
configuration, and B is 1 if the second turn beats the first. The paper ends at gamma = 0, eta = 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from mmrecoder_jax.rl.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What the formulas above leave open.

    Attributes:
      alpha, beta, gamma, eta: weights (`config.reward`); `beta` needs a judge.
      limit: tokens of the longest response.
      overlong: tokens before the limit over which the penalty grows; 0: none.
    """

    alpha: float
    beta: float
    gamma: float
    eta: float
    limit: int = 0
    overlong: int = 0

    @classmethod
    def of(cls, config: ConfigDict) -> Self:
        """The rewards of an RL stage."""
        reward, rl = config.reward, config.rl
        weights = reward.alpha, reward.beta, reward.gamma, reward.eta
        return cls(*weights, rl.response_length, rl.overlong)

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or self.alpha + self.beta > 1:
            raise ValueError(
                f"reward weights alpha={self.alpha}, beta={self.beta} must be >= 0 and sum to "
                "at most 1"
            )


def reward_parts(groups: Sequence[Sequence[Trajectory]]) -> Float[np.ndarray, "P G T 3"]:
    """(format, rule, model) of every turn; model is 0 where there was nothing to judge, NaN where
    judging failed.
    """
    return np.array(
        [
            [[(u.format, u.scores.overall, u.judge_score) for u in t.turns] for t in group]
            for group in groups
        ]
    )


def turn_rewards(
    parts: Float[np.ndarray, "*turns 3"], config: RewardConfig
) -> Float[np.ndarray, "*turns"]:
    """R(o) from its parts (format, rule, model), each in [0, 1].

    NaN where a part that has a weight is NaN.
    """
    weights = np.array([1.0 - config.alpha - config.beta, config.alpha, config.beta], np.float64)
    counted = weights != 0
    return (np.asarray(parts, np.float64)[..., counted] * weights[counted]).sum(axis=-1)


def rewards_of(
    groups: Sequence[Sequence[Trajectory]], config: RewardConfig
) -> Float[np.ndarray, "P G T"]:
    """R(o) of every turn, less what its length costs."""
    rewards = turn_rewards(reward_parts(groups), config)
    if not config.overlong:
        return rewards
    lengths = np.array([[[len(u.ids) for u in t.turns] for t in group] for group in groups])
    begins = config.limit - config.overlong
    return rewards - np.clip((lengths - begins) / config.overlong, 0.0, 1.0)


def trajectory_rewards(
    rewards: Float[np.ndarray, "*trajectories T"], config: RewardConfig
) -> Float[np.ndarray, "*trajectories"]:
    """R of whole trajectories.

    The last turn's reward, plus gamma times the mean of the earlier ones, plus eta times the bonus
    of the last turn. With two turns this is the paper's formula. A single turn is its own reward.
    NaN where a turn that counts is NaN.
    """
    last = rewards[..., -1]
    if rewards.shape[-1] == 1:
        return last
    total = last
    if config.gamma:
        total = total + config.gamma * rewards[..., :-1].mean(axis=-1)
    if config.eta:
        before = rewards[..., -2]
        total = total + config.eta * np.where(np.isnan(before), np.nan, last > before)
    return total

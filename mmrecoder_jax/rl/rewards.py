"""Rewards of a turn and of a trajectory (arXiv 2604.01600).

    R(o)      = (1 - alpha - beta) * format + alpha * rule + beta * model
    R(o1, o2) = R(o2) + gamma * R(o1) + eta * B(R(o1), R(o2))

`format` is 1 if the response is a thought and one fenced Python block. `rule` is the ChartMimic
low-level score of the executed code. `model` is the judge's score in [0, 1], and 0 without a
render. A turn that the judge could not score has NaN there, which stays NaN in whatever depends on
it: such a trajectory is not scorable, and never counts as one with a model score of 0.

The paper gives no numbers for alpha and beta and no formula for B: alpha and beta are
configuration, and B is 1 if the second turn beats the first. The paper ends at gamma = 0, eta = 0.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mmrecoder_jax.rl.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The weights in the formulas above (`config.reward`); `beta` needs a judge."""

    alpha: float
    beta: float
    gamma: float
    eta: float

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

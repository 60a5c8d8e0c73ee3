"""Group-relative advantages (GRPO; arXiv 2604.01600) over the G samples of one prompt.

    group    A_i = (R_i - mean(R)) / (std(R) + eps)
    mean     A_i =  R_i - mean(R)                          Dr.GRPO, arXiv 2503.20783
    rloo     A_i =  R_i - mean of the others' R            arXiv 2402.14740

What differs silently between systems is an argument here: `ddof` (0: population, 1: sample
deviation) and `eps`. A sample that could not be scored (a judge that never answered) leaves the
baseline and gets advantage 0. So does every sample of a group whose rewards are all equal, and of a
group with fewer than two scorable samples.

    rewards   [[1.0, 0.0, 0.5, ?]]      ? = unscorable
    mean 0.5, std(ddof=0) 0.408
    A         [[1.22, -1.22, 0.0, 0.0]]
"""

import enum
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Credit(enum.StrEnum):
    """What has an advantage (`rl.credit`).

    TRAJECTORY weighs all its turns by one, of the trajectory's reward. TURN weighs each turn by its
    own reward beside those of the same turn in the group. That is biased as an estimate of what a
    trajectory is worth: an early turn has no credit for what it lets later ones do, and turns are
    compared that answer different ones.
    """

    TRAJECTORY = "trajectory"
    TURN = "turn"


class Baseline(enum.StrEnum):
    """How rewards become advantages (`rl.advantage`); see the top of this module."""

    GROUP = "group"
    MEAN = "mean"
    RLOO = "rloo"


@functools.partial(jax.jit, static_argnames=("eps", "ddof", "baseline"))
def group_advantages(
    rewards: Float[Array, "P G"],
    scorable: Bool[Array, "P G"],
    eps: float,
    ddof: int,
    baseline: Baseline = Baseline.GROUP,
) -> tuple[Float[Array, "P G"], Bool[Array, " P"]]:
    """(advantages, whether the group gave no signal).

    Args:
      scorable: False where the reward is unknown; that reward is ignored, whatever it is.
      eps: `rl.std_eps`.
      ddof: `rl.std_ddof`.
    """
    count = scorable.sum(axis=1, keepdims=True)
    rewards = jnp.where(scorable, rewards, 0.0)
    mean = rewards.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(scorable, rewards - mean, 0.0)
    variance = (centred**2).sum(axis=1, keepdims=True) / jnp.maximum(count - ddof, 1)
    highest = jnp.where(scorable, rewards, -jnp.inf).max(axis=1, keepdims=True)
    lowest = jnp.where(scorable, rewards, jnp.inf).min(axis=1, keepdims=True)
    silent = (count < 2) | (highest <= lowest)
    match baseline:
        case Baseline.GROUP:
            advantages = centred / (jnp.sqrt(variance) + eps)
        case Baseline.MEAN:
            advantages = centred
        case Baseline.RLOO:
            advantages = centred * count / jnp.maximum(count - 1, 1)
    return jnp.where(silent, 0.0, advantages), silent[:, 0]

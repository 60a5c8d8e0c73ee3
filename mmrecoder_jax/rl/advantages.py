"""Group-relative advantages (GRPO; arXiv 2604.01600): A_i = (R_i - mean(R)) / (std(R) + eps) over
the G samples of one prompt.

What differs silently between systems is a field here: `ddof` (0: population, 1: sample deviation)
and `eps`. A sample that could not be scored (a judge that never answered) leaves the baseline and
gets advantage 0; so does every sample of a group whose rewards are all equal, and of a group with
fewer than two scorable samples.

    rewards   [[1.0, 0.0, 0.5, ?]]      ? = unscorable
    mean 0.5, std(ddof=0) 0.408
    A         [[1.22, -1.22, 0.0, 0.0]]
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@functools.partial(jax.jit, static_argnames=("ddof",))
def group_advantages(
    rewards: Float[Array, "P G"], scorable: Bool[Array, "P G"], eps: float = 1e-6, ddof: int = 1
) -> tuple[Float[Array, "P G"], Bool[Array, " P"]]:
    """Advantages `[P, G]` and, per prompt, whether the group gave no signal (`[P]`, all scorable
    rewards equal or fewer than two).
    """
    count = scorable.sum(axis=1, keepdims=True)
    rewards = jnp.where(scorable, rewards, 0.0)
    mean = rewards.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(scorable, rewards - mean, 0.0)
    variance = (centred**2).sum(axis=1, keepdims=True) / jnp.maximum(count - ddof, 1)
    highest = jnp.where(scorable, rewards, -jnp.inf).max(axis=1, keepdims=True)
    lowest = jnp.where(scorable, rewards, jnp.inf).min(axis=1, keepdims=True)
    silent = (count < 2) | (highest <= lowest)
    return jnp.where(silent, 0.0, centred / (jnp.sqrt(variance) + eps)), silent[:, 0]

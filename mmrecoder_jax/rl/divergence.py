"""The divergence from the reference in the reward (`rl.kl_in=reward`), not in the loss.

    KL_t  = sum over the tokens of turn t of k                    k1, k2, k3 of `losses.divergence`
    R'    = R - rl.kl_coef * sum_t KL_t                           of a trajectory
    R'_t  = R_t - rl.kl_coef * KL_t                               of a turn (`rl.credit=turn`)

With k1 this is the reward of InstructGPT (arXiv 2203.02155, equation 2; before it 1909.08593), and
its gradient is that of the KL on average. Rewards are compared in their groups only afterwards, so
what counts is how far a trajectory has drifted beside the others of its group.

The policy is that before the first update on the batch. Its log-probabilities are the learner's, as
the reference's are, not the sampler's: two programs round differently, and over thousands of tokens
that could be more than the divergence. Turns count that the stage trains, whole, also where
`rl.truncated` masks them; in stage 1 the last, because the first is that of its whole group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mmrecoder_jax.data.batching import Arrays, TokenRow, slots_of_rows, turns_of
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.losses import Divergence, divergence
from mmrecoder_jax.rl.trajectory import Mode

Values = Float[np.ndarray, "M P T"]


class OfTurns(NamedTuple):
    """Of every turn of this host's rows; 0 for turns that the stage does not train.

    Attributes:
      sums: KL_t.
      tokens: how many a turn has.
    """

    sums: Float[np.ndarray, "*rows T"]
    tokens: Float[np.ndarray, "*rows T"]

    def metrics(self, coefficient: float) -> dict[str, float]:
        """`kl`, the mean of a token, and `kl_penalty`, that of a trajectory, over all hosts.

        Args:
          coefficient: `rl.kl_coef`.
        """
        rows = self.sums[..., 0].size
        own = np.array([self.sums.sum(), self.tokens.sum(), rows], np.float64)
        total, tokens, trajectories = distributed.global_sum(own)
        return {
            "kl": float(total / max(tokens, 1.0)),
            "kl_penalty": float(coefficient * total / max(trajectories, 1.0)),
        }


def divergence_of_turns(
    logps: Values,
    reference: Values,
    batch: Arrays,
    rows: Sequence[TokenRow],
    turns: int,
    mode: Mode,
    kind: Divergence,
) -> OfTurns:
    """The divergence of every turn of a batch's rows.

    Args:
      logps, reference: of the batch's tokens, by the policy and by the reference.
      batch: this host's arrays, `[M, ...]`, `numbered`.
      rows: that it was made of, without those that rest.
      turns: of a row.
    """
    values = np.asarray(divergence(kind, jnp.asarray(logps), jnp.asarray(reference)), np.float64)
    sums, tokens = np.zeros((2, len(rows), turns))
    for number, part, slots in slots_of_rows(batch):
        if number < len(rows):
            # What was shown is turn 0: there two policies may be infinitely far apart.
            turn = turns_of(rows[number])
            sums[number] = np.bincount(turn, values[*part, slots], turns + 1)[1:]
            tokens[number] = np.bincount(turn, minlength=turns + 1)[1:]
    if mode == Mode.SHARED_FIRST_TURN:
        sums[:, :-1] = tokens[:, :-1] = 0.0
    return OfTurns(sums, tokens)

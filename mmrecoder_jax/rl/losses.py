"""Token log-probabilities, the supervised loss and the GRPO loss.

Every loss here is `sum(weights * per_token)`. The weights are made on the host
(`data.batching.loss_weights`): the loss mask by turn, divided by the *global* count of the chosen
aggregation. So a loss does not change with the micro-batch, the mesh or the number of hosts. What
a position without weight holds never counts, not even where it is infinite (`of_weighted`).

GRPO (arXiv 2604.01600), one update per batch of rollouts:

    J = E[ 1/G sum_i  pi(o_i) / stop_gradient(pi(o_i)) * A_i ]

The ratio is 1 in value, its gradient is that of `log pi`: `ratio = exp(logps -
stop_gradient(logps))` (`rl.updates_per_batch = 1`). With more updates per batch the ratio is taken
against the log-probabilities before the first of them (`old_logps`) and clipped to `[1 -
rl.clip_low, 1 + rl.clip_high]`. `rl.kl_coef > 0` adds the k3 estimate of KL(pi || reference),
`exp(r - l) - (r - l) - 1`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def token_logps(
    logits_of: Callable[[Float[Array, "P chunk D"]], Float[Array, "P chunk V"]],
    hidden: Float[Array, "P T D"],
    tokens: Int[Array, "P T"],
    parent: Int[Array, "P T"],
    forbidden: Bool[np.ndarray, " V"],
    temperature: float,
    chunk: int,
) -> tuple[Float[Array, "P T"], Float[Array, "P T"]]:
    """(log-probability of each token, entropy of the distribution that it was drawn from), float32.

    A token is predicted from the hidden state of its parent; what has none is 0:

        tokens   a    b       c        d
        parent   -    0       1        0       two rows, a b c and a d
        hidden   h0   h1      h2       h3
        logps    0    p(b|h0) p(c|h1)  p(d|h0)

    Args:
      logits_of: projects hidden states to logits.
      parent: slots in the same part; -1: none.
      forbidden: ids that are never sampled. They have no probability here either, so that learner
        and sampler mean the same distribution.
      temperature: at which the tokens were sampled.
      chunk: tokens of a part projected to logits at a time, and again in the backward pass:
        `[P, T, V]` never exists.
    """
    count = tokens.shape[1]
    chunk = min(chunk, count)
    padding = -count % chunk

    def pieces(x: Array) -> Array:  # [P, T] -> [chunks, P, chunk]
        x = jnp.pad(x, ((0, 0), (0, padding)))
        return x.reshape(x.shape[0], -1, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def one(_: None, piece: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        source, target = piece
        logits = logits_of(jnp.take_along_axis(hidden, source[..., None], axis=1))
        logits = jnp.where(forbidden, -1e30, logits.astype(jnp.float32) / temperature)
        # finite for forbidden ids, whose probability is then exactly 0: no 0 * inf in the entropy
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        probabilities = jnp.exp(logits - normaliser[..., None])
        entropy = normaliser - (probabilities * jnp.where(forbidden, 0.0, logits)).sum(axis=-1)
        return None, (chosen - normaliser, entropy)

    _, found = jax.lax.scan(one, None, (pieces(jnp.maximum(parent, 0)), pieces(tokens)))

    def of_tokens(x: Array) -> Array:  # [chunks, P, chunk] -> [P, T]
        x = x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :count]
        return jnp.where(parent >= 0, x, 0.0)

    return of_tokens(found[0]), jax.lax.stop_gradient(of_tokens(found[1]))


def of_weighted(weights: Float[Array, "P T"], values: Float[Array, "P T"]) -> Float[Array, "P T"]:
    """The values that have a weight, 0 elsewhere.

    Two policies can be hundreds of nats apart on a prompt token, so that their ratio is infinite,
    and 0 * inf is NaN. What is masked *before* the ratio is taken can reach neither the loss nor
    its gradient; masking the ratio itself would leave 0 * inf in the gradient.
    """
    return jnp.where(weights != 0, values, 0.0)


def weighted_sum(weights: Float[Array, "P T"], values: Float[Array, "P T"]) -> Float[Array, ""]:
    """`sum(weights * values)` over the positions that have a weight."""
    return (weights * of_weighted(weights, values)).sum()


def logp_gap(
    learner: Float[Array, "P T"],
    sampler: Float[Array, "P T"],
    weights: Float[Array, "P T"],
    sequence: Int[Array, "P T"],
    rows: int,
) -> dict[str, Float[Array, ""]]:
    """How far apart learner and sampler are on the same tokens, in nats.

    Both mean the same policy, so what is left is rounding, or a mistake: samples of another policy
    than the one that is trained.

    Args:
      sequence: the row that a token belongs to, of so many `rows` in its part.

    Returns:
      `logp_gap`, the mean of the tokens that have a weight, weighed as the loss weighs them (with
      `rl.aggregation=constant` smaller by the share of the longest response that is written);
      `logp_gap_max`, the largest of a token; `logp_gap_sequence_max`, of a row's whole sum.
    """
    difference = of_weighted(weights, learner) - of_weighted(weights, sampler)
    of_rows = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=rows))
    return {
        "logp_gap": weighted_sum(weights, jnp.abs(difference)),
        "logp_gap_max": jnp.abs(difference).max(),
        "logp_gap_sequence_max": jnp.abs(of_rows(difference, sequence)).max(),
    }


def truncated_importance(
    learner: Float[Array, "P T"],
    sampler: Float[Array, "P T"],
    weights: Float[Array, "P T"],
    largest: float,
) -> tuple[Float[Array, "P T"], dict[str, Float[Array, ""]]]:
    """(how much each token counts that another policy has written, metrics).

    `min(learner / sampler, largest)` of its probabilities, which makes the mean over the tokens of
    the sampling policy one of the learner's; cut, because few large weights would be most of the
    variance (IMPALA, arXiv 1802.01561; for GRPO: Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). It has no gradient.

    Returns:
      The weights, 1 where a position carries no loss; `importance`, their mean as the loss weighs
      tokens, and `importance_cut`, the share that is cut.
    """
    ratio = jnp.exp(of_weighted(weights, learner) - of_weighted(weights, sampler))
    importance = jax.lax.stop_gradient(jnp.minimum(ratio, largest))
    return importance, {
        "importance": weighted_sum(weights, importance),
        "importance_cut": (weights * (ratio > largest)).sum(),
    }


def sft_loss(logps: Float[Array, "P T"], weights: Float[Array, "P T"]) -> Float[Array, ""]:
    """Cross-entropy over the tokens that have a weight."""
    return -weighted_sum(weights, logps)


def grpo_loss(
    logps: Float[Array, "P T"],
    advantages: Float[Array, "P T"],
    weights: Float[Array, "P T"],
    *,
    old_logps: Float[Array, "P T"] | None,
    ref_logps: Float[Array, "P T"] | None,
    importance: Float[Array, "P T"] | None = None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(the GRPO loss to be minimised, weighted means to report).

    Args:
      advantages: of the trajectory that a token belongs to. Stage 2 weighs both its turns by it,
        stage 1 only the second: the weights are zero elsewhere.
      old_logps: log-probabilities before the first update on this batch; None for an on-policy
        step, where nothing is clipped.
      ref_logps: log-probabilities under the reference policy; None without a KL term.
      importance: of tokens that another policy wrote (`truncated_importance`); None where none did.
      clip_low, clip_high, kl_coef: `rl.clip_low`, `rl.clip_high`, `rl.kl_coef`.

    Returns:
      (loss, metrics): `clipped`, the share of clipped tokens, and `kl`, where they exist.
    """
    metrics: dict[str, Array] = {}
    logps = of_weighted(weights, logps)
    advantage = of_weighted(weights, advantages)
    if old_logps is None:
        objective = jnp.exp(logps - jax.lax.stop_gradient(logps)) * advantage
    else:
        ratio = jnp.exp(logps - of_weighted(weights, old_logps))
        clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
        objective = jnp.minimum(ratio * advantage, clipped * advantage)
        metrics["clipped"] = (weights * (clipped * advantage < ratio * advantage)).sum()
    if importance is not None:
        objective = objective * of_weighted(weights, importance)
    loss = -(weights * objective).sum()
    if ref_logps is not None:
        difference = of_weighted(weights, ref_logps) - logps
        kl = (weights * (jnp.exp(difference) - difference - 1.0)).sum()
        metrics["kl"] = kl
        loss = loss + kl_coef * kl
    return loss, metrics

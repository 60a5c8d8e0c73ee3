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

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def token_logps(
    logits_of: Callable[[Float[Array, "B chunk D"]], Float[Array, "B chunk V"]],
    hidden: Float[Array, "B L D"],
    tokens: Int[Array, "B L"],
    forbidden: Bool[np.ndarray, " V"],
    temperature: float,
    chunk: int,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """(log-probability of each token, entropy of the distribution that it was drawn from), float32.

    Column t is about `tokens[:, t]`, predicted from `hidden[:, t - 1]`; column 0 is 0:

        tokens   a    b       c
        hidden   h0   h1      h2
        logps    0    p(b|h0) p(c|h1)

    Args:
      logits_of: projects hidden states to logits.
      forbidden: ids that are never sampled. They have no probability here either, so that learner
        and sampler mean the same distribution.
      temperature: at which the tokens were sampled.
      chunk: tokens per row projected to logits at a time, and again in the backward pass:
        `[B, L, V]` never exists.
    """
    length = tokens.shape[1]
    targets = tokens[:, 1:]
    source = hidden[:, :-1]
    steps = length - 1
    chunk = min(chunk, steps)
    padding = -steps % chunk
    source = jnp.pad(source, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))

    @jax.checkpoint
    def one(_: None, piece: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        hidden_chunk, target_chunk = piece
        logits = logits_of(hidden_chunk).astype(jnp.float32)
        logits = jnp.where(forbidden, -1e30, logits / temperature)
        # finite for forbidden ids, whose probability is then exactly 0: no 0 * inf in the entropy
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target_chunk[..., None], axis=-1)[..., 0]
        probabilities = jnp.exp(logits - normaliser[..., None])
        entropy = normaliser - (probabilities * jnp.where(forbidden, 0.0, logits)).sum(axis=-1)
        return None, (chosen - normaliser, entropy)

    pieces = (
        source.reshape(source.shape[0], -1, chunk, source.shape[2]).swapaxes(0, 1),
        targets.reshape(targets.shape[0], -1, chunk).swapaxes(0, 1),
    )
    _, outputs = jax.lax.scan(one, None, pieces)

    def rows(x: Array) -> Array:  # [chunks, B, chunk] -> [B, L]
        return jnp.pad(x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :steps], ((0, 0), (1, 0)))

    return rows(outputs[0]), jax.lax.stop_gradient(rows(outputs[1]))


def of_weighted(weights: Float[Array, "B L"], values: Float[Array, "B L"]) -> Float[Array, "B L"]:
    """The values that have a weight, 0 elsewhere.

    Two policies can be hundreds of nats apart on a prompt token, so that their ratio is infinite,
    and 0 * inf is NaN. What is masked *before* the ratio is taken can reach neither the loss nor
    its gradient; masking the ratio itself would leave 0 * inf in the gradient.
    """
    return jnp.where(weights != 0, values, 0.0)


def weighted_sum(weights: Float[Array, "B L"], values: Float[Array, "B L"]) -> Float[Array, ""]:
    """`sum(weights * values)` over the positions that have a weight."""
    return (weights * of_weighted(weights, values)).sum()


def logp_gap(
    learner: Float[Array, "B L"], sampler: Float[Array, "B L"], weights: Float[Array, "B L"]
) -> dict[str, Float[Array, ""]]:
    """How far apart learner and sampler are on the same tokens, in nats.

    Both mean the same policy, so what is left is rounding, or a mistake: samples of another policy
    than the one that is trained.

    Returns:
      `logp_gap`, the mean of the tokens that have a weight, weighed as the loss weighs them (with
      `rl.aggregation=constant` smaller by the share of the longest response that is written);
      `logp_gap_max`, the largest of a token; `logp_gap_sequence_max`, of a row's whole sum.
    """
    difference = of_weighted(weights, learner) - of_weighted(weights, sampler)
    return {
        "logp_gap": weighted_sum(weights, jnp.abs(difference)),
        "logp_gap_max": jnp.abs(difference).max(),
        "logp_gap_sequence_max": jnp.abs(difference.sum(axis=1)).max(),
    }


def truncated_importance(
    learner: Float[Array, "B L"],
    sampler: Float[Array, "B L"],
    weights: Float[Array, "B L"],
    largest: float,
) -> tuple[Float[Array, "B L"], dict[str, Float[Array, ""]]]:
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


def sft_loss(logps: Float[Array, "B L"], weights: Float[Array, "B L"]) -> Float[Array, ""]:
    """Cross-entropy over the tokens that have a weight."""
    return -weighted_sum(weights, logps)


def grpo_loss(
    logps: Float[Array, "B L"],
    advantages: Float[Array, " B"],
    weights: Float[Array, "B L"],
    *,
    old_logps: Float[Array, "B L"] | None,
    ref_logps: Float[Array, "B L"] | None,
    importance: Float[Array, "B L"] | None = None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(the GRPO loss to be minimised, weighted means to report).

    Args:
      advantages: one per row. Stage 2 weighs both turns of a trajectory by it, stage 1 only the
        second: the weights are zero elsewhere.
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
    advantage = of_weighted(weights, jnp.broadcast_to(advantages[:, None], logps.shape))
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

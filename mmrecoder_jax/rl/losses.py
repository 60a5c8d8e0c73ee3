"""Token log-probabilities, the supervised loss and the GRPO loss.

Every loss here is `sum(weights * per_token)`. The weights are made on the host
(`data.batching.loss_weights`): the loss mask by turn, divided by the *global* count of the chosen
aggregation. So a loss does not change with the micro-batch, the mesh or the number of hosts. What
a position without weight holds never counts, not even where it is infinite (`of_weighted`).

With `l` a token's log-probability, `mu` what it was before the first update of the batch
(`rl.updates_per_batch = 1`: itself, without gradient), `A` the advantage of its trajectory, `r =
exp(l - mu)` and `clip(r)` between `1 - rl.clip_low` and `1 + rl.clip_high`, per token:

    grpo     min(r A, clip(r) A)                  and at least rl.clip_dual * A where A < 0
             (arXiv 2402.03300; two bounds: DAPO, 2503.14476; dual clip: 1912.09729)
    gspo     the same of s, the geometric mean of r over the tokens of the row that carry loss
             (arXiv 2507.18071)
    cispo    stop_gradient(clip(r)) A l           no token's gradient is cut off
             (arXiv 2506.13585)

On-policy all ratios are 1 in value, so grpo and cispo have the same gradient, that of `A l`. With
`d = ref - l` and a reference policy (`rl.kl_coef > 0`) the estimate of KL(pi || reference)

    k3       exp(d) - d - 1
    k2       d**2 / 2                             its gradient is that of the KL on average
    k1       -d                                   in the reward alone (`rl.divergence`): in a loss
                                                  its gradient is 0 on average

is added (`rl.kl_in=loss`), and `rl.entropy_coef` times the entropy is taken off. The estimates are
those of http://joschu.net/blog/kl-approx.html.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import NamedTuple

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
    learns_entropy: bool = False,
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
      learns_entropy: whether the entropies have a gradient.
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

    entropies = of_tokens(found[1])
    return of_tokens(found[0]), entropies if learns_entropy else jax.lax.stop_gradient(entropies)


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


def sums_of_rows(
    values: Float[Array, "P T"], sequence: Int[Array, "P T"], rows: int
) -> Float[Array, "P rows"]:
    """Sums over the tokens of each row, of so many in a part."""
    return jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=rows))(values, sequence)


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
    return {
        "logp_gap": weighted_sum(weights, jnp.abs(difference)),
        "logp_gap_max": jnp.abs(difference).max(),
        "logp_gap_sequence_max": jnp.abs(sums_of_rows(difference, sequence, rows)).max(),
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


class Ratio(enum.StrEnum):
    """What is clipped (`rl.objective`); see the top of this module."""

    GRPO = "grpo"
    GSPO = "gspo"
    CISPO = "cispo"


class Divergence(enum.StrEnum):
    """How the divergence from the reference is estimated (`rl.kl`)."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class PenaltyIn(enum.StrEnum):
    """What the divergence is taken off, or added to (`rl.kl_in`)."""

    LOSS = "loss"
    REWARD = "reward"


def divergence(
    kind: Divergence, logps: Float[Array, "*tokens"], reference: Float[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """The estimate of KL(pi || reference) at each token that pi wrote, by its log-probabilities."""
    difference = reference - logps
    match kind:
        case Divergence.K1:
            return -difference
        case Divergence.K2:
            return difference**2 / 2
        case Divergence.K3:
            return jnp.exp(difference) - difference - 1.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """Options of the loss.

    Attributes:
      clip_low, clip_high: see `Ratio`.
      clip_dual: the largest loss of a token with a negative advantage, in advantages; 0: none.
      kl_coef: weight of the divergence; it counts where there are log-probabilities of a reference.
      entropy_coef: weight of the entropy bonus.
    """

    ratio: Ratio = Ratio.GRPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 0.0
    kl: Divergence = Divergence.K3
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


class Tokens(NamedTuple):
    """What the loss knows of each token beside the policy's log-probability.

    Attributes:
      weights: of the loss (`data.batching.loss_weights`); what has none never counts.
      advantages: of the trajectory that a token belongs to. Stage 2 weighs both its turns by it,
        stage 1 only the second: the weights are zero elsewhere.
      sequence: the row that a token belongs to, in its part.
      old_logps: log-probabilities before the first update on this batch; None for an on-policy
        step, where nothing is clipped.
      ref_logps: log-probabilities under the reference policy; None without a KL term.
      importance: of tokens that another policy wrote (`truncated_importance`); None where none did.
      entropy: of the distributions; None without a bonus.
    """

    weights: Float[Array, "P T"]
    advantages: Float[Array, "P T"]
    sequence: Int[Array, "P T"]
    old_logps: Float[Array, "P T"] | None = None
    ref_logps: Float[Array, "P T"] | None = None
    importance: Float[Array, "P T"] | None = None
    entropy: Float[Array, "P T"] | None = None


def grpo_loss(
    logps: Float[Array, "P T"], tokens: Tokens, options: Objective, rows: int
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(the loss to be minimised, weighted means to report).

    Args:
      rows: of a part.

    Returns:
      (loss, metrics): `clipped`, the share of clipped tokens, and `kl`, where they exist.
    """
    weights, old, metrics = tokens.weights, tokens.old_logps, {}
    logps = of_weighted(weights, logps)
    advantage = of_weighted(weights, tokens.advantages)
    before = jax.lax.stop_gradient(logps) if old is None else of_weighted(weights, old)
    change = logps - before
    if options.ratio is Ratio.GSPO:
        change = _mean_of_rows(change, weights, tokens.sequence, rows)
    ratio = jnp.exp(change)
    clipped = jnp.clip(ratio, 1.0 - options.clip_low, 1.0 + options.clip_high)
    if options.ratio is Ratio.CISPO:
        objective = jax.lax.stop_gradient(clipped) * advantage * logps
        cut = clipped != ratio
    else:
        whole = ratio * advantage
        objective = whole if old is None else jnp.minimum(whole, clipped * advantage)
        if options.clip_dual:
            bound = jnp.where(advantage < 0, options.clip_dual * advantage, -jnp.inf)
            objective = jnp.maximum(objective, bound)
        cut = objective != whole
    if old is not None:
        metrics["clipped"] = (weights * cut).sum()
    if tokens.importance is not None:
        objective = objective * of_weighted(weights, tokens.importance)
    loss = -(weights * objective).sum()
    if tokens.ref_logps is not None:
        apart = divergence(options.kl, logps, of_weighted(weights, tokens.ref_logps))
        metrics["kl"] = (weights * apart).sum()
        loss = loss + options.kl_coef * metrics["kl"]
    if tokens.entropy is not None:
        loss = loss - options.entropy_coef * weighted_sum(weights, tokens.entropy)
    return loss, metrics


def _mean_of_rows(
    values: Float[Array, "P T"],
    weights: Float[Array, "P T"],
    sequence: Int[Array, "P T"],
    rows: int,
) -> Float[Array, "P T"]:
    """For each token the mean of its row's tokens that have a weight; values are 0 elsewhere."""
    totals = sums_of_rows(values, sequence, rows)
    counts = sums_of_rows((weights != 0).astype(values.dtype), sequence, rows)
    means = totals / jnp.maximum(counts, 1.0)
    return jnp.where(weights != 0, jnp.take_along_axis(means, sequence, axis=1), 0.0)

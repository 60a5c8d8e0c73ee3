"""Log-probabilities and losses against naive formulas and numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.rl.losses import (
    Divergence,
    Objective,
    Ratio,
    Tokens,
    grpo_loss,
    logp_gap,
    sft_loss,
    token_logps,
    truncated_importance,
    weighted_sum,
)

B, L, D, V = 3, 9, 5, 7
PARENT = jnp.tile(jnp.arange(L) - 1, (B, 1))  # rows that stand beside each other
FORBIDDEN = np.array([False, False, True, False, False, False, True])


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, L, D))
    table = jax.random.normal(keys[1], (D, V))
    tokens = jax.random.choice(keys[2], jnp.flatnonzero(~FORBIDDEN), (B, L))
    return hidden, table, tokens


def naive(hidden, table, tokens, temperature=1.0):
    logits = jnp.where(FORBIDDEN, -jnp.inf, hidden @ table / temperature)
    logps = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logps[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    terms = jnp.exp(logps) * jnp.where(FORBIDDEN, 0.0, logps)
    entropy = -jnp.where(FORBIDDEN, 0.0, terms).sum(-1)[:, :-1]
    return jnp.pad(chosen, ((0, 0), (1, 0))), jnp.pad(entropy, ((0, 0), (1, 0)))


@pytest.mark.parametrize("chunk", [1, 3, 8, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_equal_a_plain_softmax(case, chunk, temperature):
    hidden, table, tokens = case
    logps, entropy = token_logps(
        lambda x: x @ table, hidden, tokens, PARENT, FORBIDDEN, temperature, chunk
    )
    expected_logps, expected_entropy = naive(hidden, table, tokens, temperature)
    np.testing.assert_allclose(logps, expected_logps, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, atol=1e-5)


def test_tokens_after_the_same_one_are_predicted_from_it(case):
    hidden, table, tokens = case
    parent = jnp.full((B, L), 4).at[:, ::3].set(-1)
    logps, entropy = token_logps(lambda x: x @ table, hidden, tokens, parent, FORBIDDEN, 1.0, 4)
    normal = jax.nn.log_softmax(jnp.where(FORBIDDEN, -jnp.inf, hidden[:, 4] @ table), axis=-1)
    expected = np.take_along_axis(np.asarray(normal), np.asarray(tokens), axis=1)
    np.testing.assert_allclose(logps, np.where(parent < 0, 0.0, expected), atol=1e-5)
    assert (np.asarray(entropy)[parent < 0] == 0).all() and (entropy[:, 1] > 0).all()


def test_sft_loss_is_a_weighted_sum():
    logps = jnp.log(jnp.array([[0.5, 0.25, 0.1]]))
    loss = sft_loss(logps, jnp.array([[0.5, 0.25, 0.0]]))
    assert loss == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(4))


def test_gradient_through_chunks_equals_plain(case):
    hidden, table, tokens = case
    weights = jnp.linspace(0, 1, B * L).reshape(B, L)
    chunked = jax.grad(
        lambda t: sft_loss(
            token_logps(lambda x: x @ t, hidden, tokens, PARENT, FORBIDDEN, 1.0, 3)[0], weights
        )
    )(table)
    plain = jax.grad(lambda t: sft_loss(naive(hidden, t, tokens)[0], weights))(table)
    np.testing.assert_allclose(chunked, plain, atol=1e-5)


def grpo(logps, advantages, weights, **options):
    """The loss of an on-policy step without KL, but for `options`; a row and an advantage in each
    part.
    """
    known = {name: options.pop(name) for name in tuple(options) if name in Tokens._fields}
    of_tokens = jnp.broadcast_to(advantages[:, None], logps.shape)
    sequence = known.pop("sequence", jnp.zeros(logps.shape, jnp.int32))
    tokens = Tokens(weights, of_tokens, sequence, **known)
    return grpo_loss(logps, tokens, Objective(**options), rows=2)


def test_on_policy_loss_is_minus_the_weighted_advantage_and_its_gradient_is_the_policy_gradient():
    logps = jnp.log(jnp.array([[0.5, 0.25], [0.1, 0.2]]))
    advantages = jnp.array([2.0, -1.0])
    weights = jnp.array([[0.25, 0.25], [0.0, 0.5]])
    loss, gradient = jax.value_and_grad(lambda x: grpo(x, advantages, weights)[0])(logps)
    assert loss == pytest.approx(-(0.5 * 2.0 + 0.5 * -1.0))
    np.testing.assert_allclose(gradient, [[-0.5, -0.5], [0.0, 0.5]])


def test_clipping_stops_the_gradient_of_a_ratio_that_went_far_enough():
    old = jnp.zeros((1, 3))
    logps = jnp.log(jnp.array([[1.5, 1.1, 0.5]]))  # ratios
    weights = jnp.full((1, 3), 1 / 3)

    def loss(x, advantage):
        options = {"old_logps": old, "clip_low": 0.3, "clip_high": 0.4}
        return grpo(x, jnp.array([advantage]), weights, **options)[0]

    # positive advantage: min(ratio, clipped) = 1.4, 1.1, 0.5
    assert loss(logps, 1.0) == pytest.approx(-(1.4 + 1.1 + 0.5) / 3)
    np.testing.assert_allclose(jax.grad(loss)(logps, 1.0), [[0.0, -1.1 / 3, -0.5 / 3]], rtol=1e-5)
    # negative advantage: max(ratio, clipped) = 1.5, 1.1, 0.7
    assert loss(logps, -1.0) == pytest.approx((1.5 + 1.1 + 0.7) / 3)
    np.testing.assert_allclose(jax.grad(loss)(logps, -1.0), [[1.5 / 3, 1.1 / 3, 0.0]], rtol=1e-5)
    clipped = grpo(logps, jnp.array([1.0]), weights, old_logps=old)[1]["clipped"]
    assert clipped == pytest.approx(1 / 3)


def test_kl_is_the_k3_estimate():
    logps, reference = jnp.array([[0.0, -1.0]]), jnp.array([[0.0, -0.5]])
    weights = jnp.array([[0.5, 0.5]])
    loss, metrics = grpo(logps, jnp.zeros(1), weights, ref_logps=reference, kl_coef=0.1)
    expected = 0.5 * (np.exp(0.5) - 0.5 - 1)
    assert metrics["kl"] == pytest.approx(expected, rel=1e-6)
    assert loss == pytest.approx(0.1 * expected, rel=1e-6)


def test_kl_as_the_half_square():
    logps, reference = jnp.array([[0.0, -1.0]]), jnp.array([[0.3, -0.5]])
    weights = jnp.array([[0.5, 0.5]])
    options = {"ref_logps": reference, "kl_coef": 0.1, "kl": Divergence.K2}
    loss, metrics = grpo(logps, jnp.zeros(1), weights, **options)
    assert metrics["kl"] == pytest.approx((0.09 + 0.25) / 4, rel=1e-6)
    assert loss == pytest.approx(0.1 * (0.09 + 0.25) / 4, rel=1e-6)


def test_k2_and_k3_pull_towards_the_reference_and_k2_as_the_divergence_itself_does():
    """A distribution over three ids: the gradient of k2, in the mean over its samples, is that of
    KL(pi || reference).
    """
    scores, reference = jnp.array([0.3, -0.2, 0.9]), jax.nn.log_softmax(jnp.array([0.1, 0.4, -0.5]))

    def divergence(scores):
        logps = jax.nn.log_softmax(scores)
        return (jnp.exp(logps) * (logps - reference)).sum()

    def estimated(scores, kind):
        logps = jax.nn.log_softmax(scores)
        weights = jax.lax.stop_gradient(jnp.exp(logps))[None]  # as often as each id is drawn
        return grpo(
            logps[None], jnp.zeros(1), weights, ref_logps=reference[None], kl_coef=1.0, kl=kind
        )[0]

    exact = jax.grad(divergence)(scores)
    np.testing.assert_allclose(jax.grad(estimated)(scores, Divergence.K2), exact, atol=1e-6)
    assert estimated(scores, Divergence.K3) == pytest.approx(float(divergence(scores)), rel=1e-5)
    assert (jax.grad(estimated)(scores, Divergence.K3) * exact).sum() > 0


def test_a_sequence_has_one_ratio_the_geometric_mean_of_its_tokens():
    """GSPO: two rows in one part, ratios 2 and 1/2 (mean 1), and 1.21 and 1 (mean 1.1)."""
    ratios = jnp.array([[2.0, 0.5, 1.21, 1.0, 7.0]])
    weights = jnp.array([[0.25, 0.25, 0.25, 0.25, 0.0]])
    rows = jnp.array([[0, 0, 1, 1, 0]])
    options = {"ratio": Ratio.GSPO, "old_logps": jnp.zeros((1, 5)), "sequence": rows}

    def loss(logps, **changes):
        return grpo(logps, jnp.array([1.0]), weights, **options, **changes)[0]

    logps = jnp.log(ratios)
    assert loss(logps) == pytest.approx(-(1.0 + 1.1) / 2, rel=1e-6)
    # each token moves the mean by half; the first row's ratio is 1, the second's 1.1
    np.testing.assert_allclose(
        jax.grad(loss)(logps), [[-0.25, -0.25, -0.275, -0.275, 0.0]], rtol=1e-5
    )
    clipped, metrics = grpo(logps, jnp.array([1.0]), weights, **options, clip_high=0.05)
    assert clipped == pytest.approx(-(1.0 + 1.05) / 2, rel=1e-6)
    assert metrics["clipped"] == pytest.approx(0.5)
    on_policy = options | {"old_logps": None}
    gradient = jax.grad(lambda x: grpo(x, jnp.array([3.0]), weights, **on_policy)[0])(logps)
    np.testing.assert_allclose(gradient, [[-0.75, -0.75, -0.75, -0.75, 0.0]], rtol=1e-6)


def test_a_clipped_weight_leaves_every_token_its_gradient():
    """CISPO: ratios 1.5, 1.1 and 0.5 weigh 1.4, 1.1 and 0.7, whatever the advantage."""
    logps = jnp.log(jnp.array([[1.5, 1.1, 0.5]]))
    weights = jnp.full((1, 3), 1 / 3)
    options = {"ratio": Ratio.CISPO, "old_logps": jnp.zeros((1, 3))}
    options |= {"clip_low": 0.3, "clip_high": 0.4}
    for advantage in (2.0, -1.0):

        def loss(x, advantage=advantage):
            return grpo(x, jnp.array([advantage]), weights, **options)[0]

        expected = np.array([[1.4, 1.1, 0.7]]) * -advantage / 3
        np.testing.assert_allclose(jax.grad(loss)(logps), expected, rtol=1e-5)
        assert loss(logps) == pytest.approx(float((expected * np.asarray(logps)).sum()), rel=1e-5)
    assert grpo(logps, jnp.ones(1), weights, **options)[1]["clipped"] == pytest.approx(2 / 3)
    on_policy = options | {"old_logps": None}
    same = [
        jax.grad(lambda x, how=how: grpo(x, jnp.array([2.0]), weights, **how)[0])(logps)
        for how in (on_policy, on_policy | {"ratio": Ratio.GRPO})
    ]
    np.testing.assert_allclose(*same, rtol=1e-6)


def test_the_loss_of_a_bad_token_has_a_bound():
    """Dual clip at 3: with advantage -1 a ratio of 5 costs 3 and has no gradient; a good token is
    as without it.
    """
    logps, weights = jnp.log(jnp.array([[5.0, 2.0]])), jnp.array([[0.5, 0.5]])
    options = {"old_logps": jnp.zeros((1, 2)), "clip_dual": 3.0}

    def loss(x, advantage):
        return grpo(x, jnp.array([advantage]), weights, **options)[0]

    assert loss(logps, -1.0) == pytest.approx((3.0 + 2.0) / 2)
    np.testing.assert_allclose(jax.grad(loss)(logps, -1.0), [[0.0, 1.0]], rtol=1e-6)
    assert loss(logps, 1.0) == pytest.approx(-1.2)
    assert grpo(logps, -jnp.ones(1), weights, **options)[1]["clipped"] == pytest.approx(0.5)


def test_an_entropy_bonus_raises_the_entropy(case):
    hidden, table, tokens = case
    weights = jnp.full((B, L), 1 / (B * L)).at[:, 0].set(0.0)

    def loss(table, learns, coef=0.5):
        logps, entropy = token_logps(
            lambda x: x @ table, hidden, tokens, PARENT, FORBIDDEN, 1.0, 4, learns
        )
        options = {"entropy": entropy, "entropy_coef": coef}
        return grpo(logps, jnp.zeros(B), weights, **options)[0], (weights * entropy).sum()

    (value, entropy), gradient = jax.value_and_grad(loss, has_aux=True)(table, True)
    assert value == pytest.approx(-0.5 * float(entropy), rel=1e-5)
    assert loss(table - 0.1 * gradient, True)[1] > entropy
    # without it the entropies are numbers alone
    np.testing.assert_array_equal(jax.grad(lambda t: loss(t, False)[0])(table), 0.0)


APART = (np.inf, -np.inf, np.nan, 700.0, -700.0, -1e30)  # on a token without weight, in nats
KINDS = {
    "on-policy": {},
    "clipped": {"old_logps": jnp.array([[-0.4, -1.0, -2.0]])},
    "kl": {"ref_logps": jnp.array([[-0.4, -1.0, -2.0]]), "kl_coef": 0.1},
    "k2": {"ref_logps": jnp.array([[-0.4, -1.0, -2.0]]), "kl_coef": 0.1, "kl": Divergence.K2},
    "gspo": {"old_logps": jnp.array([[-0.4, -1.0, -2.0]]), "ratio": Ratio.GSPO},
    "cispo": {"old_logps": jnp.array([[-0.4, -1.0, -2.0]]), "ratio": Ratio.CISPO},
    "dual": {"old_logps": jnp.array([[-0.4, -1.0, -2.0]]), "clip_dual": 3.0},
}


@pytest.mark.parametrize("value", APART, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["policy", "other", "both"])
def test_a_token_without_weight_reaches_neither_loss_nor_gradient(kind, value, where):
    weights = jnp.array([[0.0, 0.5, 0.5]])
    advantages = jnp.array([2.0])

    def loss(logps, options):
        value, metrics = grpo(logps, advantages, weights, **options)
        return value, metrics

    def at_the_prompt(x):
        return x.at[0, 0].set(value)

    plain, options = jnp.array([[-0.5, -0.9, -2.5]]), dict(KINDS[kind])
    logps = plain if where == "other" else at_the_prompt(plain)
    if where != "policy":
        options |= {n: at_the_prompt(x) for n, x in options.items() if n.endswith("logps")}
    found = jax.value_and_grad(loss, has_aux=True)(logps, options)
    expected = jax.value_and_grad(loss, has_aux=True)(plain, KINDS[kind])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.isfinite(found[1]).all() and found[1][0, 0] == 0.0


@pytest.mark.parametrize("value", APART, ids=str)
def test_a_token_without_weight_reaches_no_supervised_loss(value):
    weights = jnp.array([[0.0, 0.5, 0.5]])
    loss, gradient = jax.value_and_grad(sft_loss)(jnp.array([[value, -1.0, -2.0]]), weights)
    assert loss == pytest.approx(1.5)
    np.testing.assert_array_equal(gradient, [[0.0, -0.5, -0.5]])
    assert weighted_sum(weights, jnp.array([[value, 1.0, 2.0]])) == pytest.approx(1.5)


def test_an_infinite_ratio_on_a_token_with_weight_is_not_hidden():
    logps, weights = jnp.array([[0.0, 700.0]]), jnp.array([[0.5, 0.5]])
    loss = grpo(logps, jnp.array([-1.0]), weights, old_logps=jnp.zeros((1, 2)))[0]
    assert not np.isfinite(loss)


def test_the_gap_between_learner_and_sampler_is_of_what_has_a_weight():
    learner = jnp.log(jnp.array([[0.5, 0.25, 0.1], [0.1, 0.2, 1.0]]))
    sampler = learner + jnp.array([[0.1, -0.3, 50.0], [0.2, 0.2, -jnp.inf]])
    weights = jnp.array([[0.25, 0.25, 0.0], [0.25, 0.25, 0.0]])
    apart = jnp.zeros((2, 3), jnp.int32)  # a row in each part
    found = logp_gap(learner, sampler, weights, apart, 1)
    assert found["logp_gap"] == pytest.approx(0.2)
    assert found["logp_gap_max"] == pytest.approx(0.3, rel=1e-5)
    assert found["logp_gap_sequence_max"] == pytest.approx(0.4, rel=1e-5)
    # the first part has two rows: sums of 0.1 and of -0.3, of which the sign does not count
    rows = jnp.array([[0, 1, 1], [0, 0, 0]])
    found = logp_gap(learner, sampler, weights.at[1].set(0.0), rows, 2)
    assert found["logp_gap_sequence_max"] == pytest.approx(0.3, rel=1e-5)


def test_tokens_of_another_policy_count_by_their_truncated_ratio():
    """Probabilities 0.2 and 0.9 today, 0.4 and 0.1 when they were written, the third alike."""
    learner = jnp.log(jnp.array([[0.2, 0.9, 0.5, 1e-9]]))
    sampler = jnp.log(jnp.array([[0.4, 0.1, 0.5, 0.9]]))
    weights = jnp.array([[0.25, 0.25, 0.5, 0.0]])
    importance, metrics = truncated_importance(learner, sampler, weights, 2.0)
    np.testing.assert_allclose(importance, [[0.5, 2.0, 1.0, 1.0]], rtol=1e-6)
    assert metrics["importance"] == pytest.approx(0.25 * 0.5 + 0.25 * 2 + 0.5)
    assert metrics["importance_cut"] == pytest.approx(0.25)

    def loss(logps):
        importance, _ = truncated_importance(logps, sampler, weights, 2.0)
        return grpo(logps, jnp.array([3.0]), weights, importance=importance)[0]

    value, gradient = jax.value_and_grad(loss)(learner)
    assert value == pytest.approx(-3 * (0.25 * 0.5 + 0.25 * 2 + 0.5))
    # the weight is a number: the gradient is that of log pi, weighed by it
    np.testing.assert_allclose(gradient, [[-0.375, -1.5, -1.5, 0.0]], rtol=1e-6)


def test_the_policy_itself_counts_one():
    """On-policy, with the same numbers on both sides, the correction changes nothing to the bit."""
    logps = jnp.log(jnp.array([[0.2, 0.9, 0.5]]))
    weights = jnp.full((1, 3), 1 / 3)
    importance, _ = truncated_importance(logps, logps, weights, 2.0)
    on_policy = grpo(logps, jnp.array([3.0]), weights)[0]
    assert grpo(logps, jnp.array([3.0]), weights, importance=importance)[0] == on_policy


@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan, 400.0])
def test_the_ratio_of_a_token_without_weight_reaches_nothing(value):
    logps = jnp.log(jnp.array([[0.2, 0.9]]))
    weights = jnp.array([[1.0, 0.0]])
    sampler = logps.at[0, 1].set(value)
    importance, metrics = truncated_importance(logps, sampler, weights, 2.0)
    loss, _ = grpo(logps, jnp.array([3.0]), weights, importance=importance)
    assert loss == pytest.approx(-3) and metrics["importance"] == 1
    assert metrics["importance_cut"] == 0

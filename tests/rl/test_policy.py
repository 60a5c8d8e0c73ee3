"""A policy's log-probabilities, those that stay fixed during a batch's updates, and its copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.models.weights import from_tensors
from mmrecoder_jax.rl.policy import FixedLogps, copy_of_trained, policy_logps
from tests.models.conversation import small_config
from tests.models.parity import random_tensors

BATCH = {"tokens": np.array([[[1, 2, 3]], [[4, 5, 6]]], np.int32)}  # two micro-batches of one row


def scaled(params, micro):
    """A policy whose log-probability of a token is minus a multiple of its id."""
    logps = -params["scale"] * micro["tokens"].astype(jnp.float32)
    return logps, jnp.zeros_like(logps)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def test_log_probabilities_are_those_of_the_sampler_s_distribution(mesh):
    """At its temperature, and without the ids that are never sampled."""
    config = small_config(num_layers=1)
    params, net = from_tensors(random_tensors(config), config), Qwen25VL(config)
    tokens = np.array([[5, 6, 7, 8]], np.int32)
    order = np.arange(4, dtype=np.int32)
    batch = {
        "tokens": tokens,
        "parent": order[None] - 1,
        "home": order[None],
        "rows": order[None],
        "positions": np.tile(order, (1, 3, 1)),
        "vision_index": np.full_like(tokens, -1),  # no image
        "features": np.zeros((1, 1, config.hidden_size), np.float32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    logps = policy_logps(net, forbidden=[3, 9], temperature=0.5, chunk=2)
    with jax.set_mesh(mesh):
        found, _ = jax.jit(logps)(params, batch)
    row = batch["tokens"], batch["positions"], jnp.ones_like(tokens), batch["vision_index"]
    hidden = net.apply({"params": params}, *row, None)
    logits = net.apply({"params": params}, hidden, method="logits")[0] / 0.5
    logits = logits.at[:, np.array([3, 9])].set(-np.inf)
    expected = jax.nn.log_softmax(logits)[np.arange(3), tokens[0, 1:]]
    np.testing.assert_allclose(found[0], [0.0, *expected], atol=1e-5)


def test_an_on_policy_batch_needs_none(mesh):
    fixed = FixedLogps(scaled, mesh, updates_per_batch=1, penalised=False)
    assert fixed.add_to({"scale": 2.0}, None, BATCH).keys() == BATCH.keys()


def test_several_updates_compare_with_the_policy_before_the_first(mesh):
    fixed = FixedLogps(scaled, mesh, updates_per_batch=2, penalised=False)
    batch = fixed.add_to({"scale": 2.0}, None, BATCH)
    np.testing.assert_allclose(batch["old_logps"], -2.0 * BATCH["tokens"])
    assert "ref_logps" not in batch
    known = fixed.add_to({"scale": 3.0}, None, batch)  # what is known is not computed again
    assert known["old_logps"] is batch["old_logps"]


def test_a_loss_with_a_divergence_has_the_reference_s_log_probabilities(mesh):
    fixed = FixedLogps(scaled, mesh, updates_per_batch=1, penalised=True)
    batch = fixed.add_to({"scale": 2.0}, {"scale": 3.0}, BATCH)
    np.testing.assert_allclose(batch["ref_logps"], -3.0 * BATCH["tokens"])
    assert "old_logps" not in batch


def test_a_copy_shares_what_is_not_trained():
    params = {"model": {"kernel": jnp.ones(2)}, "visual": {"kernel": jnp.ones(2)}}
    copy = copy_of_trained(params, lambda name: name.startswith("model/"))
    assert copy["visual"]["kernel"] is params["visual"]["kernel"]
    assert copy["model"]["kernel"] is not params["model"]["kernel"]
    np.testing.assert_array_equal(copy["model"]["kernel"], params["model"]["kernel"])

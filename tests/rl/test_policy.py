"""Log-probabilities that stay fixed during a batch's updates, and the copy of a policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.rl.policy import FixedLogps, copy_of_trained

BATCH = {"tokens": np.array([[[1, 2, 3]], [[4, 5, 6]]], np.int32)}  # two micro-batches of one row


def scaled(params, micro):
    """A policy whose log-probability of a token is minus a multiple of its id."""
    logps = -params["scale"] * micro["tokens"].astype(jnp.float32)
    return logps, jnp.zeros_like(logps)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def test_an_on_policy_batch_needs_none(mesh):
    fixed = FixedLogps(scaled, mesh, updates_per_batch=1, reference=None)
    assert fixed.add_to({"scale": 2.0}, BATCH).keys() == BATCH.keys()


def test_several_updates_compare_with_the_policy_before_the_first(mesh):
    fixed = FixedLogps(scaled, mesh, updates_per_batch=2, reference=None)
    batch = fixed.add_to({"scale": 2.0}, BATCH)
    np.testing.assert_allclose(batch["old_logps"], -2.0 * BATCH["tokens"])
    assert "ref_logps" not in batch


def test_a_reference_stays_what_it_was(mesh):
    fixed = FixedLogps(scaled, mesh, updates_per_batch=1, reference={"scale": 3.0})
    batch = fixed.add_to({"scale": 2.0}, BATCH)
    np.testing.assert_allclose(batch["ref_logps"], -3.0 * BATCH["tokens"])
    assert "old_logps" not in batch


def test_a_copy_shares_what_is_not_trained():
    params = {"model": {"kernel": jnp.ones(2)}, "visual": {"kernel": jnp.ones(2)}}
    copy = copy_of_trained(params, lambda name: name.startswith("model/"))
    assert copy["visual"]["kernel"] is params["visual"]["kernel"]
    assert copy["model"]["kernel"] is not params["model"]["kernel"]
    np.testing.assert_array_equal(copy["model"]["kernel"], params["model"]["kernel"])

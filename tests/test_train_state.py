"""The update: micro-batches, meshes and the number of compiled programs change nothing but speed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.train_state import from_params, make_optimizer, make_update

OPTIM = ConfigDict({"lr": 0.1, "b1": 0.9, "b2": 0.95, "weight_decay": 0.0, "warmup_steps": 2, "schedule": "constant", "clip": 1.0})


def loss_fn(params, batch):
    error = batch["x"] @ params["q_proj"]["kernel"] - batch["y"]
    return (batch["w"] * (error**2).sum(-1)).sum(), {"weight": batch["w"].sum()}


def batch_of(micro_batches):
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(8, 3)), rng.normal(size=(8, 2)), np.full(8, 1 / 8)
    return {k: v.reshape(micro_batches, 8 // micro_batches, *v.shape[1:]).astype(np.float32) for k, v in {"x": x, "y": y, "w": w}.items()}


@pytest.fixture
def mesh():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def start(mesh):
    tx, schedule = make_optimizer(OPTIM, 10)
    params = {"q_proj": {"kernel": jnp.ones((3, 2))}}
    return from_params(params, tx, mesh, 0), make_update(loss_fn, tx, schedule, mesh)


def test_micro_batches_change_nothing(mesh):
    results = []
    for micro_batches in (1, 2, 4):
        state, update = start(mesh)
        for _ in range(3):
            state, metrics = update(state, batch_of(micro_batches))
        assert metrics["weight"] == pytest.approx(1.0)
        results.append(np.asarray(state.params["q_proj"]["kernel"]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
    np.testing.assert_allclose(results[0], results[2], rtol=1e-6)


def test_one_program_for_one_shape(mesh):
    state, update = start(mesh)
    for _ in range(4):
        state, _ = update(state, batch_of(2))
    assert update.compilations() == 1 and int(state.step) == 4


def test_first_step_is_adam_by_hand(mesh):
    """With b1 and b2 bias-corrected, Adam's first step is lr * sign(gradient); warm-up of 2 halves the rate at step 1."""
    state, update = start(mesh)
    before = np.asarray(state.params["q_proj"]["kernel"])
    state, metrics = update(state, batch_of(1))
    np.testing.assert_allclose(state.params["q_proj"]["kernel"], before)  # the rate of step 0 is 0
    assert metrics["lr"] == 0.0
    state, metrics = update(state, batch_of(1))
    assert metrics["lr"] == pytest.approx(0.05)
    step = np.abs(np.asarray(state.params["q_proj"]["kernel"]) - before)
    np.testing.assert_allclose(step, 0.05, rtol=1e-3)  # the gradient was the same twice


def test_cosine_ends_at_a_tenth():
    schedule = make_optimizer(ConfigDict(OPTIM.to_dict() | {"schedule": "cosine"}), 100)[1]
    assert schedule(2) == pytest.approx(0.1) and schedule(100) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="'linear'"):
        make_optimizer(ConfigDict(OPTIM.to_dict() | {"schedule": "linear"}), 100)


def test_only_kernels_decay(mesh):
    tx, _ = make_optimizer(ConfigDict(OPTIM.to_dict() | {"weight_decay": 0.5, "warmup_steps": 0}), 10)
    params = {"q_proj": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"weight": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["q_proj"]["kernel"], 1 - 0.1 * 0.5)
    np.testing.assert_array_equal(after["q_proj"]["bias"], 1.0)
    np.testing.assert_array_equal(after["norm"]["weight"], 1.0)

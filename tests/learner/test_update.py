"""The update: micro-batches, meshes and the number of compiled programs change nothing but
speed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from mmrecoder_jax.learner.update import (
    OPTIMIZERS,
    SCHEDULES,
    Update,
    abstract_state,
    added,
    average_of,
    from_params,
    make_optimizer,
    sum_type,
    usable,
)
from mmrecoder_jax.models.lora import is_adapter
from mmrecoder_jax.models.qwen2_5_vl import Qwen25VL
from mmrecoder_jax.models.sharding import make_mesh
from mmrecoder_jax.models.weights import from_tensors
from mmrecoder_jax.monitoring.compilations import Compilations
from tests.models.conversation import small_config
from tests.models.parity import random_tensors

OPTIM = ConfigDict(
    {
        "name": "adamw",
        "decay": "(kernel|lora_a|lora_b)$",
        "ema": 0.0,
        "lr": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.0,
        "warmup_steps": 2,
        "schedule": "constant",
        "decay_share": 0.25,
        "clip": 1.0,
        "patch_embed_lr": 1.0,
    }
)


def loss_fn(params, batch):
    error = batch["x"] @ params["q_proj"]["kernel"] - batch["y"]
    return (batch["w"] * (error**2).sum(-1)).sum(), {"weight": batch["w"].sum()}


def batch_of(micro_batches):
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(8, 3)), rng.normal(size=(8, 2)), np.full(8, 1 / 8)
    return {
        k: v.reshape(micro_batches, 8 // micro_batches, *v.shape[1:]).astype(np.float32)
        for k, v in {"x": x, "y": y, "w": w}.items()
    }


@pytest.fixture
def mesh():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def start(mesh):
    tx, schedule = make_optimizer(OPTIM, 10)
    params = {"q_proj": {"kernel": jnp.ones((3, 2))}}
    return from_params(params, tx, mesh, 0), Update(loss_fn, tx, schedule, mesh)


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


def poisoned(micro_batches, value):
    """The batch with one input that is not finite, in its last micro-batch."""
    batch = batch_of(micro_batches)
    batch["x"][-1, -1, 0] = value
    return batch


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e19], ids=str)
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(mesh, micro_batches, value):
    """With 1e19 the loss is infinite, or its gradient; two such steps stand between good ones."""
    state, update = start(mesh)
    for _ in range(2):
        state, metrics = update(state, batch_of(micro_batches))
        assert metrics["skipped"] == 0.0
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.rng))
    for step in (3, 4):
        state, metrics = update(state, poisoned(micro_batches, value))
        assert metrics["skipped"] == 1.0 and int(state.step) == step
        assert np.isfinite(metrics["param_norm"])
        after = jax.tree.map(np.asarray, (state.params, state.opt_state, state.rng))
        jax.tree.map(np.testing.assert_array_equal, before, after)
    state, metrics = update(state, batch_of(micro_batches))

    other, update = start(mesh)
    for _ in range(3):
        other, expected = update(other, batch_of(micro_batches))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(np.asarray, (state.params, state.opt_state)),
        jax.tree.map(np.asarray, (other.params, other.opt_state)),
    )
    # the schedule goes by the steps that were taken
    assert metrics["lr"] == expected["lr"] and metrics["loss"] == expected["loss"]


def test_a_gradient_that_is_not_finite_skips_a_step_whose_loss_is(mesh):
    """The square root's slope at 0 is infinite."""
    tx, schedule = make_optimizer(OPTIM, 10)
    params = {"q_proj": {"kernel": jnp.zeros((3, 2))}}

    def loss(params, batch):
        return jnp.sqrt(jnp.abs(params["q_proj"]["kernel"]).sum()) * batch["w"].sum(), {}

    state, update = from_params(params, tx, mesh, 0), Update(loss, tx, schedule, mesh)
    state, metrics = update(state, batch_of(1))
    assert metrics["loss"] == 0.0 and metrics["skipped"] == 1.0
    assert not np.any(state.params["q_proj"]["kernel"]) and int(state.step) == 1


@pytest.mark.parametrize("micro_batches, programs", [(1, 1), (2, 3), (4, 3)])
def test_as_many_programs_whatever_the_number_of_steps(mesh, micro_batches, programs):
    """One; or the empty total, the gradients of a micro-batch, and the step."""
    state, update = start(mesh)
    for _ in range(4):
        state, _ = update(state, batch_of(micro_batches))
    assert update.compilations() == programs and int(state.step) == 4


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_was_compiled_ahead_is_not_compiled_again(mesh, micro_batches):
    """The zeros that micro-batches are added to are left: they are small."""
    state, update = start(mesh)
    batch = batch_of(micro_batches)
    micro = {name: x[0] for name, x in batch.items()}
    with Compilations(lambda: "ahead") as counted:

        def programs() -> float:  # compiled, or read from the session's cache
            found = counted.taken()
            return found.get("compiles/ahead", 0) + found.get("compiles/cached", 0)

        update.compile(state, micro, micro_batches)
        assert programs() == micro_batches
        update(state, batch)
        assert programs() == micro_batches - 1


def test_first_step_is_adam_by_hand(mesh):
    """With b1 and b2 bias-corrected, Adam's first step is lr * sign(gradient); warm-up of 2 halves
    the rate of the first step.
    """
    state, update = start(mesh)
    before = np.asarray(state.params["q_proj"]["kernel"])
    state, metrics = update(state, batch_of(1))
    assert metrics["lr"] == pytest.approx(0.05)
    step = np.abs(np.asarray(state.params["q_proj"]["kernel"]) - before)
    np.testing.assert_allclose(step, 0.05, rtol=1e-3)
    _, metrics = update(state, batch_of(1))
    assert metrics["lr"] == pytest.approx(0.1)


def test_two_steps_of_adam_by_hand():
    """Gradients 3 and 0.5 of one weight, clipped to 2 and 0.5; the second step divides both
    moments by their bias, 1 - b1^2 = 0.75 and 1 - b2^2 = 0.4375.
    """
    options = {"b1": 0.5, "b2": 0.75, "clip": 2.0, "warmup_steps": 0}
    tx, _ = make_optimizer(ConfigDict(OPTIM.to_dict() | options), 10)
    params = {"q_proj": {"kernel": jnp.ones((1, 1))}}
    state, steps = tx.init(params), []
    for gradient in (3.0, 0.5):
        gradients = {"q_proj": {"kernel": jnp.full((1, 1), gradient)}}
        updates, state = tx.update(gradients, state, params)
        steps.append(float(updates["q_proj"]["kernel"][0, 0]))
    first = 0.5 * (0.5 * 2.0) + 0.5 * 0.5
    second = 0.75 * (0.25 * 2.0**2) + 0.25 * 0.5**2
    expected = (first / 0.75) / np.sqrt(second / 0.4375)
    assert steps == pytest.approx([-0.1, -0.1 * expected], rel=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_first_step_has_a_rate_and_the_last_of_the_warm_up_the_whole(schedule, warmup):
    options = {"schedule": schedule, "warmup_steps": warmup}
    rate = make_optimizer(ConfigDict(OPTIM.to_dict() | options), 100)[1]
    rising = [float(rate(step)) for step in range(warmup)]
    assert rising == pytest.approx([0.1 * (step + 1) / warmup for step in range(warmup)])
    assert rate(warmup) == pytest.approx(0.1)


def test_cosine_ends_at_a_tenth():
    schedule = make_optimizer(ConfigDict(OPTIM.to_dict() | {"schedule": "cosine"}), 100)[1]
    assert schedule(2) == pytest.approx(0.1) and schedule(100) == pytest.approx(0.01)
    assert schedule(51) == pytest.approx(0.055)  # half of the way: between 0.1 and 0.01
    with pytest.raises(ValueError, match="'step'"):
        make_optimizer(ConfigDict(OPTIM.to_dict() | {"schedule": "step"}), 100)


def test_only_kernels_decay(mesh):
    tx, _ = make_optimizer(
        ConfigDict(OPTIM.to_dict() | {"weight_decay": 0.5, "warmup_steps": 0}), 10
    )
    params = {
        "q_proj": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"weight": jnp.ones(2)},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["q_proj"]["kernel"], 1 - 0.1 * 0.5)
    np.testing.assert_array_equal(after["q_proj"]["bias"], 1.0)
    np.testing.assert_array_equal(after["norm"]["weight"], 1.0)


def test_only_what_is_trained_moves_and_has_moments(mesh):
    tx, schedule = make_optimizer(ConfigDict(OPTIM.to_dict() | {"warmup_steps": 0}), 10)
    params = {
        "q_proj": {
            "kernel": jnp.ones((3, 2)),
            "lora_a": jnp.ones((3, 1)),
            "lora_b": jnp.zeros((1, 2)),
        }
    }

    def loss(params, batch):
        q = params["q_proj"]
        return loss_fn({"q_proj": {"kernel": q["kernel"] + q["lora_a"] @ q["lora_b"]}}, batch)

    state = from_params(params, tx, mesh, 0, is_adapter)
    assert sorted(x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim) == [
        (1, 2),
        (1, 2),
        (3, 1),
        (3, 1),
    ]
    kernel = state.params["q_proj"]["kernel"]
    update = Update(loss, tx, schedule, mesh, is_adapter)
    for _ in range(2):
        state, metrics = update(state, batch_of(2))
    assert state.params["q_proj"]["kernel"] is kernel and metrics["grad_norm"] > 0
    assert np.abs(state.params["q_proj"]["lora_b"]).min() > 0 and update.compilations() == 3


@pytest.mark.parametrize(
    "param_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_an_update_in_bfloat16(mesh, param_dtype):
    """Master weights in float32 with bfloat16 compute, or bfloat16 throughout: finite, moved, and
    the types stay.
    """
    config = small_config(dtype="bfloat16", param_dtype=param_dtype, num_layers=1)
    params = from_tensors(random_tensors(config), config)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    positions = jnp.tile(tokens[:, None], (1, 3, 1))
    inputs = (tokens, positions, jnp.ones_like(tokens), jnp.full_like(tokens, -1), None)

    def loss(params, batch):
        net = Qwen25VL(config)
        hidden = net.apply({"params": params}, *inputs)
        logits = net.apply({"params": params}, hidden, method="logits")
        assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
        return -(
            batch["w"] * jax.nn.log_softmax(logits[0, :-1])[np.arange(7), tokens[0, 1:]]
        ).sum(), {}

    def trained(name):
        return name.startswith(("model/", "lm_head/"))

    tx, schedule = make_optimizer(ConfigDict(OPTIM.to_dict() | {"warmup_steps": 0, "lr": 0.01}), 10)
    state, update = (
        from_params(params, tx, mesh, 0, trained),
        Update(loss, tx, schedule, mesh, trained),
    )
    losses = []
    for _ in range(3):
        state, metrics = update(state, {"w": np.full((1, 7), 1 / 7, np.float32)})
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0] and np.isfinite(losses).all()
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {param_dtype}
    assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(state.params))


def test_the_patch_embedding_takes_its_share_of_a_step():
    kernel = {"kernel": jnp.ones((2, 2))}
    params = {"visual": {"patch_embed": {"proj": kernel}, "merger": kernel}}

    def change(share):
        tx, _ = make_optimizer(ConfigDict(OPTIM.to_dict() | {"patch_embed_lr": share}), 10)
        updates, _ = tx.update(params, tx.init(params), params)
        return updates["visual"]["patch_embed"]["proj"]["kernel"], updates["visual"]["merger"]

    (whole, others), (tenth, same) = change(1.0), change(0.1)
    np.testing.assert_allclose(tenth, 0.1 * whole, rtol=1e-6)
    np.testing.assert_array_equal(same["kernel"], others["kernel"])
    assert np.abs(whole).max() > 0


def gap_loss(params, batch):
    loss, metrics = loss_fn(params, batch)
    return loss, metrics | {"gap": batch["w"].sum(), "gap_max": batch["x"].max()}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_metric_above_its_limit_skips_the_step(mesh, micro_batches):
    """The weights sum to 1 over micro-batches; the largest input is that of all of them."""
    batch = batch_of(micro_batches)
    for limit, skipped in ((0.99, 1.0), (1.01, 0.0)):
        tx, schedule = make_optimizer(OPTIM, 10)
        params = {"q_proj": {"kernel": jnp.ones((3, 2))}}
        state = from_params(params, tx, mesh, 0)
        before = np.asarray(state.params["q_proj"]["kernel"])
        update = Update(gap_loss, tx, schedule, mesh, limits={"gap": limit})
        state, metrics = update(state, batch)
        assert metrics["skipped"] == skipped
        assert metrics["gap_max"] == batch["x"].max()
        assert (np.asarray(state.params["q_proj"]["kernel"]) == before).all() == bool(skipped)


def test_schedules_that_fall_in_straight_lines():
    """From the third of 102 steps on; wsd stays for three quarters of the way."""
    rates = {
        name: make_optimizer(ConfigDict(OPTIM.to_dict() | {"schedule": name}), 102)[1]
        for name in ("linear", "wsd")
    }
    for step, linear, wsd in ((2, 0.1, 0.1), (52, 0.055, 0.1), (77, 0.0325, 0.1)):
        assert rates["linear"](step) == pytest.approx(linear)
        assert rates["wsd"](step) == pytest.approx(wsd)
    assert rates["wsd"](87) == pytest.approx(0.1 - 0.09 * 10 / 25)
    for rate in rates.values():
        assert rate(102) == rate(200) == pytest.approx(0.01)


def test_norms_by_part(mesh):
    """Each part's gradients are told apart, and together they are all."""
    params = {
        "visual": {"merger": {"mlp_0": {"kernel": jnp.full((2, 2), 3.0)}}},
        "model": {
            "embed_tokens": {"weight": jnp.full((1, 2), 2.0)},
            "layers": {"q_proj": {"kernel": jnp.full((1, 1), 5.0)}},
        },
        "lm_head": {"weight": jnp.full((1, 1), 1.0)},
    }

    def loss(params, batch):
        return batch["w"].sum() * sum((x**2).sum() / 2 for x in jax.tree.leaves(params)), {}

    tx, schedule = make_optimizer(ConfigDict(OPTIM.to_dict() | {"warmup_steps": 0}), 10)
    state, update = from_params(params, tx, mesh, 0), Update(loss, tx, schedule, mesh)
    _, metrics = update(state, {"w": np.ones((1, 1), np.float32)})
    norms = {"vision": 6.0, "tables": 3.0, "decoder": 5.0}
    for part, norm in norms.items():
        assert metrics[f"grad_norm/{part}"] == pytest.approx(norm)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(36 + 9 + 25))
    # Adam's first step moves every weight by the rate
    assert metrics["step_size/vision"] == pytest.approx(0.1 * 2, rel=1e-3)
    assert metrics["step_size/decoder"] == pytest.approx(0.1, rel=1e-3)


def optimizer(**fields):
    optim = ConfigDict(OPTIM.to_dict() | {"warmup_steps": 0, "clip": 1e9} | fields)
    return make_optimizer(optim, 10)[0]


def layered(shape=(3, 4, 6)):
    """Gradients of a stacked kernel inside layers, a norm and a table."""
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "model": {
            "layers": {"mlp": {"up_proj": {"kernel": kernel}}, "norm": {"weight": kernel[:, 0]}},
            "embed_tokens": {"weight": kernel[0]},
        }
    }


def test_muon_steps_by_an_orthogonal_matrix_of_each_layer_and_by_adam_elsewhere():
    grads = layered()
    tx = optimizer(name="muon")
    updates, _ = tx.update(grads, tx.init(grads), grads)
    step = -np.asarray(updates["model"]["layers"]["mlp"]["up_proj"]["kernel"])
    for one, gradient in zip(
        step, grads["model"]["layers"]["mlp"]["up_proj"]["kernel"], strict=True
    ):
        u, _, v = np.linalg.svd(np.asarray(gradient), full_matrices=False)
        # five Newton-Schulz turns: singular values near one, times what makes it as long as Adam's
        one = one / (0.1 * 0.2 * np.sqrt(6))
        np.testing.assert_allclose(one, u @ v, atol=0.35)
        assert 0.6 < np.linalg.svd(one, compute_uv=False).min() < 1.3
    adam = optimizer()
    plain, _ = adam.update(grads, adam.init(grads), grads)
    for path in (("layers", "norm"), ("embed_tokens",)):
        mine, other = updates["model"], plain["model"]
        for name in path:
            mine, other = mine[name], other[name]
        np.testing.assert_allclose(mine["weight"], other["weight"], rtol=1e-5)


def test_muon_takes_the_three_projections_of_the_tower_as_one_matrix():
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 3, 5)), jnp.float32)
    grads = {"visual": {"blocks": {"full": {"attn": {"qkv": {"kernel": kernel}}}}}}
    tx = optimizer(name="muon")
    updates, _ = tx.update(grads, tx.init(grads), grads)
    step = np.asarray(jax.tree.leaves(updates)[0])[0].reshape(4, 15)
    values = np.linalg.svd(step, compute_uv=False)
    assert values.max() < 2 * values.min()


def test_adafactor_keeps_sums_of_rows_and_columns():
    grads = layered((2, 128, 256))
    kernel = grads["model"]["layers"]["mlp"]["up_proj"]["kernel"][0]
    grads = {"up_proj": {"kernel": kernel}}
    tx = optimizer(name="adafactor", b1=0.0)
    state = tx.init(grads)
    assert sum(x.size for x in jax.tree.leaves(state)) < 500
    updates, _ = tx.update(grads, state, grads)
    square = np.asarray(kernel, np.float64) ** 2
    rows, columns = square.mean(1), square.mean(0)
    expected = np.asarray(kernel) / np.sqrt(np.outer(rows, columns) / rows.mean())
    expected /= max(1.0, np.sqrt((expected**2).mean()))
    np.testing.assert_allclose(updates["up_proj"]["kernel"], -0.1 * expected, rtol=1e-4)
    slow = optimizer(name="adafactor", b1=0.9)
    first, _ = slow.update(grads, slow.init(grads), grads)
    np.testing.assert_allclose(first["up_proj"]["kernel"], -0.01 * expected, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_decays_is_named_by_a_pattern(name):
    params = layered()
    zeros = jax.tree.map(jnp.zeros_like, params)

    def moved(**fields):
        tx = optimizer(name=name, weight_decay=0.5, **fields)
        updates, _ = tx.update(zeros, tx.init(params), params)
        return {
            path[-2].key
            for path, x in jax.tree_util.tree_leaves_with_path(updates)
            if np.abs(x).max() > 1e-3
        }

    assert moved() == {"up_proj"}
    assert moved(decay="norm/|embed") == {"norm", "embed_tokens"}
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    tx = optimizer(name=name, weight_decay=0.5)
    updates, _ = tx.update(zeros, tx.init(params), params)
    found = updates["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(found, -0.1 * 0.5 * kernel, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_skips_and_counts(mesh, name):
    optim = ConfigDict(OPTIM.to_dict() | {"name": name})
    tx, schedule = make_optimizer(optim, 10)
    params = {"layers": {"q_proj": {"kernel": jnp.ones((3, 2))}}}

    def loss(params, batch):
        return loss_fn(params["layers"], batch)

    state = from_params(params, tx, mesh, 0)
    update = Update(loss, tx, schedule, mesh)
    losses = []
    for _ in range(8):
        state, metrics = update(state, batch_of(2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0] and metrics["lr"] == pytest.approx(0.1)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = update(state, poisoned(2, np.nan))
    assert metrics["skipped"] == 1.0
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state))
    assert update.compilations() == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_cut_like_their_parameters_and_sums_are_copied(mesh, name):
    shape = jax.ShapeDtypeStruct((2, 256, 512), jnp.float32)
    params = {"layers": {"up_proj": {"kernel": shape}}}
    tx, _ = make_optimizer(ConfigDict(OPTIM.to_dict() | {"name": name}), 10)
    state = abstract_state(params, tx, mesh)
    cut = state.params["layers"]["up_proj"]["kernel"].sharding.spec
    assert "fsdp" in str(cut)
    moments = 0
    for leaf in jax.tree.leaves(state.opt_state):
        if leaf.shape == shape.shape:
            assert leaf.sharding.spec == cut
            moments += 1
        else:
            assert leaf.sharding.spec == PartitionSpec()
    assert moments == {"adamw": 2, "adafactor": 1, "muon": 1}[name]


def test_an_optimizer_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"optim.name='lion': use adamw, adafactor, muon"):
        optimizer(name="lion")


def test_a_sum_in_bfloat16_is_right_in_the_mean():
    weights = jnp.full(40_000, 0.02, jnp.bfloat16)
    step = jnp.full(weights.shape, -1e-5, jnp.bfloat16)
    assert (optax.apply_updates(weights, step) == weights).all()  # to the nearest: nothing moves
    moved = np.asarray(added(weights, step, jax.random.key(0)), np.float64)
    assert len(np.unique(moved)) == 2  # the two neighbours
    wanted = float(weights[0]) + float(step[0])
    spacing = np.ptp(np.unique(moved))
    assert moved.mean() == pytest.approx(wanted, abs=4 * spacing / 2 / np.sqrt(moved.size))
    exact = jnp.asarray([0.5, -2.0, 0.0], jnp.bfloat16)
    assert (added(exact, jnp.zeros_like(exact), jax.random.key(1)) == exact).all()
    whole = jnp.asarray([0.1], jnp.float32)
    assert added(whole, whole, jax.random.key(1)) == 2 * whole


def halves(mesh, rounding):
    """One weight of bfloat16 and 64 steps of a rate that it rounds away."""

    def loss(params, batch):
        return (batch["w"] * params["q_proj"]["kernel"].astype(jnp.float32).sum()).sum(), {}

    optim = ConfigDict(OPTIM.to_dict() | {"warmup_steps": 0, "lr": 1e-5})
    tx, schedule = make_optimizer(optim, 100)
    params = {"q_proj": {"kernel": jnp.full((64, 64), 0.02, jnp.bfloat16)}}
    state = from_params(params, tx, mesh, 0)
    update = Update(loss, tx, schedule, mesh, rounding=rounding)
    for _ in range(64):
        state, _ = update(state, {"w": np.ones((2, 1), np.float32)})
    return np.asarray(state.params["q_proj"]["kernel"], np.float64).mean(), update


def test_small_steps_of_bfloat16_weights_add_up(mesh):
    start = float(jnp.bfloat16(0.02))
    assert halves(mesh, "nearest")[0] == start
    mean, update = halves(mesh, "stochastic")
    assert mean == pytest.approx(start - 64 * 1e-5, rel=0.01)
    assert mean == halves(mesh, "stochastic")[0]  # the same chance again
    assert update.compilations() == 3


def test_gradients_of_bfloat16_weights_are_summed_in_float32(mesh):
    """512 parts beside one whole: in bfloat16 their sum would stop at a half."""

    def loss(params, batch):
        return (batch["w"] * params["q_proj"]["kernel"].astype(jnp.float32)).sum(), {}

    tx, schedule = make_optimizer(OPTIM, 10)
    params = {"q_proj": {"kernel": jnp.zeros((1, 1), jnp.bfloat16)}}
    norms = []
    for count in (1, 512):
        state = from_params(jax.tree.map(jnp.copy, params), tx, mesh, 0)
        update = Update(loss, tx, schedule, mesh)
        _, metrics = update(state, {"w": np.full((count, 1, 1), 1 / count, np.float32)})
        norms.append(float(metrics["grad_norm"]))
    assert norms == [1.0, 1.0]
    assert sum_type(jnp.bfloat16) == sum_type(jnp.float32) == jnp.float32


def test_the_average_of_parameters_is_kept_beside_them(mesh):
    optim = ConfigDict(OPTIM.to_dict() | {"warmup_steps": 0, "ema": 0.75})
    tx, schedule = make_optimizer(optim, 10)
    params = {"q_proj": {"kernel": jnp.ones((3, 2))}}
    state, update = from_params(params, tx, mesh, 0), Update(loss_fn, tx, schedule, mesh)
    plain, plain_update = start(mesh)
    expected = np.ones((3, 2))
    for step in range(4):
        state, _ = update(state, batch_of(2) if step != 2 else poisoned(2, np.nan))
        kernel = np.asarray(state.params["q_proj"]["kernel"])
        expected = expected if step == 2 else 0.75 * expected + 0.25 * kernel
        np.testing.assert_allclose(usable(state)["q_proj"]["kernel"], expected, rtol=1e-6)
    assert np.abs(expected - kernel).max() > 0.01
    # without one, what is trained is what is used
    plain, _ = plain_update(plain, batch_of(2))
    assert usable(plain) is plain.params and average_of(plain.opt_state) is None


def test_an_average_is_of_what_is_trained_and_keeps_more_than_bfloat16(mesh):
    tx, _ = make_optimizer(ConfigDict(OPTIM.to_dict() | {"ema": 0.999}), 10)
    half = jnp.full((2, 2), 0.02, jnp.bfloat16)
    params = {"q_proj": {"lora_a": half, "kernel": half}}
    state = from_params(params, tx, mesh, 0, is_adapter)
    average = average_of(state.opt_state)
    assert list(average["q_proj"]) == ["lora_a"]
    assert average["q_proj"]["lora_a"].dtype == jnp.float32
    used = usable(state)["q_proj"]
    assert used["lora_a"].dtype == jnp.bfloat16 and (used["kernel"] == half).all()

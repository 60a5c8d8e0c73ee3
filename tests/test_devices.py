"""One device or eight: the same losses, gradients and rollouts."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

PROGRAM = textwrap.dedent(
    """
    import sys

    import jax
    import numpy as np

    devices, source, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_num_cpu_devices", devices)

    from mmrecoder_jax import distributed, grpo, runtime
    from mmrecoder_jax.config import load
    from mmrecoder_jax.data import pipeline
    from mmrecoder_jax.data.batching import BatchShape, Collate
    from mmrecoder_jax.rl.rollout import FULL_TRAJECTORY
    from mmrecoder_jax.env import ChartEnv

    config = load("stage2", "smoke")
    config.init_from = source
    config.data.dir = source + "/data"
    config.rl.response_length = 16
    config.mesh.update({"data": 2 if devices > 1 else 1, "fsdp": -1})
    built = runtime.build(config, source)
    assert built.mesh.size == devices
    params = built.initial_params()
    charts = built.charts("train")
    with ChartEnv(runtime.env_config(config)) as env:
        engine = built.engine(env, 1.0)
        groups = engine.rollout(params, [charts[i] for i in range(8)], range(8), jax.random.key(5), mode=FULL_TRAJECTORY, group=2)
    trajectories = [t for group in groups for t in group]
    advantages = np.linspace(-1, 1, 16).reshape(8, 2)
    rows = grpo.learner_rows(groups, advantages, FULL_TRAJECTORY, mask_truncated=False)
    collate = Collate(BatchShape(16, (264,), (12,), 24), built.layout)
    batch = distributed.to_global(pipeline.learner_batch(rows, collate), built.mesh, axis=1)
    gradient = jax.jit(jax.value_and_grad(grpo.make_loss(built), has_aux=True))
    with jax.set_mesh(built.mesh):
        (loss, metrics), grads = gradient(params, jax.tree.map(lambda x: x[0], batch))
    ids = np.concatenate([turn.ids for t in trajectories for turn in t.turns])
    logps = np.concatenate([turn.logps for t in trajectories for turn in t.turns])
    flat = np.concatenate([np.asarray(g).ravel() for g in jax.tree.leaves(grads)])
    np.savez(out, loss=loss, logp=metrics["logp"], ids=ids, logps=logps, grads=flat)
    """
)


@pytest.fixture(scope="module")
def results(tmp_path_factory, policy):
    """The program's numbers on one device and on eight (mesh data=2, fsdp=4), from the same saved policy."""
    import optax

    from mmrecoder_jax.checkpoint import Checkpoints
    from mmrecoder_jax.data.pipeline import prompts
    from mmrecoder_jax.train_state import from_params

    runtime = policy.runtime
    directory = tmp_path_factory.mktemp("devices")
    with Checkpoints(runtime.workdir, 1) as checkpoints:
        state = from_params(policy.params, optax.sgd(0.1), runtime.mesh, 0)
        checkpoints.save(state, iter(prompts(policy.charts, 2, seed=0)), {})
    loaded = {}
    for devices in (1, 8):
        out = str(directory / f"{devices}.npz")
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(devices), runtime.workdir, out],
            capture_output=True,
            text=True,
            timeout=900,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        loaded[devices] = np.load(out)
    return loaded[1], loaded[8]


def test_rollouts_are_the_same(results):
    one, eight = results
    np.testing.assert_array_equal(one["ids"], eight["ids"])
    np.testing.assert_allclose(one["logps"], eight["logps"], atol=1e-5)


def test_loss_and_gradients_are_the_same(results):
    one, eight = results
    np.testing.assert_allclose(one["loss"], eight["loss"], atol=1e-5)
    np.testing.assert_allclose(one["logp"], eight["logp"], rtol=1e-5)
    scale = np.abs(one["grads"]).max()
    assert scale > 1e-3
    np.testing.assert_allclose(one["grads"] / scale, eight["grads"] / scale, atol=1e-5)

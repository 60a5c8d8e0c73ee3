"""One device, eight, or eight on two hosts: the same losses, gradients and rollouts."""

import os
import socket
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

    devices, source, out, host, hosts, address = int(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:6]), sys.argv[6]
    jax.config.update("jax_num_cpu_devices", devices // hosts)
    if hosts > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, hosts, host)

    from mmrecoder_jax import grpo
    from mmrecoder_jax.learner import distributed
    from mmrecoder_jax.stage import build, env_config
    from mmrecoder_jax.config import load
    from mmrecoder_jax.data import pipeline
    from mmrecoder_jax.data.batching import BatchShape, Collate
    from mmrecoder_jax.rl.learner_batch import learner_rows
    from mmrecoder_jax.rl.trajectory import Mode
    from mmrecoder_jax.env import ChartEnv

    config = load("stage2", "smoke")
    config.init_from = source
    config.data.dir = source + "/data"
    config.rl.response_length = 16
    config.mesh.update({"data": 2 if devices > 1 else 1, "fsdp": -1})
    built = build(config, source)
    assert built.mesh.size == devices
    params = built.initial_params()
    charts = built.charts("train")
    with ChartEnv(env_config(config)) as env:
        engine = built.engine(env, 1.0)
        own = range(8 // hosts * host, 8 // hosts * (host + 1))
        groups = engine.rollout(params, [charts[i] for i in own], own, jax.random.key(5), mode=Mode.FULL_TRAJECTORY, group=2)
    trajectories = [t for group in groups for t in group]
    advantages = np.linspace(-1, 1, 16).reshape(8, 2)
    rows = learner_rows(groups, advantages[own.start : own.stop], Mode.FULL_TRAJECTORY, mask_truncated=False)
    shape = BatchShape(16 // hosts, (264,), (12,), 32 // hosts)
    collate = Collate(shape, built.layout, totals=distributed.global_sum, largest=distributed.global_max)
    batch = distributed.to_global(pipeline.learner_batch(rows, collate), built.mesh, axis=1)
    everywhere = jax.sharding.NamedSharding(built.mesh, jax.sharding.PartitionSpec())
    gradient = jax.jit(jax.value_and_grad(grpo.make_loss(built.config.rl, built.token_logps()), has_aux=True), out_shardings=everywhere)
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
    """The program's numbers on one device, on eight (mesh data=2, fsdp=4) and on eight that two
    processes share, from the same policy.
    """
    import optax

    from mmrecoder_jax.data.pipeline import prompts
    from mmrecoder_jax.learner.checkpoint import Checkpoints
    from mmrecoder_jax.learner.update import from_params

    stage = policy.stage
    directory = tmp_path_factory.mktemp("devices")
    with Checkpoints(stage.workdir, 1) as checkpoints:
        state = from_params(policy.params, optax.sgd(0.1), stage.mesh, 0)
        checkpoints.save(state, iter(prompts(policy.charts, 2, seed=0)), {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    loaded = {}
    for name, devices, hosts in (("one", 1, 1), ("eight", 8, 1), ("two hosts", 8, 2)):
        outs = [str(directory / f"{name}{host}.npz") for host in range(hosts)]
        commands = [
            [
                sys.executable,
                "-c",
                PROGRAM,
                str(devices),
                stage.workdir,
                out,
                str(host),
                str(hosts),
                address,
            ]
            for host, out in enumerate(outs)
        ]
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        running = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
            for command in commands
        ]
        for process in running:
            _, problem = process.communicate(timeout=900)
            assert process.returncode == 0, problem[-3000:]
        loaded[name] = [np.load(out) for out in outs]
    return loaded


@pytest.mark.parametrize("other", ["eight", "two hosts"])
def test_rollouts_are_the_same(results, other):
    (one,) = results["one"]
    np.testing.assert_array_equal(
        one["ids"], np.concatenate([part["ids"] for part in results[other]])
    )
    np.testing.assert_allclose(
        one["logps"], np.concatenate([part["logps"] for part in results[other]]), atol=1e-5
    )


@pytest.mark.parametrize("other", ["eight", "two hosts"])
def test_loss_and_gradients_are_the_same(results, other):
    (one,) = results["one"]
    scale = np.abs(one["grads"]).max()
    assert scale > 1e-3
    for part in results[other]:
        np.testing.assert_allclose(one["loss"], part["loss"], atol=1e-5)
        np.testing.assert_allclose(one["logp"], part["logp"], rtol=1e-5)
        np.testing.assert_allclose(one["grads"] / scale, part["grads"] / scale, atol=1e-5)

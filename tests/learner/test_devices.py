"""One device, eight, or eight on two hosts: the same losses, gradients and rollouts."""

import socket
import subprocess
import sys

import numpy as np
import optax
import pytest

from mmrecoder_jax.data.pipeline import prompts
from mmrecoder_jax.data.survey import BadRows
from mmrecoder_jax.learner.checkpoint import Checkpoints
from mmrecoder_jax.learner.update import from_params

pytestmark = pytest.mark.slow  # the sampler is compiled three times


@pytest.fixture(scope="module")
def results(tmp_path_factory, policy):
    """The numbers of `devices_main` from one policy: on one device, on eight (mesh data=2,
    fsdp=4), and on eight that two processes share.
    """
    stage = policy.stage
    directory = tmp_path_factory.mktemp("devices")
    with Checkpoints(stage.workdir, 1) as checkpoints:
        state = from_params(policy.params, optax.sgd(0.1), stage.mesh, 0)
        stream = prompts(policy.charts, 2, policy.stage.processor, BadRows(0), seed=0)
        checkpoints.save(state, iter(stream), {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    loaded = {}
    for name, devices, hosts in (("one", 1, 1), ("eight", 8, 1), ("two hosts", 8, 2)):
        outs = [str(directory / f"{name}{host}.npz") for host in range(hosts)]
        program = [sys.executable, "-m", "tests.learner.devices_main", str(devices)]
        commands = [
            [*program, stage.workdir, out, str(host), str(hosts), address]
            for host, out in enumerate(outs)
        ]
        running = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands
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

"""Two processes give what one gives: rollouts, evaluations, monitors, trajectories, training."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

from mmrecoder_jax.data.pipeline import prompts
from mmrecoder_jax.data.survey import BadRows
from mmrecoder_jax.learner.checkpoint import Checkpoints
from mmrecoder_jax.learner.update import from_params


def environments(hosts):
    """The environment of each of so many processes."""
    if hosts == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        os.environ
        | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(hosts),
            "JAX_PROCESS_ID": str(host),
        }
        for host in range(hosts)
    ]


def run(command, hosts, seconds=900):
    """(output, errors) of the command in each of so many processes, all of which must end well."""
    running = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for env in environments(hosts)
    ]
    found = []
    for process in running:
        found.append(process.communicate(timeout=seconds))
        assert process.returncode == 0, found[-1][0][-2000:] + found[-1][1][-3000:]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory, policy):
    """What `hosts_main` found on one host, and on each of two; and where it wrote."""
    stage = policy.stage
    with Checkpoints(stage.workdir, 1) as checkpoints:
        state = from_params(policy.params, optax.sgd(0.1), stage.mesh, 0)
        stream = prompts(policy.charts, 2, stage.processor, BadRows(0), seed=0)
        checkpoints.save(state, iter(stream), {})
    found = {}
    for hosts in (1, 2):
        out = tmp_path_factory.mktemp(f"hosts{hosts}")
        command = [sys.executable, "-m", "tests.learner.hosts_main", stage.workdir, str(out)]
        run(command, hosts)
        found[hosts] = [json.loads((out / f"{host}.json").read_text()) for host in range(hosts)]
        found[hosts, "trajectories"] = out / "trajectories"
    return found


def test_a_charts_answers_do_not_depend_on_the_number_of_hosts(results):
    (one,) = results[1]
    for part in results[2]:
        for temperature in ("0.0", "1.0"):
            assert part[f"texts {temperature}"] == one[f"texts {temperature}"]
    assert [number for number, _ in one["texts 1.0"]] == [0, 1, 2, 3, 4, 5, 6]


def test_an_evaluation_is_of_all_hosts_and_counts_what_it_refused(results):
    (one,) = results[1]
    for part in results[2]:
        assert part["rows 1.0"] == one["rows 1.0"] and part["rows 0.0"] == one["rows 0.0"]
    for row in one["rows 1.0"]:
        assert (row["charts"], row["refused"]) == (7, 1)


def test_metrics_are_of_all_hosts(results):
    (one,) = results[1]
    for part in results[2]:
        logps = {name for name in one["metrics"] if name.endswith("logp")}
        assert part["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            if name == "silent_groups":
                assert value == 0.25 and part["metrics"][name] == 0.25  # one of four, of host 0
            else:
                assert part["metrics"][name] == pytest.approx(
                    value, abs=1e-5 if name in logps else 1e-12
                ), name
    assert one["metrics"]["env/executions"] == 4 + 8
    rates = [one["metrics"][f"turn{turn}/oversized"] for turn in (1, 2)]
    assert max(rates) > 0, "no figure was too thin: this test would not notice it"


def test_trajectories_of_all_hosts_are_in_one_file(results):
    files = [results[hosts, "trajectories"] / "000001.jsonl" for hosts in (1, 2)]
    one, two = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert len(one) == 8 and one == two
    renders = [sorted(path.name for path in (file.parent / "renders").iterdir()) for file in files]
    assert renders[0] == renders[1] != []


def test_no_shape_is_a_hosts_own(results):
    """One host's scripts failed while the other's drew: the same programs served both."""
    assert len({part["programs"] for part in results[2]}) == 1

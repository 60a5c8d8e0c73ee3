"""A process is alone only where nothing says otherwise: launchers as their variables show them."""

import os
import socket
import subprocess
import sys
import time

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.learner.cluster import Plan, plan

STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
THREE = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
ARGUMENTS = {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1}


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "77"},  # a login node with an allocation
        # the batch script of a job of two tasks, which is no step
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # the shell of salloc -n 2
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"JAX_NUM_PROCESSES": "1"},
        {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
        | {"JAX_NUM_PROCESSES": "1"},
    ],
)
def test_one_process_is_alone(environ):
    assert plan(environ).arguments is None


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        (STEP, 2),
        (without(STEP, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"), 2),
        (STEP | {"PMI_SIZE": "2", "PMI_RANK": "1"}, 2),  # srun --mpi=pmi2
        (OPEN_MPI, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, 2),  # one host a slice
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "4"}, 8),
        ({"MEGASCALE_NUM_SLICES": "2"}, 0),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, 0),
        (STEP | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, 2),
    ],
)
def test_clusters_that_jax_knows_are_left_to_it(environ, count):
    found = plan(environ)
    assert (found.arguments, found.count) == ({}, count) and found.others


@pytest.mark.parametrize(
    "environ",
    [
        THREE,
        THREE | STEP,
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "PMI_SIZE": "2", "PMI_RANK": "1"},
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "WORLD_SIZE": "2", "RANK": "1"},
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"} | without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"),
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"} | without(STEP, "SLURM_STEP_NODELIST"),
    ],
)
def test_an_address_leads_to_the_others(environ):
    assert plan(environ).arguments == ARGUMENTS


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (without(THREE, "JAX_PROCESS_ID"), "without JAX_PROCESS_ID"),
        (without(THREE, "JAX_NUM_PROCESSES"), "without JAX_NUM_PROCESSES"),
        (without(THREE, "JAX_COORDINATOR_ADDRESS"), "without JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (THREE | {"JAX_PROCESS_ID": "2"}, "are 0 to 1"),
        (THREE | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one'"),
        (THREE | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "give HOST:PORT"),
        (THREE | STEP | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, "one of the two is"),
        (without(STEP, "SLURM_STEP_NODELIST"), "without SLURM_STEP_NODELIST"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "Slurm started 2 processes"),
        (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), "Open MPI started 2 processes"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "MPI started 4 processes"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "torchrun started 2 processes"),
    ],
)
def test_half_of_what_leads_to_others_is_refused_in_one_line(environ, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        plan(environ)
    assert "\n" not in str(refusal.value)


def test_chips_without_variables_are_for_jax_to_find_out():
    assert plan({}, tpu=True) == Plan({})


# ---------------------------------------------------------------- real processes


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(environ, *arguments):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "JAX_PLATFORMS")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.learner.join_main", *arguments],
        env=kept | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(*environs, seconds="60"):
    """(exit status, last line) of a process for each environment."""
    running = [start(environ, seconds) for environ in environs]
    found = []
    for process in running:
        out, problem = process.communicate(timeout=120)
        found.append((process.returncode, (out + problem).strip().splitlines()[-1]))
    return found


def slurm(port, rank):
    number = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    return STEP | number | {"JAX_COORDINATOR_PORT": port}


def open_mpi(port, rank):
    number = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
    return OPEN_MPI | number | {"JAX_COORDINATOR_PORT": port}


def own(port, rank):
    return THREE | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_PROCESS_ID": rank}


@pytest.mark.parametrize("launcher", [slurm, open_mpi, own])
def test_two_processes_of_a_launcher_are_one_run(launcher, port):
    assert outputs(launcher(port, "0"), launcher(port, "1")) == [
        (0, "process 0 of 2 sum 3"),
        (0, "process 1 of 2 sum 3"),
    ]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_does_not_come_is_waited_for_and_named(port, rank):
    begun = time.monotonic()
    ((status, line),) = outputs(own(port, rank), seconds="5")
    assert status == 1 and time.monotonic() - begun < 60
    missing = 1 - int(rank)
    assert line.startswith(f"error: waited 5 s for process {missing} of 2, which ")


def test_a_cluster_that_jax_does_not_find_is_refused():
    ((status, line),) = outputs({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"})
    assert status == 1 and line.startswith("error: this TPU has 2 slices of 1 hosts")
    assert "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in line


def test_no_cluster_is_no_run_of_several():
    assert outputs({}, {"SLURM_JOB_ID": "77"}) == [(0, "process 0 of 1 sum 1")] * 2

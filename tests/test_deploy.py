"""The files of deploy/: that they parse, fit together and start what the project understands."""

import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from mmrecoder_jax.learner import cluster
from tests.scripts.run import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import check_commands

sys.path.remove(str(ROOT / "scripts"))

DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))


def instructions(path):
    """(name, rest) of each instruction of a Dockerfile, lines joined."""
    text = re.sub(r"\\\n *", " ", path.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_installs_the_package_and_runs_as_nobody_in_particular(path):
    found = dict(instructions(path))
    assert re.fullmatch(r"python:3\.1[1-9]-slim", found["FROM"])
    assert found["USER"] == "1000"  # a number, which Kubernetes can tell from root
    (extras,) = re.findall(r"/src\[([\w,]+)\]", found["RUN"])
    assert ("cpu" if extras == "charts" else extras.split(",")[0]) == path.stem
    assert not list(check_commands.check_command(["pip", "install", f".[{extras}]"]))
    assert found["ENTRYPOINT"] == '["python", "-m"]'
    assert not list(check_commands.check_command(["python", "-m", "mmrecoder_jax.train"]))


def test_there_is_an_image_for_each_kind():
    assert [path.stem for path in DOCKERFILES] == ["cpu", "cuda", "tpu"]


def test_commands_in_the_comments_exist():
    for path in DOCKERFILES:
        for line in re.findall(r"^#   docker run .*", path.read_text(encoding="utf-8"), re.M):
            words = shlex.split(line.lstrip("# "))
            words = words[next(i for i, w in enumerate(words) if w.startswith("mmrecoder:")) + 1 :]
            assert not list(check_commands.check_command(["python", "-m", *words]))


@pytest.fixture(scope="module")
def jobset():
    text = (ROOT / "deploy" / "gke" / "jobset.yaml").read_text(encoding="utf-8")
    (found,) = yaml.safe_load_all(text)
    return found


def test_the_jobset_has_a_pod_for_each_host_of_its_slice(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    hosts = math.prod(map(int, topology.split("x"))) // chips
    assert job["parallelism"] == job["completions"] == hosts
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert not list(check_commands.check_command(["python", "-m", *container["args"]]))
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert "--workdir=/runs/stage2" in container["args"] and mounts["runs"] == "/runs"
    # What GKE tells the pods is understood as one run of all hosts.
    plan = cluster.plan(
        {
            "TPU_WORKER_HOSTNAMES": ",".join(f"slice-0-{i}.mmrecoder" for i in range(hosts)),
            "TPU_WORKER_ID": "1",
            "JOB_COMPLETION_INDEX": "1",
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        },
        tpu=True,
    )
    assert plan.arguments == {} and plan.count == hosts


def test_kubernetes_takes_the_jobs_of_the_jobset(jobset):
    validate = pytest.importorskip("kubernetes_validate")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
    job["spec"] = replicated["template"]["spec"]
    validate.validate(job, validate.latest_version(), strict=True)


@pytest.mark.parametrize("status, queued", [(0, False), (1, False), (75, True), (143, True)])
def test_the_batch_file_queues_again_what_was_pre_empted(tmp_path, status, queued):
    for name, body in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/told')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "deploy" / "slurm" / "train.sbatch"), "--config=stage2"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        check=False,
    )
    assert done.returncode == status
    told = tmp_path / "told"
    assert told.exists() == queued and (not queued or told.read_text() == "requeue 7\n")


def test_the_batch_file_starts_a_process_for_each_gpu(tmp_path):
    path = ROOT / "deploy" / "slurm" / "train.sbatch"
    text = path.read_text(encoding="utf-8")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    given = ["--config=stage2", "--workdir=runs/a b"]
    done = subprocess.run(
        ["bash", str(path), *given],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    start = words.index(".venv/bin/python")
    grace = "--config.checkpoint.grace_seconds=55"  # Slurm tells it a minute before
    assert words[start:] == [".venv/bin/python", "-m", "mmrecoder_jax.train", grace, *given]
    assert options["signal"] == "TERM@60"
    count = int(options["nodes"]) * int(options["ntasks-per-node"])
    plan = cluster.plan(
        {
            **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]"},
            **{"SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count)},
            **{"SLURM_PROCID": "9", "SLURM_LOCALID": "1"},
        }
    )
    assert plan.arguments == {} and plan.count == count

"""Points as jobs: what the files say, and that each kind's own parser takes them where it is
installed (`pip install xpk skypilot kubernetes-validate` in an environment of their own).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.learner import cluster
from mmrecoder_jax.sweeping.jobs import KINDS, job_name, write_jobs
from mmrecoder_jax.sweeping.points import Point
from tests.sweeping.sweeps import sweep_in
from tests.sweeping.test_results import write_run

TRAIN = ("python", "-m", "mmrecoder_jax.train")
PAIRS = {
    "slurm": [],
    "kueue": ["image=here/mm:1", "queue=user", "claim=runs", "workdir=/runs/eta"],
    "xpk": ["image=here/mm:1", "cluster=c", "tpu_type=v5litepod-16", "workdir=/runs/eta"],
    "skypilot": ["accelerators=H100:1", "bucket=gs://b", "workdir=/runs/eta"],
}


def written(tmp_path, kind, *more, points=None):
    sweep, all_points = sweep_in(tmp_path)
    path, use = write_jobs(sweep, points or all_points, kind, [*PAIRS[kind], *more], TRAIN)
    return path, use, all_points


def command(point, workdir="/runs/eta"):
    flags = ["--config=stage2:smoke", f"--workdir={workdir}/{point.name}", *point.flags()]
    return [*TRAIN, *flags]


def test_slurm_is_an_array_of_which_every_task_runs_its_point(tmp_path):
    path, use, points = written(tmp_path, "slurm")
    assert use == f"submit it with `sbatch {path}`"
    assert "#SBATCH --array=0-3\n" in path.read_text()
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    for number, point in enumerate(points):
        env = os.environ | {
            "PATH": f"{srun.parent}:{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": str(number),
        }
        done = subprocess.run(
            ["bash", str(path)], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == command(point, str(tmp_path))
    env["SLURM_ARRAY_TASK_ID"] = "4"
    done = subprocess.run(["bash", str(path)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "error: no point 4: use --array=0-3\n"


@pytest.mark.parametrize("status", [0, 1, 75, 143])
def test_a_task_of_slurm_that_was_told_to_end_is_queued_again(status, tmp_path):
    path, _, _ = written(tmp_path, "slurm")
    assert "#SBATCH --requeue\n#SBATCH --signal=TERM@60\n" in path.read_text()
    (tmp_path / "bin").mkdir()
    for name, body in {"srun": f"exit {status}", "scontrol": 'echo "$*"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(["bash", str(path)], env=env, capture_output=True, text=True, check=False)
    again = "requeue 7_2\n" if status > 1 else ""
    assert (done.returncode, done.stdout, done.stderr) == (status, again, "")


def test_a_pod_of_kueue_that_was_told_to_end_has_not_failed(tmp_path):
    path, _, _ = written(tmp_path, "kueue")
    for job in yaml.safe_load_all(path.read_text()):
        (rule,) = job["spec"]["podFailurePolicy"]["rules"]
        pod = job["spec"]["template"]["spec"]
        assert pod["restartPolicy"] == "Never", "Kubernetes refuses the rule otherwise"
        names = [container["name"] for container in pod["containers"]]
        codes = {"containerName": names[0], "operator": "In", "values": [75, 143]}
        assert rule == {"action": "Ignore", "onExitCodes": codes}


def test_finished_points_need_no_job(tmp_path):
    sweep, points = sweep_in(tmp_path)
    write_run(sweep, points[1], [0.1])
    path, _, _ = written(tmp_path, "slurm")
    assert "--array=0-2\n" in path.read_text() and points[1].name not in path.read_text()
    for point in (points[0], *points[2:]):
        write_run(sweep, point, [0.1])
    with pytest.raises(ConfigError, match="no job is needed, 4 points have finished"):
        written(tmp_path, "slurm")


def test_slurm_takes_values_that_a_shell_would_change(tmp_path):
    point = Point.of({"feedback.render": "Say $HOME; don't `stop`"})
    path, _, _ = written(tmp_path, "slurm", points=[point])
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("0) ")]
    words = shlex.split(line.removesuffix(" || status=$? ;;"))
    assert words[-1] == "--config.feedback.render=Say $HOME; don't `stop`"


def test_kueue_is_a_job_for_each_point_that_waits_for_its_queue(tmp_path):
    path, _, points = written(tmp_path, "kueue")
    jobs = list(yaml.safe_load_all(path.read_text()))
    assert len({job["metadata"]["name"] for job in jobs}) == len(points)
    for job, point in zip(jobs, points, strict=True):
        assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "user"}
        assert job["spec"]["suspend"] is True and "completionMode" not in job["spec"]
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["command"] == command(point)
        assert container["resources"]["requests"]["nvidia.com/gpu"] == "1"
        assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]
        assert "nodeSelector" not in pod
    # A pod of such a Job is alone for the project: Kubernetes numbers the pods of indexed ones.
    assert cluster.plan({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == cluster.Plan()


def test_kueue_on_tpu_chips(tmp_path):
    path, _, _ = written(tmp_path, "kueue", "tpu=4", "tpu_topology=2x2")
    pod = next(yaml.safe_load_all(path.read_text()))["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "2x2",
    }
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits["google.com/tpu"] == "4" and "nvidia.com/gpu" not in limits


def test_xpk_creates_a_workload_for_each_point(tmp_path):
    path, _, points = written(tmp_path, "xpk", "storage=disk")
    lines = [shlex.split(line) for line in path.read_text().splitlines() if line[:3] == "xpk"]
    assert len(lines) == len(points)
    for words, point in zip(lines, points, strict=True):
        assert words[:3] == ["xpk", "workload", "create"]
        assert f"--workload={job_name('/runs/eta', point)}" in words and "--storage=disk" in words
        assert f"--command={shlex.join(command(point))}" in words
        assert not any(word.startswith("--zone") for word in words)
        assert {"--max-restarts=10", "--restart-on-exit-codes=75"} <= set(words)


def test_skypilot_launches_a_task_for_each_point(tmp_path):
    path, _, points = written(tmp_path, "skypilot", "spot=false")
    lines = [shlex.split(line) for line in path.read_text().splitlines() if line[:3] == "sky"]
    for words, point in zip(lines, points, strict=True):
        assert words[:5] == ["sky", "jobs", "launch", "--yes", "--detach-run"]
        with open(words[5], encoding="utf-8") as f:
            task = yaml.safe_load(f)
        assert shlex.split(task["run"]) == command(point)
        assert task["file_mounts"] == {"/runs": {"source": "gs://b", "mode": "MOUNT"}}
        assert task["resources"] == {"accelerators": "H100:1", "use_spot": False}


@pytest.mark.parametrize(
    ("kind", "pairs", "message"),
    [
        ("lsf", [], "--jobs=lsf: use one of slurm, kueue, xpk, skypilot"),
        ("slurm", ["image=a"], "--job=image=a: jobs of slurm have no such key; there are: none"),
        ("kueue", [], "--jobs=kueue needs --job=image=..., such as image=REGISTRY"),
        ("kueue", [*PAIRS["kueue"], "gpu=2"], "--job=gpu=2: jobs of kueue have no such key"),
        ("kueue", [*PAIRS["kueue"], "gpus"], "--job=gpus: write gpus=VALUE"),
        ("kueue", [*PAIRS["kueue"], "workdir=runs/eta"], "give an absolute path below the volume"),
    ],
)
def test_what_no_job_can_be_written_with(tmp_path, kind, pairs, message):
    sweep, points = sweep_in(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        write_jobs(sweep, points, kind, pairs, TRAIN)
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize("base", ["runs/eta", "/x/4", "/x/Ä b", "/" + "x" * 80])
def test_names_of_jobs_are_labels_of_a_cluster(base):
    points = [Point.of({"reward.eta": eta, "seed": 0}) for eta in (0.0, 0.1, -0.1)]
    names = {job_name(base, point) for point in points}
    assert len(names) == 3
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,38}[a-z0-9]", name) for name in names)


# ---------------------------------------------------------------- the parsers of others


def other_python(package):
    """A Python that has the package: named by MMRECODER_PARSERS, or this one."""
    python = os.environ.get("MMRECODER_PARSERS", sys.executable)
    probe = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    if subprocess.run([python, "-c", probe], check=False).returncode:
        pytest.skip(f"{package} is not installed in {python}")
    return python


def parsed_by(package, source, *words):
    done = subprocess.run(
        [other_python(package), "-c", source, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_kubernetes_takes_the_jobs(tmp_path):
    path, _, _ = written(tmp_path, "kueue", "tpu=4")
    source = """
import sys, yaml, kubernetes_validate as k
for job in yaml.safe_load_all(open(sys.argv[1])):
    k.validate(job, k.latest_version(), strict=True)
    print(job["metadata"]["name"])
"""
    assert len(parsed_by("kubernetes_validate", source, str(path)).split()) == 4


def test_xpk_takes_the_commands(tmp_path):
    path, _, points = written(tmp_path, "xpk", "zone=us-a", "project=p", "storage=disk")
    source = """
import argparse, json, shlex, sys
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser)
for line in open(sys.argv[1]):
    if line.startswith("xpk "):
        found = parser.parse_args(shlex.split(line)[1:])
        print(json.dumps([found.workload, found.command, found.tpu_type, found.max_restarts]))
"""
    lines = parsed_by("xpk", source, str(path)).splitlines()
    for line, point in zip(lines, points, strict=True):
        name = job_name("/runs/eta", point)
        assert json.loads(line) == [name, shlex.join(command(point)), "v5litepod-16", "10"]


def test_skypilot_takes_the_tasks(tmp_path):
    path, _, points = written(tmp_path, "skypilot")
    source = """
import sys, yaml
from sky.utils import schemas, common_utils
import jsonschema
for name in sys.argv[1:]:
    task = yaml.safe_load(open(name))
    jsonschema.validate(task, schemas.get_task_schema())
    print(task["name"])
"""
    files = [str(file) for file in path.parent.glob("*.yaml")]
    assert len(parsed_by("sky", source, *files).split()) == len(points)


def test_the_scripts_are_sound(tmp_path):
    shellcheck = os.environ.get("MMRECODER_SHELLCHECK") or shutil.which("shellcheck")
    for kind in KINDS:
        if kind == "kueue":
            continue
        path, _, _ = written(tmp_path / kind, kind)
        subprocess.run(["bash", "-n", str(path)], check=True)
        if shellcheck:
            done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout

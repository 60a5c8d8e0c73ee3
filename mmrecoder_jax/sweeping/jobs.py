"""The points of a sweep as jobs of a cluster, written below `<workdir>/jobs/`, never started here.

    slurm      sweep.sh      an array, a task for each point; `srun` may give a point several
    kueue      sweep.yaml    a Job for each point, held until its queue admits it
    xpk        sweep.sh      an `xpk workload create` for each point
    skypilot   NAME.yaml     a task for each point, and sweep.sh, which launches managed jobs

Every job is a training command, which resumes in its work directory; that must be on storage that
outlives the job. A point's job has a name of its own, so a cluster refuses to run one twice.
"""

import dataclasses
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmrecoder_jax import places
from mmrecoder_jax.config import KILLED, ConfigError, Preempted
from mmrecoder_jax.pipeline import has_finished
from mmrecoder_jax.sweeping.points import Point
from mmrecoder_jax.sweeping.settings import Sweep

FOLDER = "jobs"
_LONGEST_NAME = 40  # characters; what xpk allows
_DIGEST = 8


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of cluster.

    Attributes:
      needs: keys of `--job` without which nothing can be written, and an example of each.
      may: further keys with their defaults.
      files: `(jobs, keys) -> text by name of the file`.
      use: what to do with the first file.
    """

    needs: Mapping[str, str]
    may: Mapping[str, str]
    files: Callable[[Sequence["Job"], Mapping[str, str]], dict[str, str]]
    use: str


@dataclasses.dataclass(frozen=True)
class Job:
    """One point as a job.

    Attributes:
      name: lower-case letters, digits and dashes, the first a letter.
      words: of its command.
    """

    name: str
    point: Point
    words: Sequence[str]


def write_jobs(
    sweep: Sweep, points: Sequence[Point], kind: str, pairs: Sequence[str], command: Sequence[str]
) -> tuple[Path, str]:
    """Writes the jobs of those of these points that have not finished.

    Args:
      kind: a name of `KINDS`.
      pairs: values of the flag `--job`.
      command: that runs a point there; flags are added to it.

    Returns:
      The file to begin with, and what to do with it.

    Raises:
      ConfigError: no such kind or key, a key that is missing, a directory that no job could use, or
        nothing to do.
    """
    if kind not in KINDS:
        raise ConfigError(f"--jobs={kind}: use one of {', '.join(KINDS)}")
    if "workdir" in KINDS[kind].needs and places.in_bucket(sweep.workdir):
        raise ConfigError(
            f"--jobs={kind}: these jobs write to a volume that they share: give a folder as "
            "--workdir, and the volume with --job=workdir=PATH"
        )
    keys = _read_keys(kind, pairs)
    stage = sweep.config.stage
    left = [point for point in points if not has_finished(stage, str(sweep.directory(point)))]
    if not left:
        raise ConfigError(f"--jobs={kind}: no job is needed, {len(points)} points have finished")
    jobs = _jobs(sweep, left, keys.get("workdir", sweep.workdir), command)
    folder = Path(sweep.workdir) / FOLDER / kind
    folder.mkdir(parents=True, exist_ok=True)
    files = KINDS[kind].files(jobs, {"folder": str(folder), **keys})
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    places.put(folder)
    first = folder / next(iter(files))
    return first, KINDS[kind].use.format(file=first)


def _read_keys(kind: str, pairs: Sequence[str]) -> dict[str, str]:
    needs, may = KINDS[kind].needs, KINDS[kind].may
    keys = dict(may)
    for pair in pairs:
        key, given, value = pair.partition("=")
        if key not in (*needs, *may):
            known = ", ".join((*needs, *may)) or "none"
            raise ConfigError(f"--job={pair}: jobs of {kind} have no such key; there are: {known}")
        if not given or not value.strip() or "\n" in value:
            raise ConfigError(f"--job={pair}: write {key}=VALUE")
        keys[key] = value
    for key, example in needs.items():
        if key not in keys:
            raise ConfigError(f"--jobs={kind} needs --job={key}=..., such as {key}={example}")
    if "workdir" in needs and not os.path.isabs(keys["workdir"]):
        raise ConfigError(
            f"--job=workdir={keys['workdir']}: give an absolute path below the volume that the "
            f"containers share, such as {needs['workdir']}"
        )
    return keys


def _jobs(sweep: Sweep, points: Sequence[Point], workdir: str, command: Sequence[str]) -> list[Job]:
    there = dataclasses.replace(sweep, workdir=os.path.normpath(workdir))
    # Jobs may all start at once, so none may wait for the charts of another.
    return [
        Job(
            job_name(there.workdir, point),
            point,
            [*command, *there.flags(point, shared_data=False)],
        )
        for point in points
    ]


def job_name(workdir: str, point: Point) -> str:
    """The name of a point's job, of at most 40 characters; like the point's it follows from the
    values.
    """
    readable = f"{os.path.basename(workdir)}-{point.name}".lower()
    readable = re.sub(r"[^a-z0-9]+", "-", readable).strip("-")
    readable = re.sub(r"^(?=[^a-z])", "s", readable)
    key = f"{places.shown(workdir)}\n{point.name}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:_DIGEST]
    return f"{readable[: _LONGEST_NAME - _DIGEST - 1].rstrip('-')}-{digest}"


def _slurm(jobs: Sequence[Job], keys: Mapping[str, str]) -> dict[str, str]:
    cases = "\n".join(
        f"{i}) srun {shlex.join(job.words)} || status=$? ;;" for i, job in enumerate(jobs)
    )
    logs = os.path.join(keys["folder"], "%A_%a.txt")
    text = f"""#!/bin/bash
#SBATCH --job-name={jobs[0].name.rsplit("-", 1)[0]}
#SBATCH --array=0-{len(jobs) - 1}
#SBATCH --output={logs}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@60
# Options of sbatch overrule these: sbatch --partition=PARTITION --gpus=1 FILE
# A minute before its time is over, or before it is pre-empted, a run saves (status
# {Preempted.status}), and its task is queued again.
set -euo pipefail
trap : TERM
status=0
case "$SLURM_ARRAY_TASK_ID" in
{cases}
*) echo "error: no point $SLURM_ARRAY_TASK_ID: use --array=0-{len(jobs) - 1}" >&2; exit 1 ;;
esac
if ((status == {Preempted.status} || status == {KILLED})); then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
"""
    return {"sweep.sh": text}


def _kueue(jobs: Sequence[Job], keys: Mapping[str, str]) -> dict[str, str]:
    return {"sweep.yaml": "---\n".join(_yaml(_kueue_job(job, keys)) for job in jobs)}


def _kueue_job(job: Job, keys: Mapping[str, str]) -> dict[str, Any]:
    chips = {"google.com/tpu": keys["tpu"]} if keys["tpu"] != "0" else {}
    cards = {"nvidia.com/gpu": keys["gpus"]} if keys["gpus"] != "0" and not chips else {}
    resources = {"cpu": keys["cpu"], "memory": keys["memory"], **chips, **cards}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": keys["tpu_accelerator"],
        "cloud.google.com/gke-tpu-topology": keys["tpu_topology"],
    }
    preempted = {  # another pod goes on, as if nothing had failed
        "action": "Ignore",
        "onExitCodes": {
            "containerName": "train",
            "operator": "In",
            "values": [Preempted.status, KILLED],
        },
    }
    pod = {
        "restartPolicy": "Never",
        **({"nodeSelector": selector} if chips else {}),
        "containers": [
            {
                "name": "train",
                "image": keys["image"],
                "command": list(job.words),
                "resources": {"requests": resources, "limits": resources},
                "volumeMounts": [{"name": "runs", "mountPath": os.path.dirname(keys["workdir"])}],
            }
        ],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": keys["claim"]}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job.name,
            "labels": {"kueue.x-k8s.io/queue-name": keys["queue"]},
            "annotations": {"mmrecoder/point": job.point.name},
        },
        # Not indexed: pods of an indexed Job are processes of one run (`learner.cluster`).
        "spec": {
            "suspend": True,
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": 3,
            "podFailurePolicy": {"rules": [preempted]},
            "template": {"spec": pod},
        },
    }


def _xpk(jobs: Sequence[Job], keys: Mapping[str, str]) -> dict[str, str]:
    options = {
        "cluster": keys["cluster"],
        "tpu-type": keys["tpu_type"],
        "num-slices": keys["slices"],
        "docker-image": keys["image"],
        "storage": keys["storage"],
        "project": keys["project"],
        "zone": keys["zone"],
        "priority": keys["priority"],
        "max-restarts": keys["restarts"],
        # By itself xpk starts again what ended with 42 or 127 to 255.
        "restart-on-exit-codes": str(Preempted.status),
    }
    shared = [f"--{name}={value}" for name, value in options.items() if value]
    lines = [
        shlex.join(
            [
                *("xpk", "workload", "create", f"--workload={job.name}"),
                *shared,
                f"--command={shlex.join(job.words)}",
            ]
        )
        for job in jobs
    ]
    return {"sweep.sh": "\n".join(["#!/bin/bash", "set -euo pipefail", *lines, ""])}


def _skypilot(jobs: Sequence[Job], keys: Mapping[str, str]) -> dict[str, str]:
    folder = keys["folder"]
    lines = [
        shlex.join(
            [*("sky", "jobs", "launch", "--yes", "--detach-run"), f"{folder}/{job.name}.yaml"]
        )
        for job in jobs
    ]
    launch = "\n".join(["#!/bin/bash", "set -euo pipefail", *lines, ""])
    tasks = {
        f"{job.name}.yaml": _yaml(
            {
                "name": job.name,
                "workdir": ".",
                "resources": {
                    "accelerators": keys["accelerators"],
                    "use_spot": keys["spot"] == "true",
                },
                "file_mounts": {
                    os.path.dirname(keys["workdir"]): {"source": keys["bucket"], "mode": "MOUNT"}
                },
                "setup": keys["setup"],
                "run": shlex.join(job.words),
            }
        )
        for job in jobs
    }
    return {"sweep.sh": launch} | tasks


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=1000)


_VOLUME = {"workdir": "/runs/eta"}
KINDS: Mapping[str, Kind] = {
    "slurm": Kind({}, {}, _slurm, "submit it with `sbatch {file}`"),
    "kueue": Kind(
        {"image": "REGISTRY/mmrecoder:cuda", "queue": "user-queue", "claim": "runs", **_VOLUME},
        {
            **{"cpu": "8", "memory": "64Gi", "gpus": "1", "tpu": "0"},
            **{"tpu_accelerator": "tpu-v5-lite-podslice", "tpu_topology": "2x4"},
        },
        _kueue,
        "submit it with `kubectl create -f {file}`",
    ),
    "xpk": Kind(
        {
            **{"image": "REGISTRY/mmrecoder:tpu", "cluster": "CLUSTER", "tpu_type": "v5litepod-16"},
            **_VOLUME,
        },
        {
            **{"storage": "", "project": "", "zone": "", "priority": "medium"},
            **{"slices": "1", "restarts": "10"},
        },
        _xpk,
        "submit it with `bash {file}`",
    ),
    "skypilot": Kind(
        {"accelerators": "H100:1", "bucket": "gs://BUCKET", **_VOLUME},
        {"spot": "true", "setup": "pip install -q -e '.[cuda]'"},
        _skypilot,
        "submit it with `bash {file}`, from the checkout",
    ),
}

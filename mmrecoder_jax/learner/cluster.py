"""Whether this process is one of several, by what launchers leave in the environment.

Two processes that both believe to be alone write into one work directory. So a process is alone
only where nothing says otherwise, and is refused where others are spoken of that cannot be found:

    srun -n 2 ...                         joins           JAX knows Slurm
    sbatch script or login node, no srun  alone           a job is not yet a step
    mpirun -n 2 ... (Open MPI 4)          joins           JAX knows it by OMPI_MCA_orte_hnp_uri
    mpirun (Open MPI 5, MPICH), torchrun  refused         unless JAX_COORDINATOR_ADDRESS is set
    TPU slice, multislice                 joins           workers of a slice times slices
    JAX_COORDINATOR_ADDRESS and the two   joins           on any machines
      others; one or two of the three     refused

Reading the environment starts no JAX; `distributed.start` acts on what is found here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmrecoder_jax.config import ConfigError

ADDRESS, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
THREE = f"{ADDRESS}=HOST:PORT, {COUNT} and {ID}"
# What Slurm tells the processes of a step, and JAX asks for.
_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
_SLURM = (
    *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS"),
    *("SLURM_PROCID", "SLURM_LOCALID"),
)
_OPEN_MPI = "OMPI_MCA_orte_hnp_uri"
# Launchers that number their processes: what says how many there are, and which one this is.
_RANKS = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "MPI": ("PMI_SIZE", "PMI_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    "Flux": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    "torchrun": ("WORLD_SIZE", "RANK"),
}
_SLICES = "MEGASCALE_NUM_SLICES"


@dataclasses.dataclass(frozen=True)
class Launched:
    """What a launcher says of this process.

    Attributes:
      by: the launcher, with the variables that say so.
      count: processes that it started; 0 where it does not say.
      rank: which of them this is; None where it does not say, or JAX knows by itself.
      known: whether JAX may find the others by itself.
    """

    by: str
    count: int
    rank: int | None = None
    known: bool = True


@dataclasses.dataclass(frozen=True)
class Plan:
    """How this process joins the others.

    Attributes:
      arguments: of `jax.distributed.initialize`; None for a process alone.
      others: what says that there are others; "" where only JAX can find out, and a process that it
        does not recognise is alone.
      count: processes of the run; 0 where it is not known.
    """

    arguments: Mapping[str, Any] | None = None
    others: str = ""
    count: int = 0


def plan(environ: Mapping[str, str], tpu: bool = False) -> Plan:
    """What the environment says about the processes of this run.

    Args:
      tpu: whether this machine has TPU chips whose metadata server may know of other hosts.

    Raises:
      ConfigError: there are others, and not all is there that leads to them.
    """
    launched = _launched(environ)
    own = {name: environ[name] for name in (ADDRESS, COUNT, ID) if environ.get(name)}
    if own:
        return _by_own_variables(own, launched)
    if launched is None:
        return Plan({}) if tpu else Plan()
    if launched.count == 1:
        return Plan()
    if not launched.known:
        raise ConfigError(
            f"{launched.by}, and JAX cannot find the others by that: set {ADDRESS}=HOST:PORT (of "
            "process 0) for all of them, or start one process alone, without these variables"
        )
    return Plan({}, launched.by, launched.count)


def _by_own_variables(own: Mapping[str, str], launched: Launched | None) -> Plan:
    """By JAX_COORDINATOR_ADDRESS and its two companions."""
    said = ", ".join(f"{name}={value}" for name, value in own.items())
    count = _number(own, COUNT) if COUNT in own else None
    rank = _number(own, ID) if ID in own else None
    if launched is not None and launched.count > 1 and count not in (None, launched.count):
        raise ConfigError(f"{said}, but {launched.by}: one of the two is wrong")
    if count == 1 and not rank:
        return Plan()
    if launched is not None and launched.count != 1 and count is None and rank is None:
        if launched.known:
            return Plan({}, f"{said}, {launched.by}", launched.count)
        count, rank = launched.count or None, launched.rank  # JAX does not know this launcher
    if ADDRESS not in own or count is None or rank is None:
        missing = [name for name in (ADDRESS, COUNT, ID) if name not in own]
        raise ConfigError(
            f"{said} without {' and '.join(missing)}: set all of {THREE}, or none of them for one "
            "process alone"
        )
    if ":" not in own[ADDRESS]:
        raise ConfigError(f"{ADDRESS}={own[ADDRESS]}: give HOST:PORT of process 0")
    if not 0 <= rank < count:
        raise ConfigError(f"{said}: the processes of {count} are 0 to {count - 1}")
    arguments = {
        "coordinator_address": own[ADDRESS],
        "num_processes": count,
        "process_id": rank,
    }
    return Plan(arguments, said, count)


def _launched(environ: Mapping[str, str]) -> Launched | None:
    """The first launcher that speaks of others; else one that started this process alone."""
    found = [
        launched
        for launched in (*_ranks(environ), _slurm(environ), _tpu(environ), _kubernetes(environ))
        if launched is not None
    ]
    return next((launched for launched in found if launched.count != 1), next(iter(found), None))


def _ranks(environ: Mapping[str, str]) -> list[Launched]:
    found = []
    for launcher, (size, rank) in _RANKS.items():
        if not environ.get(size) or not environ.get(rank):
            continue
        count, number = _number(environ, size), _number(environ, rank)
        by = f"{launcher} started {count} processes ({size}={count}, {rank}={number})"
        if launcher == "Open MPI" and _OPEN_MPI in environ:
            found.append(Launched(by, count))
        # `srun --mpi=...` sets these as well, and JAX then joins by Slurm's
        elif not _is_step(environ) or _missing_of_slurm(environ):
            found.append(Launched(by, count, number, known=False))
    return found


def _slurm(environ: Mapping[str, str]) -> Launched | None:
    rank = _number(environ, "SLURM_PROCID") if environ.get("SLURM_PROCID") else 0
    if not _is_step(environ) and not rank:
        return None  # a login node, or the batch script of a job: not started by srun
    # In the shell of salloc SLURM_NTASKS is what was asked for, and the step has one task.
    size = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    count = _number(environ, size) if environ.get(size) else 0
    by = f"Slurm started {count or 'several'} processes (SLURM_PROCID={rank})"
    missing = _missing_of_slurm(environ)
    if missing:
        return Launched(f"{by} without {', '.join(missing)}", count, rank, known=False)
    return Launched(by, count)


def _is_step(environ: Mapping[str, str]) -> bool:
    return any(environ.get(name) for name in _STEP)


def _missing_of_slurm(environ: Mapping[str, str]) -> list[str]:
    return [name for name in _SLURM if not environ.get(name)]


def _tpu(environ: Mapping[str, str]) -> Launched | None:
    """A slice whose workers the environment names, or several slices."""
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    names = [name for name in workers.split(",") if name.strip()]
    slices = _number(environ, _SLICES) if environ.get(_SLICES) else 1
    if not names and slices == 1:
        return None
    by = f"this TPU has {slices} slices of {len(names) or 'several'} hosts ({_SLICES}={slices}, "
    return Launched(f"{by}TPU_WORKER_HOSTNAMES={workers})", len(names) * slices)


def _kubernetes(environ: Mapping[str, str]) -> Launched | None:
    """A pod of an indexed job, whose number of pods the API alone knows."""
    index = environ.get("JOB_COMPLETION_INDEX")
    if not index or not environ.get("KUBERNETES_SERVICE_HOST"):
        return None
    return Launched(f"this is pod {index} of a Kubernetes job (JOB_COMPLETION_INDEX={index})", 0)


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        number = int(environ[name])
    except ValueError:
        number = -1
    if number < 0:
        raise ConfigError(f"{name}={environ[name]!r} in the environment is no number of processes")
    return number

"""What can a slice do, and what does it cost? Asked of machines that nobody has rented yet.

    python -m mmrecoder_jax.memory --config=stage2 --topology=v5e-16,v6e-1,h100:8 \
        [--config.model.preset=3b ...]

The programs (rollout prefill, extension with the feedback, decoding; gradients of a micro-batch,
the update: see `planner.programs`) are compiled ahead of time for TPUs, and counted for GPUs. The
command says in sentences what fits and with which flags, how long a step takes and what a run
costs; then what each program needs on a device, its flops and its collectives. When one does not
fit, smaller choices are compiled until one does, then adapters alone and a smaller model.

For TPUs it needs their compiler (`pip install 'mmrecoder_jax[tpu]'`) and no TPU. Times are
estimates (`planner.estimate`).
"""

import os

import jax
from absl import flags

from mmrecoder_jax import cli
from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import STAGES, ConfigError, check_output
from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.advice import AUTO, EFFORTS, Measurements, part_of, plan
from mmrecoder_jax.planner.fits import ProgramReport
from mmrecoder_jax.planner.programs import Program, programs_of
from mmrecoder_jax.planner.sentences import told

_CONFIG = cli.define_config("stage2")
_TOPOLOGY = flags.DEFINE_list(
    "topology",
    None,
    "TPU slices: cloud names (v5e-16, v5p-64, tpu7x-8) or shapes (v5e:4x4), several of one kind "
    "(4xv5e-256); or GPUs (h100:8).",
    required=True,
)
_PROGRAMS = flags.DEFINE_list(
    "programs", None, f"Any of {', '.join(Program)}; all that the stage has when left out."
)
_EFFORT = flags.DEFINE_enum(
    "effort",
    AUTO,
    list(EFFORTS),
    "Of the compiler. Low is several times faster, and a program may take a GiB or two less; auto "
    "is low, and the default where low leaves less than two GiB.",
)
_JSONL = flags.DEFINE_string("jsonl", None, "File that every report is appended to.")
_TRY = flags.DEFINE_bool("try", True, "Compile smaller choices where a program does not fit.")
_PRICE = flags.DEFINE_float(
    "price", None, "USD of an hour of one device, in place of the list's.", lower_bound=0.0
)


def main() -> None:
    """Compiles the programs on every slice and says what each slice can do."""
    config = _CONFIG.value
    cli.check(config, STAGES)
    cli.fetch(config)
    if _JSONL.value:
        check_output("--jsonl", _JSONL.value)
    chosen = _chosen(config.stage, _PROGRAMS.value)
    try:
        slices = [topology.parse(name) for name in _TOPOLOGY.value]
        simulated = [each.devices for each in slices if not each.generation.compiled]
        jax.config.update("jax_num_cpu_devices", max(simulated, default=1))
        devices = [topology.devices(wanted) for wanted in slices]
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--topology={','.join(_TOPOLOGY.value)}: {error}") from error
    for wanted, found in zip(slices, devices, strict=True):
        try:
            measured = Measurements(wanted, found, _EFFORT.value, _keep)
            part = part_of(config, wanted.slices)
            settled = plan(part, chosen, measured, _TRY.value)
        except ConfigError as error:
            raise ConfigError(f"{wanted.name}: {error}") from error
        print(told(settled, wanted, _PRICE.value), flush=True)


def _chosen(stage: str, names: list[str] | None) -> list[Program]:
    known = programs_of(stage)
    if wrong := [name for name in names or known if name not in known]:
        raise ConfigError(f"--programs={','.join(wrong)}: {stage} has {', '.join(known)}")
    return [Program(name) for name in names or known]


def _keep(report: ProgramReport) -> None:
    if _JSONL.value:
        os.makedirs(os.path.dirname(os.path.abspath(_JSONL.value)), exist_ok=True)
        with open(_JSONL.value, "a", encoding="utf-8") as f:
            f.write(report.to_json() + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the compiler is all that is wanted of a TPU
    run_with_flags(main, "--config.model.preset=3b", cli.parse_flags)

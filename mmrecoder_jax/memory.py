"""Does a stage fit a TPU slice? Compiles its programs for chips that this machine does not have.

    python -m mmrecoder_jax.memory --config=configs/stage2.py --topology=v5e-16 \
        [--config.model.preset=3b ...]

The programs (rollout prefill, extension with the feedback, decoding; gradients of a micro-batch,
the update: see `planner.programs`) are compiled ahead of time. The command prints what each needs
on a device beside what the chip has, its flops and its collectives. When one does not fit, smaller
choices are compiled until one does.

It needs the TPU compiler (`pip install 'mmrecoder_jax[tpu]'`) and no TPU. It cannot say how fast a
program runs.
"""

import os

import jax
from absl import flags

from mmrecoder_jax import cli
from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import STAGES, ConfigError, check_output
from mmrecoder_jax.planner import topology
from mmrecoder_jax.planner.fits import EFFORT, ProgramReport, plan
from mmrecoder_jax.planner.programs import Program, programs_of

_CONFIG = cli.define_config("stage2")
_TOPOLOGY = flags.DEFINE_list(
    "topology",
    None,
    "TPU slices: cloud names (v5e-16, v5p-64, v6e-8) or shapes (v5e:4x4).",
    required=True,
)
_PROGRAMS = flags.DEFINE_list(
    "programs", None, f"Any of {', '.join(Program)}; all that the stage has when left out."
)
_EFFORT = flags.DEFINE_enum(
    "effort",
    "low",
    list(EFFORT),
    "Of the compiler. Low is several times faster, and a program may take a GiB or two less.",
)
_JSONL = flags.DEFINE_string("jsonl", None, "File that every report is appended to.")
_TRY = flags.DEFINE_bool("try", True, "Compile smaller choices where a program does not fit.")


def main() -> None:
    """Compiles the programs on every slice and prints a table for each."""
    config = _CONFIG.value
    cli.check(config, STAGES)
    if _JSONL.value:
        check_output("--jsonl", _JSONL.value)
    chosen = _chosen(config.stage, _PROGRAMS.value)
    try:
        slices = [topology.parse(name) for name in _TOPOLOGY.value]
        devices = [topology.devices(wanted) for wanted in slices]
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--topology={','.join(_TOPOLOGY.value)}: {error}") from error
    for wanted, found in zip(slices, devices, strict=True):
        try:
            told = plan(config, chosen, wanted, found, _EFFORT.value, _TRY.value, _keep)
        except ConfigError as error:
            raise ConfigError(f"{wanted.name}: {error}") from error
        print(told, flush=True)


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

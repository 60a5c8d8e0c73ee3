"""`python -m mmrecoder_jax.train --config=configs/stage2.py:tiny --workdir=runs/stage2
[--config.optim.lr=1e-5 ...]`

Runs the stage that the configuration names: sft_chart2code, sft_self_correction, stage1, stage2,
pipeline (all of them), evaluate. Killed anywhere, the same command goes on from the last
checkpoint.
"""

import os
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from mmrecoder_jax import cli, stages
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.judge.base import JudgeDown
from mmrecoder_jax.runtime import ConfigError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with the size after a colon: configs/stage2.py:tiny."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for checkpoints, metrics and reports.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Wires flags, devices and work directory, then runs the stage."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument {argv[1]!r}: every setting is a flag, e.g. --config.optim.lr=1e-5"
        )
    logging.set_verbosity(logging.WARNING)
    config, workdir = _CONFIG.value, _WORKDIR.value
    if config.mesh.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update(
            "jax_compilation_cache_dir", os.path.join(os.path.abspath(workdir), ".jax_cache")
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    distributed.start()
    try:
        if config.stage == "pipeline":
            stages.run_pipeline(config, workdir)
        elif config.stage == "evaluate":
            stages.run_evaluation(config, workdir)
        else:
            stages.run_stage(config, workdir)
            stages.say(f"done: {workdir}")
    except (ConfigError, JudgeDown) as error:
        sys.exit(f"error: {error}")


def use_huge_pages() -> None:
    """Starts the process anew with huge pages for malloc, where glibc has them and nobody chose
    otherwise.

    XLA's CPU backend maps its scratch memory afresh in every step; with small pages the page faults
    took a quarter of a training step.
    """
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    use_huge_pages()
    app.run(main, flags_parser=cli.parse_flags)

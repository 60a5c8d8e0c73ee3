"""What the commands share: their flags, what a mistyped one is answered with, devices, errors."""

import os
import runpy
import sys
from collections.abc import Callable, Collection

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mmrecoder_jax.config import ConfigError, has_field, suggest
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.judge.base import JudgeDown

EVALUATE = "evaluate"  # the one stage that is not run by `train`


def run(
    stages: Collection[str],
    main: Callable[[ConfigDict, str], None],
    selfcheck: Callable[[ConfigDict], bool] | None = None,
) -> None:
    """Runs a command with `--config` and `--workdir`; does not return.

    Args:
      stages: that this command runs; the configuration of another is refused.
      main: called with the configuration and the work directory, devices and hosts ready.
      selfcheck: called instead of `main` with `--selfcheck`; says whether all is right. The command
        has no such flag without it.
    """
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, with the size after a colon: configs/stage2.py:tiny.",
    )
    workdir = flags.DEFINE_string(
        "workdir", None, "Directory for checkpoints, metrics and reports."
    )
    checking = None
    if selfcheck is not None:
        checking = flags.DEFINE_bool(
            "selfcheck",
            False,
            "Compares the model's kernels with plain matmuls on this machine, prints a table and "
            "exits: 0 where all are right. Needs no --workdir.",
        )
    flags.mark_flag_as_required("config")
    needs = ["workdir"] if checking is None else ["workdir", "selfcheck"]
    flags.register_multi_flags_validator(
        needs,
        lambda values: bool(values["workdir"] or values.get("selfcheck")),
        "Flag --workdir must have a value.",
    )

    def start(argv: list[str]) -> None:
        check_arguments(argv, "--config.optim.lr=1e-5")
        logging.set_verbosity(logging.WARNING)
        try:
            check_stage(config.value.stage, stages)
            start_devices(config.value, workdir.value)
            if selfcheck is not None and checking is not None and checking.value:
                sys.exit(0 if selfcheck(config.value) else 1)
            assert workdir.value is not None  # absl has refused a command without it
            main(config.value, workdir.value)
        except (ConfigError, JudgeDown) as error:
            sys.exit(f"error: {error}")

    _use_huge_pages()
    app.run(start, flags_parser=parse_flags)


def check_stage(stage: str, stages: Collection[str]) -> None:
    """Raises ConfigError where a configuration belongs to another command."""
    if stage not in stages:
        other = EVALUATE if stage == EVALUATE else "train"
        raise ConfigError(
            f"--config is of {stage}, which this command does not run: use "
            f"`python -m mmrecoder_jax.{other}`, or a configuration of {', '.join(stages)}"
        )


def check_arguments(argv: list[str], example: str) -> None:
    """Raises UsageError for words that are not flags."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected argument {argv[1]!r}: every setting is a flag, e.g. {example}"
        )


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser. A field that does not exist is answered with the stages that have it, or with
    the nearest names.
    """
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        # ml_collections answers a missing field with a bare error of one of these types.
        config = flags.FLAGS.config if flags.FLAGS.is_parsed() else _config_of(argv)
        for argument in argv[1:]:
            name = argument.lstrip("-").split("=", 1)[0]
            field = name.removeprefix("config.")
            if config is not None and field != name and not has_field(config, field):
                sys.exit("error: " + suggest(field, config))
        sys.exit(f"error: {error}")


def _config_of(argv: list[str]) -> ConfigDict | None:
    """The configuration that `--config=` names, without overrides; None where there is none."""
    for argument in argv[1:]:
        if argument.lstrip("-").startswith("config="):
            path, _, size = argument.split("=", 1)[1].partition(":")
            return runpy.run_path(path)["get_config"](size or None)
    return None


def start_devices(config: ConfigDict, workdir: str | None) -> None:
    """Simulated devices, the compilation cache (below `workdir`), and the other hosts."""
    if config.mesh.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    if workdir is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.join(os.path.abspath(workdir), ".jax_cache")
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    distributed.start()


def _use_huge_pages() -> None:
    """Starts the process anew with huge pages for malloc, where glibc has them and nobody chose
    otherwise.

    XLA's CPU backend maps its scratch memory afresh in every step; with small pages the page faults
    took a quarter of a training step.
    """
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

"""What train, evaluate and memory share: their flags, what a wrong configuration is answered with,
devices.
"""

import contextlib
import functools
import os
import re
import runpy
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from mmrecoder_jax import places
from mmrecoder_jax.command import about_missing, ending_in_one_line, run_with_flags
from mmrecoder_jax.config import (
    STAGES,
    ConfigError,
    check_output_dir,
    check_place,
    config_file,
    has_field,
    naming,
    set_fields,
    suggest,
)
from mmrecoder_jax.fields import IN_BUCKETS, check_fields, expected
from mmrecoder_jax.learner import distributed, preemption
from mmrecoder_jax.monitoring import profile

Changes = dict[str, tuple[Any, Any]]  # field -> (the file's value, the command line's)
Preflight = Callable[[ConfigDict, str, Changes], bool]

EVALUATE = "evaluate"  # the one stage that is not run by `train`
ALL = (*STAGES, "pipeline", EVALUATE)


def run(
    stages: Collection[str],
    main: Callable[[ConfigDict, str], None],
    selfcheck: Callable[[ConfigDict], bool] | None = None,
    profiles: bool = False,
    preflight: Preflight | None = None,
) -> NoReturn:
    """Runs a command with `--config` and `--workdir`; does not return.

    Args:
      stages: that this command runs; the configuration of another is refused.
      main: called with the configuration and the work directory, devices and hosts ready.
      selfcheck: called instead of `main` with `--selfcheck`; says whether all is right. The command
        has no such flag without it.
      profiles: whether the command has the flag `--profile`.
      preflight: called instead of `main` with `--preflight`; says whether all is well.
    """
    config = define_config("stage2:tiny")
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Directory for checkpoints, metrics and reports; may be in a bucket, gs://BUCKET/PATH.",
    )
    checking = None
    if selfcheck is not None:
        checking = flags.DEFINE_bool(
            "selfcheck",
            False,
            "Compares the model's kernels with plain matmuls on this machine, prints a table and "
            "exits: 0 where all are right. Needs no --workdir.",
        )
    profiled = None
    if profiles:
        profiled = flags.DEFINE_string(
            "profile",
            "",
            "Steps of a stage, such as 3 or 3-4, of which a trace for https://ui.perfetto.dev is "
            "written below the stage's work directory.",
        )
    trying = None
    if preflight is not None:
        trying = flags.DEFINE_bool(
            "preflight",
            False,
            "Tries everything that the run needs, in a few minutes, says what it found and what "
            "the run will cost, and exits: 0 where all is well.",
        )
    needs = ["workdir"] if checking is None else ["workdir", "selfcheck"]
    flags.register_multi_flags_validator(
        needs,
        lambda values: bool(values["workdir"] or values.get("selfcheck")),
        "Flag --workdir must have a value other than None.",
    )

    def start() -> None:
        check(config.value, stages)
        if profiled is not None:
            profile.want(profiled.value)
        if workdir.value is not None:
            _check_workdir(workdir.value)
        start_devices(config.value, workdir.value)
        if selfcheck is not None and checking is not None and checking.value:
            sys.exit(0 if selfcheck(config.value) else 1)
        assert workdir.value is not None  # absl has refused a command without it
        with distributed.leaving_at_once():
            changes = _changes(config)
            with distributed.together():
                fetch(config.value)
                folder = places.local(workdir.value, distributed.host())
            with places.pushed(folder):
                if preflight is not None and trying is not None and trying.value:
                    sys.exit(0 if preflight(config.value, folder, changes) else 1)
                main(config.value, folder)

    _use_huge_pages()
    run_with_flags(start, "--config.optim.lr=1e-5", parse_flags)


def _check_workdir(workdir: str) -> None:
    """Raises ConfigError, places.BucketError for a work directory that cannot be written to."""
    check_place("--workdir", workdir)
    if places.is_address(workdir):
        places.reach(workdir)
    else:
        check_output_dir("--workdir", workdir)


def fetch(config: ConfigDict) -> None:
    """Puts folders of this machine in place of the addresses of a configuration, filled from their
    buckets (`places`).

    Raises:
      ConfigError: a bucket cannot be read, or there is nothing.
    """
    for field in IN_BUCKETS:
        if has_field(config, field):
            value = functools.reduce(lambda section, part: section[part], field.split("."), config)
            with naming(field):
                set_fields(config, {field: places.local(value)})


def _changes(flag: Any) -> Changes:
    """What the command line says otherwise than the configuration's file."""
    path, _, size = config_flags.get_config_filename(flags.FLAGS[flag.name]).partition(":")
    file, changes = load_file(path, size or None), {}
    for name, value in config_flags.get_override_values(flags.FLAGS[flag.name]).items():
        before = functools.reduce(lambda section, part: section[part], name.split("."), file)
        if before != value:
            changes[name] = before, value
    return changes


def define_config(example: str) -> Any:
    """The flag `--config`, which every command with a configuration needs."""
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        f"One of ours by name, or a file, with the size after a colon: {example}.",
    )
    flags.mark_flag_as_required("config")
    return config


def check(config: ConfigDict, stages: Collection[str]) -> None:
    """Raises ConfigError for the configuration of another command, and for fields that cannot be
    what they are.
    """
    check_stage(config.stage, stages)
    check_fields(config)


def check_stage(stage: str, stages: Collection[str]) -> None:
    """Raises ConfigError where a configuration belongs to another command."""
    if stage not in stages:
        other = EVALUATE if stage == EVALUATE else "train"
        elsewhere = f"use `python -m mmrecoder_jax.{other}`, or " if stage in ALL else "use "
        raise ConfigError(
            f"--config is of {stage}, which this command does not run: {elsewhere}a configuration "
            f"of {', '.join(stages)}"
        )


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser. A configuration may be named (`stage2:tiny`); one that does not exist is
    answered with the nearest names, a file that does not load with what is wrong in it; a field
    that does not exist with the stages that have it, or with the nearest names; a value of another
    type with what the field may be.
    """
    with ending_in_one_line("--traceback" in argv):
        argv, config = _find_config(argv)
        with _explaining(argv, config):
            return flags.FLAGS(argv)


def with_fields(config: ConfigDict, texts: Mapping[str, str]) -> ConfigDict:
    """A copy of a configuration whose fields have other values.

    Args:
      texts: by dotted name, as a command line has them behind `--config.NAME=`.

    Raises:
      ConfigError: as `parse_flags`.
    """
    argv = ["", *(f"--config.{field}={text}" for field, text in texts.items())]
    values = flags.FlagValues()
    with _explaining(argv, config):
        changed = config_flags.DEFINE_config_dict(
            "config", config.copy_and_resolve_references(), flag_values=values, sys_argv=argv
        )
        values(argv)
    return changed.value


@contextlib.contextmanager
def _explaining(argv: list[str], config: ConfigDict | None) -> Iterator[None]:
    """Around the parsing of flags: what is wrong with one is a ConfigError.

    Args:
      config: without overrides; None where none could be read.
    """
    try:
        yield
    except flags.Error as error:
        raise ConfigError(_about_value(str(error))) from error
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        # ml_collections answers a missing field with a bare error of one of these types.
        for argument in argv[1:]:
            name = argument.lstrip("-").split("=", 1)[0]
            field = name.removeprefix("config.")
            if config is not None and field != name and not has_field(config, field):
                raise ConfigError(suggest(field, config)) from error
        raise ConfigError(str(error)) from error


def _about_value(message: str) -> str:
    """What absl says of a flag, in the words of `fields` where its value is of another type."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    wanted = expected(match[1]) if match else None
    if match and wanted:
        return f"{match[1]}={match[2]}: use {wanted}"
    return about_missing(message)


def _find_config(argv: list[str]) -> tuple[list[str], ConfigDict | None]:
    """The arguments with the file that `--config` names in place of its name, and the configuration
    without overrides; None where there is none.

    Raises:
      ConfigError: there is no such file, or it does not load.
    """
    for i, word in enumerate(argv[1:], 1):
        name, given, _ = word.lstrip("-").partition("=")
        if not word.startswith("-") or name != "config":
            continue
        at, flag = (i, word[: word.index("=") + 1]) if given else (i + 1, "")
        if at < len(argv):
            path, colon, size = argv[at].removeprefix(flag).partition(":")
            path = config_file(path)
            found = f"{flag}{path}{colon}{size}"
            return [*argv[:at], found, *argv[at + 1 :]], load_file(path, size or None)
    return argv, None


def load_file(path: str, size: str | None) -> ConfigDict:
    """The configuration that a file makes, without overrides.

    Raises:
      ConfigError: it does not load, or makes none.
    """
    try:
        get_config = runpy.run_path(path)["get_config"]
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--config={path} is no configuration: {what}") from error
    try:
        config = get_config(size)
    except Exception as error:
        raise ConfigError(f"--config={path}:{size or ''}: {error}") from error
    if not isinstance(config, ConfigDict) or "stage" not in config:
        raise ConfigError(f"--config={path}: its get_config returns no configuration of a stage")
    return config


def start_devices(config: ConfigDict, workdir: str | None) -> None:
    """What SIGTERM means, simulated devices, the compilation cache (below `workdir`, of which a
    bucket has none), and the other hosts.
    """
    grace = config.get("checkpoint", {}).get("grace_seconds", preemption.GRACE_SECONDS)
    preemption.listen(grace)
    if config.mesh.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    if workdir is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.join(os.path.abspath(workdir), ".jax_cache")
        if places.is_address(workdir):
            cache = str(places.home() / "compiled")
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    distributed.start(config.mesh.join_seconds, config.mesh.silent_seconds)


def _use_huge_pages() -> None:
    """Starts the process anew with huge pages for malloc, where glibc has them and nobody chose
    otherwise.

    XLA's CPU backend maps its scratch memory afresh in every step; with small pages the page faults
    took a quarter of a training step.
    """
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

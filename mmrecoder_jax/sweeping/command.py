"""The command of `scripts/sweep.py`: its flags, and what it does with them.

check everything -> --dry_run: print | --jobs: write | --table: read | run, then the table
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mmrecoder_jax import cli, places
from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import ConfigError, check_place, own_files
from mmrecoder_jax.learner import cluster
from mmrecoder_jax.pipeline import has_finished
from mmrecoder_jax.prepare import find_source
from mmrecoder_jax.sweeping import tables
from mmrecoder_jax.sweeping.axes import draw, grid, read_axes
from mmrecoder_jax.sweeping.jobs import KINDS, write_jobs
from mmrecoder_jax.sweeping.plots import write_plots
from mmrecoder_jax.sweeping.points import Point, check_fixed, shard
from mmrecoder_jax.sweeping.results import (
    Metric,
    State,
    choose_metric,
    read_result,
    settings_of,
)
from mmrecoder_jax.sweeping.runner import LOG_FILE, Runner
from mmrecoder_jax.sweeping.settings import Sweep, check_points, check_workdir, write_note

TRAIN = ("-m", "mmrecoder_jax.train")

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the sweep; a folder for each point. May be in a bucket, gs://BUCKET/PATH.",
)
_SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "A field and its values: config.reward.eta=0,0.1, or log:1e-5:1e-3:5. Repeat it."
)
_RANDOM = flags.DEFINE_integer("random", 0, "Draws so many settings in place of the whole grid.")
_RANDOM_SEED = flags.DEFINE_integer("random_seed", 0, "Of that draw.")
_SHARD = flags.DEFINE_string("shard", "", "i/n: runs the points of machine i (from 0) of n alone.")
_WORKERS = flags.DEFINE_integer("workers", 1, "Runs side by side.")
_RETRIES = flags.DEFINE_integer("retries", 1, "Further tries of a point that fails.")
_METRIC = flags.DEFINE_string(
    "metric", "", "Of metrics.jsonl, that points are judged by; by default by the kind of stage."
)
_BEST = flags.DEFINE_string("best", "", "max or min; by default min for losses, else max.")
_LAST = flags.DEFINE_integer(
    "last", 0, "Steps at the end of a run that the metric is averaged over; 0: by the metric."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Prints the commands and does nothing.")
_TABLE = flags.DEFINE_bool("table", False, "Runs nothing: writes table and plots of what is there.")
_TRAIN = flags.DEFINE_string(
    "train", "", "What runs a point, flags are added; by default this Python's mmrecoder_jax.train."
)
_JOBS = flags.DEFINE_string(
    "jobs", "", f"Runs nothing: writes the points as jobs of {', '.join(KINDS)}."
)
_JOB = flags.DEFINE_multi_string("job", [], "KEY=VALUE of these jobs, such as image=IMAGE. Repeat.")

flags.mark_flag_as_required("workdir")
_config = cli.define_config("stage2:tiny")


def main() -> None:
    """Runs the command; does not return."""
    run_with_flags(_main, "--sweep=config.seed=0,1,2", cli.parse_flags)


def _main() -> None:
    sweep, points = _read()
    metric = choose_metric(sweep, _METRIC.value, _BEST.value, _LAST.value)
    chosen = shard(points, _SHARD.value)
    for name, least, value in (
        ("workers", 1, _WORKERS.value),
        ("retries", 0, _RETRIES.value),
        ("random", 0, _RANDOM.value),
    ):
        if value < least:
            raise ConfigError(f"--{name}={value}: use {least} or more")
    modes = {"dry_run": _DRY_RUN.value, "table": _TABLE.value, "jobs": bool(_JOBS.value)}
    if sum(modes.values()) > 1:
        both = " and ".join(f"--{name}" for name, given in modes.items() if given)
        raise ConfigError(f"{both} do different things: give one of them")
    if _JOB.value and not _JOBS.value:
        raise ConfigError(f"--job={_JOB.value[0]} is for --jobs: say which, {', '.join(KINDS)}")
    check_points(sweep, points)
    check_workdir(sweep)
    if _DRY_RUN.value:
        _print(sweep, chosen)
    elif _JOBS.value:
        command = _train_command("python")
        path, use = write_jobs(sweep, chosen, _JOBS.value, _JOB.value, command)
        write_note(sweep)
        print(f"written: {path}; {use}")
    elif _TABLE.value:
        _write(sweep, points, metric)
    else:
        _run(sweep, points, chosen, metric)


def _read() -> tuple[Sweep, list[Point]]:
    """What the flags ask for, and all its points."""
    flag: Any = flags.FLAGS["config"]
    fixed = dict(flag.override_values)
    axes = read_axes(_SWEEP.value, _config.value)
    check_fixed([axis.field for axis in axes], fixed)
    points = draw(axes, _RANDOM.value, _RANDOM_SEED.value) if _RANDOM.value else grid(axes)
    fields = tuple(axis.field for axis in axes)
    assert _WORKDIR.value is not None  # absl has refused a command without it
    check_place("--workdir", _WORKDIR.value)
    workdir = os.path.normpath(places.view(_WORKDIR.value, "sweep", new=True))
    return Sweep(_config_name(flag.config_filename), _config.value, fixed, fields, workdir), points


def _config_name(path: str) -> str:
    """What runs are given as `--config`: one of ours by its name, so that another machine may have
    the package elsewhere.
    """
    file, colon, size = path.partition(":")
    name = next((name for name, own in own_files().items() if own == file), file)
    return f"{name}{colon}{size}"


def _train_command(python: str = sys.executable) -> list[str]:
    if not _TRAIN.value:
        return [python, *TRAIN]
    try:
        words = shlex.split(_TRAIN.value)
    except ValueError as error:
        raise ConfigError(f"--train={_TRAIN.value}: {error}") from error
    if not words:
        raise ConfigError(f"--train={_TRAIN.value!r}: name a command")
    return words


def _print(sweep: Sweep, points: Sequence[Point]) -> None:
    command = _train_command()
    for point in points:
        if has_finished(sweep.config.stage, str(sweep.directory(point))):
            print(f"# {point.name} has finished")
        else:
            print(shlex.join([*command, *sweep.flags(point)]))


def _run(sweep: Sweep, points: Sequence[Point], chosen: Sequence[Point], metric: Metric) -> None:
    plan = cluster.plan(os.environ)
    if plan.others:
        raise ConfigError(
            f"{plan.others}: a sweep starts its runs itself, each of one process. Start it once "
            "per machine with --shard, or write jobs with --jobs=slurm, whose runs may have several"
        )
    command = _train_command()
    configs = map(sweep.config_of, points)
    checked = {(own.init_from, own.data.kind, own.data.grammar): own for own in configs}
    for config in checked.values():
        cli.fetch(config)
        find_source(config)
    write_note(sweep)
    runner = Runner(sweep, chosen, command, _WORKERS.value, _RETRIES.value, metric)
    runner.run()
    places.refill(sweep.workdir)  # other machines may have finished theirs
    _write(sweep, points, metric)
    if runner.failures:
        name, failure = next(iter(runner.failures.items()))
        log = places.shown(str(Path(sweep.workdir) / name / LOG_FILE))
        raise SystemExit(
            f"error: {len(runner.failures)} of {len(chosen)} points failed: {name}: {failure} "
            f"({log}); the same command tries them again"
        )


def _write(sweep: Sweep, points: Sequence[Point], metric: Metric) -> None:
    """Prints the table and writes it and the plots beside the points."""
    results = [read_result(sweep, point, metric) for point in points]
    settings = settings_of(results)
    workdir = Path(sweep.workdir)
    said = f"{tables.text_table(settings, metric)}\n\n{tables.best_in_words(settings, metric)}"
    print(f"\n{said}")
    if all(result.state == State.WAITING for result in results):
        return
    texts = {
        "table.txt": f"{said}\n",
        "table.csv": tables.settings_csv(settings, metric),
        "points.csv": tables.points_csv(results, metric),
    }
    for name, text in texts.items():
        beside = workdir / f".{name}.{os.getpid()}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(workdir / name)
    written = [*(workdir / name for name in texts), *write_plots(settings, metric, workdir)]
    for path in written:
        places.put(path)
    print(places.shown(f"written: {', '.join(map(str, written))}"))

"""What came of the points of a sweep: who has finished, and the number that each is judged by.

Everything is read from the runs' own files, so it does not matter who ran them. A run has finished
where it says so itself (`pipeline.has_finished`), not where it has a directory.
"""

import dataclasses
import difflib
import enum
import math
from collections.abc import Sequence

import numpy as np

from mmrecoder_jax.config import RL_STAGES, STAGES, ConfigError
from mmrecoder_jax.exam.intervals import Estimate, over_seeds
from mmrecoder_jax.learner.checkpoint import steps_done
from mmrecoder_jax.monitoring.metrics import RESERVED, read_metrics
from mmrecoder_jax.monitoring.rows import Row
from mmrecoder_jax.pipeline import has_finished
from mmrecoder_jax.sweeping.axes import SEED
from mmrecoder_jax.sweeping.locks import holder
from mmrecoder_jax.sweeping.points import Point, text_of
from mmrecoder_jax.sweeping.settings import Sweep

FAILURE_FILE = "failure.txt"  # in a point's directory: the last line of a run that failed
BEST = ("max", "min")
_LAST_STEPS = 10  # of a noisy metric


class State(enum.StrEnum):
    """How far a point is."""

    FINISHED = "finished"
    RUNNING = "running"
    FAILED = "failed"
    UNFINISHED = "unfinished"
    WAITING = "waiting"


@dataclasses.dataclass(frozen=True)
class Metric:
    """What points are judged by.

    Attributes:
      name: in metrics.jsonl.
      best: "max" or "min".
      last: how many of a run's last rows with it are averaged.
    """

    name: str
    best: str
    last: int


def choose_metric(sweep: Sweep, name: str = "", best: str = "", last: int = 0) -> Metric:
    """The metric that the flags name; what they leave out goes by the kind of stage.

    RL is judged by the score of the last turn, which no weight of the reward changes; cold start 1
    by its held-out loss where it has one; cold start 2 by its loss.

    Raises:
      ConfigError: a choice that does not exist, or none that serves all points.
    """
    config = sweep.config
    stage = STAGES[-1] if config.stage == "pipeline" else config.stage
    own = config.stages[stage] if config.stage == "pipeline" else config
    if not name and stage in RL_STAGES:
        if any(field.endswith("rl.turns") for field in sweep.fields):
            raise ConfigError("rl.turns is swept, so the last turn is not the same: give --metric")
        name = f"turn{own.rl.turns}/low_level"
    elif not name:
        held_out = stage == STAGES[0] and own.train.eval_every
        name = "held_out_loss" if held_out else "loss"
    if best not in ("", *BEST):
        raise ConfigError(f"--best={best}: use max or min")
    if last < 0:
        raise ConfigError(f"--last={last}: use 1 or more, or 0 for the default")
    if not best:
        best = "min" if "loss" in name or name.startswith("seconds/") else "max"
    return Metric(name, best, last or (1 if name == "held_out_loss" else _LAST_STEPS))


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of a point.

    Attributes:
      state: how far it is.
      step, steps: done, and when its stage ends; 0 where it is not known.
      value: of the metric, at the end of a finished run; NaN where there is none.
      curve: (step, value) of the metric, without what is not finite.
      failure: the last line of a run that failed.
    """

    point: Point
    state: State
    step: int = 0
    steps: int = 0
    value: float = math.nan
    curve: Sequence[tuple[int, float]] = ()
    failure: str = ""


def read_result(sweep: Sweep, point: Point, metric: Metric) -> Result:
    """Reads a point's directory.

    Raises:
      ConfigError: the run has finished and has no such metric.
    """
    rows = read_rows_of(sweep, point)
    curve = [
        (int(row["step"]), float(row[metric.name]))
        for row in rows
        if metric.name in row and math.isfinite(row[metric.name])
    ]
    state, failure = _state(sweep, point)
    step, steps = progress(sweep, point)
    value = math.nan
    if state == State.FINISHED:
        if not any(metric.name in row for row in rows):
            raise ConfigError(_no_such_metric(metric.name, rows, point))
        value = float(np.mean([y for _, y in curve[-metric.last :]])) if curve else math.nan
    return Result(point, state, step, steps, value, curve, failure)


def _state(sweep: Sweep, point: Point) -> tuple[State, str]:
    directory = sweep.directory(point)
    if has_finished(sweep.config.stage, str(directory)):
        return State.FINISHED, ""
    if holder(sweep.of_machine(point)):
        return State.RUNNING, ""
    failure = directory / FAILURE_FILE
    if failure.is_file():
        return State.FAILED, failure.read_text(encoding="utf-8").strip()
    return (State.UNFINISHED if (directory / "config.json").exists() else State.WAITING), ""


def read_rows_of(sweep: Sweep, point: Point) -> list[Row]:
    """The metrics of a point's run, of a pipeline those of its last stage; none before the first.

    Raises:
      ConfigError: they cannot be read.
    """
    stage, directory = sweep.config.stage, sweep.directory(point)
    if stage == "pipeline":
        stage = STAGES[-1]
        directory = directory / stage
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        return [row for row in read_metrics(path) if row["stage"] == stage]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def progress(sweep: Sweep, point: Point) -> tuple[int, int]:
    """(last step of a point's run, step that it ends with); 0 for what is not known yet."""
    if sweep.config.stage == "pipeline":
        return 0, 0
    saved, steps = steps_done(str(sweep.directory(point))) or (0, 0)
    rows = read_rows_of(sweep, point)
    return max([saved, *(int(row["step"]) for row in rows[-1:])]), steps or sweep.config.train.steps


def _no_such_metric(name: str, rows: Sequence[Row], point: Point) -> str:
    known = sorted({key for row in rows for key in row} - set(RESERVED))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:8]
    return (
        f"--metric={name}: {point.name} has no such metric; there are {', '.join(near)}"
        f"{' and others' if len(near) < len(known) else ''} (metrics.jsonl)"
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """Points that differ in their seed alone.

    Attributes:
      values: that they share, as texts by field.
      results: of its points, in the order of the seeds.
      over_seeds: the mean of the finished ones, with Student's 95 % interval; its mean is NaN where
        none has finished.
    """

    values: dict[str, str]
    results: tuple[Result, ...]

    @property
    def numbers(self) -> list[float]:
        """The values of the finished points."""
        return [result.value for result in self.results if math.isfinite(result.value)]

    @property
    def over_seeds(self) -> Estimate:
        if not self.numbers:
            return Estimate(math.nan, math.nan, math.nan, 0)
        return over_seeds(np.array(self.numbers))

    def __str__(self) -> str:
        return " ".join(f"{field}={text}" for field, text in self.values.items()) or "all seeds"


def settings_of(results: Sequence[Result]) -> list[Setting]:
    """Results by setting, in the order of their first points."""
    found: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    for result in results:
        texts = {f: text_of(v) for f, v in result.point.values.items() if f != SEED}
        found.setdefault(tuple(texts.items()), []).append(result)
    return [Setting(dict(values), tuple(rows)) for values, rows in found.items()]


def ranked(settings: Sequence[Setting], best: str) -> list[Setting]:
    """The settings that have a number, the best first.

    Args:
      best: "max" or "min".
    """
    known = [setting for setting in settings if setting.numbers]
    return sorted(known, key=lambda setting: setting.over_seeds.mean, reverse=best == "max")

"""Alarms: metrics of an RL stage that have gone where they should not.

    metric      0.1  0.2  0.6  0.7  0.8  0.3  0.2          threshold 0.5
    alarm                 begins         ends

A monitor watches the mean of a metric over its newest steps. Its threshold is a field of the
section `alarms`. While an alarm rings it stands on the progress line; where it begins and where it
ends, a line is printed and a row is written to `alarms.jsonl`:

    {"stage": "stage1", "step": 12, "time": 1760000000.0, "alarm": "forged", "state": "begins",
     "value": 0.02, "threshold": 0.0}

The state of an alarm follows from the rows of metrics alone, so a resumed run rings as one that was
never interrupted. docs/monitors.md says of each what a rising one means.
"""

import collections
import dataclasses
import fnmatch
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmrecoder_jax.monitoring.progress import format_number
from mmrecoder_jax.monitoring.rows import Row, RowFile

ALARMS_FILE = "alarms.jsonl"


@dataclasses.dataclass(frozen=True)
class Monitor:
    """What is watched.

    Attributes:
      metric: its name; `turn*/forged` is that of every turn, of which the worst one counts.
      means: what is going on where its alarm rings.
      steps: how many of the newest steps its mean is over; it is silent before there are so many.
      below: whether it rings below its threshold; else above.
      relative: whether it watches by what factor the mean has left the stage's first step, upwards
        or downwards.
      fall: whether it watches by how much the mean has fallen below the first one.
    """

    metric: str
    means: str
    steps: int = 10
    below: bool = False
    relative: bool = False
    fall: bool = False


# One step suffices where a single case is one too many.
MONITORS = {
    "exec_rate": Monitor("turn*/exec_rate", "hardly any script runs", steps=5, below=True),
    "code_repeat": Monitor("code_repeat", "second turns repeat the code of the first"),
    "improved": Monitor("improved", "hardly any second turn improves on its first", below=True),
    "regressed": Monitor("regressed", "second turns spoil what first turns drew"),
    "same": Monitor("same", "second turns change code, but no score"),
    "identical_renders": Monitor("identical_renders", "second turns draw the very same picture"),
    "fallen": Monitor("turn*/low_level", "a turn scores worse than it did at first", fall=True),
    "blank": Monitor("turn*/blank", "scripts run and draw nothing", steps=5),
    "hidden_text": Monitor("turn*/hidden_text", "records claim texts that nobody sees", steps=5),
    "tampered": Monitor("turn*/tampered", "scripts reach for what records them", steps=5),
    "forged": Monitor("turn*/forged", "records do not follow from what was drawn", steps=1),
    "undecided": Monitor("turn*/undecided", "drawings cannot be checked by a replay", steps=5),
    "silent_groups": Monitor("silent_groups", "groups are paid alike and teach nothing"),
    "thought_length": Monitor("turn*/thought", "thoughts grow or vanish", relative=True),
    "disagreement": Monitor("turn*/disagreement", "rule and judge see different charts", steps=5),
    "logp_gap": Monitor("logp_gap", "sampler and learner are two policies", steps=5),
    "skipped": Monitor("skipped", "updates are not taken", steps=1),
}


@dataclasses.dataclass(frozen=True)
class Alarm:
    """An alarm that rings.

    Attributes:
      since: the step at which it began.
      value: of what its monitor watches, now.
    """

    name: str
    since: int
    value: float
    threshold: float

    def __str__(self) -> str:
        sign = "<" if MONITORS[self.name].below else ">"
        return f"{self.name} {format_number(self.value)} {sign} {format_number(self.threshold)}"


class Alarms:
    """The alarms of a stage.

    Args:
      stage: its name, in the rows.
      thresholds: by the name of the monitor (`config.alarms`).
      file: where begin and end of an alarm are written.
      say: prints a line.
    """

    def __init__(
        self,
        stage: str,
        thresholds: Mapping[str, float],
        file: RowFile,
        say: Callable[[str], None],
    ):
        self._stage, self._thresholds, self._file, self._say = stage, thresholds, file, say
        self._windows: dict[str, collections.deque[float]] = {}
        self._first: dict[str, float] = {}  # of the stage's first step, by metric
        self._first_mean: dict[str, float] = {}  # over a monitor's first steps, by metric
        self._ringing: dict[str, Alarm] = {}

    def resume(self, rows: Iterable[Row]) -> None:
        """Takes the steps of earlier processes into account, which have said what they had to."""
        for row in rows:
            if row["stage"] == self._stage:
                self._observe(int(row["step"]), row)

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that ring after a step; says and writes where one has begun or ended."""
        before = dict(self._ringing)
        self._observe(step, metrics)
        for name, alarm in self._ringing.items():
            if name not in before:
                self._say(f"alarm: {alarm}: {MONITORS[name].means} (docs/monitors.md)")
                self._write(step, "begins", alarm)
        for name, alarm in before.items():
            if name not in self._ringing:
                steps = step - alarm.since
                self._say(f"alarm ends: {name}, after {steps} step{'s'[: steps != 1]}")
                self._write(step, "ends", alarm)
        return list(self._ringing.values())

    def _observe(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, threshold in self._thresholds.items():
            value = self._watched(MONITORS[name], metrics)
            if value is None:  # nothing to see in this step: the alarm stays as it is
                continue
            if value < threshold if MONITORS[name].below else value > threshold:
                begun = self._ringing[name].since if name in self._ringing else step
                self._ringing[name] = Alarm(name, begun, value, float(threshold))
            else:
                self._ringing.pop(name, None)

    def _watched(self, monitor: Monitor, metrics: Mapping[str, Any]) -> float | None:
        """The worst mean of the metrics that a monitor is about; None where there is none yet."""
        means = []
        for metric in fnmatch.filter(metrics, monitor.metric):
            if not math.isfinite(metrics[metric]):
                continue
            window = self._windows.setdefault(metric, collections.deque(maxlen=monitor.steps))
            window.append(float(metrics[metric]))
            self._first.setdefault(metric, window[0])
            if len(window) == monitor.steps:
                mean = statistics.fmean(window)
                first_mean = self._first_mean.setdefault(metric, mean)
                if monitor.fall:
                    mean = first_mean - mean
                means.append(self._factor(metric, mean) if monitor.relative else mean)
        if not means:
            return None
        return min(means) if monitor.below else max(means)

    def _factor(self, metric: str, mean: float) -> float:
        first = self._first[metric]
        low, high = sorted((max(first, 1.0), max(mean, 1.0)))  # what is short by itself is no ratio
        return high / low

    def _write(self, step: int, state: str, alarm: Alarm) -> None:
        row = {"stage": self._stage, "step": step, "time": round(time.time(), 3)}
        row |= {"alarm": alarm.name, "state": state}
        row |= {"value": alarm.value, "threshold": alarm.threshold}
        self._file.append(row)

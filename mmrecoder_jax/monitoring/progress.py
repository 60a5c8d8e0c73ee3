"""Progress of a run as plain lines: step, rate, time left, where the time went, main numbers.

    stage1 step 12/60 20% 2.1 s/step ETA 1:41 | prefill 4% decode 31% execute 40% update 25% |
        reward 0.71 exec_rate 0.97                                  (one line in truth)

One line is printed per interval, the same on a terminal and in a file. The numbers and the phase
shares are over the interval's steps; `other` is time in no phase. Alarms that rang in the interval
(`monitoring.alarms`) stand at the end of the line. The rate is over the last 20
steps. The first step of a process compiles, so it counts for the rate only while it is alone, and
no ETA is given from it. A watchdog thread prints a line that names the phase when no step ends for
ten times the usual (at least two minutes).
"""

import collections
import contextlib
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from types import MappingProxyType
from typing import Any, Self, TextIO, TypeVar

PHASES = ("data", "prefill", "decode", "execute", "score", "update")  # in this order, then others
OTHER = "other"  # what is in no phase
WINDOW = 20  # steps that the rate is taken over
STALL_FACTOR = 10.0
STALL_SECONDS = 120.0
# Nothing is usual before the first step has ended, and it compiles: warn after this many
# STALL_SECONDS.
FIRST_STEP_FACTOR = 3.0

_silent = False  # whether another process prints the same lines

Item = TypeVar("Item")


def silence() -> None:
    """From now on this process prints no progress: another one of the run prints the same."""
    global _silent
    _silent = True


def _print_line(line: str, out: TextIO | None) -> None:
    if not _silent:
        print(line, file=out or sys.stdout, flush=True)


class Progress:
    """Progress of one training stage; a context manager (leaving it stops the watchdog).

    Args:
      stage: first word of every line.
      total_steps: the step that the stage ends with.
      interval_steps: steps per line; the first and the last step of the process always have one.
      start_step: steps finished by earlier processes (a resumed run).
      out: where lines go; None is the standard output.
      stall_seconds: the shortest silence that the watchdog reports.
      annotate: also goes around every phase, such as `profile.Profile.annotate`.

    Phases belong to the thread that calls `step`. A phase inside another stops the outer one's
    clock, so that shares add up. Work that runs beside a phase (scripts executing while other rows
    decode) shows under the phase that the thread waits in.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        interval_steps: int = 1,
        start_step: int = 0,
        out: TextIO | None = None,
        stall_seconds: float = STALL_SECONDS,
        annotate: Callable[[str], contextlib.AbstractContextManager[object]] = (
            contextlib.nullcontext
        ),
    ):
        if interval_steps < 1:
            raise ValueError(f"interval_steps is {interval_steps}: it must be 1 or more")
        self.stage = stage
        self.total_steps = total_steps
        self.interval_steps = interval_steps
        self._out, self._annotate = out, annotate
        self._rate = _Rate()
        self._phases: list[str] = []  # open phases, innermost last
        self._phase_since = self._step_since = time.monotonic()
        # Seconds by phase: of the current step, and of the finished steps since the last line.
        self._step_seconds: dict[str, float] = collections.defaultdict(float)
        self._interval_seconds: dict[str, float] = collections.defaultdict(float)
        self._interval_total = 0.0
        # Kept as given: a device array is read only when its line is printed, so that the device
        # never waits for the host.
        self._interval_values: list[Mapping[str, Any]] = []
        self._interval_skipped = 0
        self._interval_alarms: dict[str, str] = {}
        self._first_step = start_step + 1
        self._watchdog = _Watchdog(stage, "step", stall_seconds, self._phase_now, self._print)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` block as this phase."""
        self._turn_clock()
        self._phases.append(name)
        try:
            with self._annotate(name):
                yield
        finally:
            self._turn_clock()
            self._phases.pop()

    @property
    def open_phase(self) -> str:
        """The innermost phase that is open; "other" where none is."""
        phases = list(self._phases)  # other threads ask too
        return phases[-1] if phases else OTHER

    def step(
        self,
        step: int,
        values: Mapping[str, Any],
        skipped: int = 0,
        alarms: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Ends a step; prints a line when an interval ends.

        Args:
          step: number of the step that ended, the first is 1.
          values: main numbers, floats or 0-d arrays; the line shows their means over the interval.
          skipped: updates that were not taken; the line shows their sum where there were any.
          alarms: what rings, in words by name; the line shows each in its last words.

        Returns:
          Seconds of this step, for metrics.jsonl: `seconds/step` and `seconds/<phase>` for every
          phase that was entered.
        """
        self._turn_clock()
        now = time.monotonic()
        seconds = now - self._step_since
        self._step_since = now
        self._rate.add(seconds)
        self._watchdog.beat(self._rate.usual)
        timing = {"seconds/step": seconds}
        for name, spent in self._step_seconds.items():
            timing[f"seconds/{name}"] = spent
            self._interval_seconds[name] += spent
        self._step_seconds.clear()
        self._interval_total += seconds
        self._interval_values.append(dict(values))
        self._interval_skipped += skipped
        self._interval_alarms |= alarms
        if step % self.interval_steps == 0 or step in (self._first_step, self.total_steps):
            self._print(self._line(step))
            self._interval_seconds.clear()
            self._interval_values.clear()
            self._interval_skipped = 0
            self._interval_alarms.clear()
            self._interval_total = 0.0
        if step >= self.total_steps:
            self.close()
        return timing

    def close(self) -> None:
        """Stops the watchdog."""
        self._watchdog.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turn_clock(self) -> None:
        now = time.monotonic()
        if self._phases:
            self._step_seconds[self._phases[-1]] += now - self._phase_since
        self._phase_since = now

    def _phase_now(self) -> str:
        phase = self.open_phase
        return "between phases" if phase == OTHER else f"in phase {phase}"

    def _line(self, step: int) -> str:
        share = f"{100 * step / self.total_steps:.0f}%" if self.total_steps else "100%"
        rate = self._rate
        left = rate.seconds * (self.total_steps - step) if rate.settled else math.nan
        pace = f"{format_rate(rate.seconds, 'step')} ETA {format_duration(left)}"
        shares = [f"{name} {round(100 * part)}%" for name, part in self._phase_shares().items()]
        means = _means(self._interval_values)
        numbers = [f"{name} {format_number(value)}" for name, value in means.items()]
        if self._interval_skipped:
            numbers.append(f"skipped {self._interval_skipped}")
        parts = [f"{self.stage} step {step}/{self.total_steps} {share} {pace}"]
        parts += [" ".join(words) for words in (shares, numbers) if words]
        if self._interval_alarms:
            parts.append(f"ALARM {', '.join(self._interval_alarms.values())}")
        return " | ".join(parts)

    def _phase_shares(self) -> dict[str, float]:
        """Share of the interval by phase; empty when no phase was entered.

        "other" is there when at least one percent was in no phase.
        """
        spent = self._interval_seconds
        if not spent or not self._interval_total:
            return {}
        order = sorted(
            spent, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES)
        )
        shares = {name: spent[name] / self._interval_total for name in order}
        other = 1 - sum(shares.values())
        return shares | {OTHER: other} if other >= 0.01 else shares

    def _print(self, line: str) -> None:
        _print_line(line, self._out)


class Bar:
    """Progress of long work that is counted in items (building data, an evaluation).

    A context manager:

        build charts 120/800 15% 24.1 charts/s ETA 0:28

    Args:
      name: first words of every line.
      total: how many items there are; None when unknown (then no share and no ETA).
      unit: singular name of an item.
      every_seconds: a line at most this often, and one at the end.
      stall_seconds: the shortest silence that the watchdog reports.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str = "item",
        every_seconds: float = 10.0,
        out: TextIO | None = None,
        stall_seconds: float = STALL_SECONDS,
    ):
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self._resumed = 0
        self._every_seconds, self._out = every_seconds, out
        self._started = self._printed = time.monotonic()
        # (time, items done), one per line.
        self._recent = collections.deque([(self._started, 0)], maxlen=WINDOW)
        self._watchdog = _Watchdog(
            name, unit, stall_seconds, lambda: f"{self.done} are done", self._print
        )

    def resume(self, done: int) -> None:
        """Says that an earlier process finished `done` items: they do not enter the rate."""
        self.done = self._resumed = done
        self._recent.clear()
        self._recent.append((time.monotonic(), done))

    def advance(self, items: int = 1) -> None:
        """Counts finished items."""
        self.done += items
        now = time.monotonic()
        self._watchdog.beat((now - self._started) / self.done if self.done else None)
        if now - self._printed >= self._every_seconds:
            self._printed = now
            self._recent.append((now, self.done))
            self._print(self._line())

    def close(self) -> None:
        """Prints the last line and stops the watchdog."""
        self._watchdog.stop()
        seconds = time.monotonic() - self._started
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        fresh = self.done - self._resumed
        rate = format_rate(seconds / fresh, self.unit) if fresh else f"0 {self.unit}s"
        self._print(f"{self.name} {count} in {format_duration(seconds)}, {rate}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> str:
        (since, before), (now, done) = self._recent[0], self._recent[-1]
        each = (now - since) / (done - before) if done > before else math.nan
        if self.total is None:
            return f"{self.name} {self.done} {format_rate(each, self.unit)}"
        left = max(self.total - self.done, 0) * each
        share = f"{100 * self.done / self.total:.0f}%" if self.total else "100%"
        pace = f"{format_rate(each, self.unit)} ETA {format_duration(left)}"
        return f"{self.name} {self.done}/{self.total} {share} {pace}"

    def _print(self, line: str) -> None:
        _print_line(line, self._out)


def bar(
    name: str,
    items: Iterable[Item],
    total: int | None = None,
    unit: str = "item",
    every_seconds: float = 10.0,
    out: TextIO | None = None,
) -> Iterator[Item]:
    """Yields the items and counts each as finished when the next one is asked for.

    Args:
      total: how many; None takes `len(items)` where the items have a length.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(name, total, unit, every_seconds, out) as counter:
        for item in items:
            yield item
            counter.advance()


def format_duration(seconds: float) -> str:
    """`0:09`, `1:41`, `2:03:04`, `3d 04:05`; `?` when it is not known (nan)."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def format_rate(seconds: float, unit: str) -> str:
    """`2.1 s/step` for slow units, `24.1 charts/s` for fast ones, `? s/step` for nan."""
    if not math.isfinite(seconds):
        return f"? s/{unit}"
    if seconds >= 0.5 or seconds <= 0:
        return f"{seconds:.1f} s/{unit}"
    return f"{1 / seconds:.1f} {unit}s/s"


def format_number(value: float) -> str:
    """Three significant digits, and no exponent from 0.001 to 99999.

    >>> [format_number(value) for value in (0.714, 12.34, 1536, 0.00001)]
    ['0.714', '12.3', '1536', '1e-05']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.3g}"


def _means(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of each name over the rows that have it, in order of first appearance."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in columns.items()}


class _Rate:
    """Seconds per step over a recent window.

    One step far off the rest (a recompilation, a checkpoint) moves it little.
    """

    def __init__(self) -> None:
        self._window: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._count = 0

    def add(self, seconds: float) -> None:
        self._count += 1
        if self._count == 2:
            self._window.clear()  # the first step compiled
        self._window.append(seconds)

    @property
    def settled(self) -> bool:
        """Whether the rate is of steps that did not compile."""
        return self._count >= 2

    @property
    def seconds(self) -> float:
        """Mean of the window, every step cut at four times the median."""
        limit = 4 * statistics.median(self._window)
        return statistics.fmean(min(seconds, limit) for seconds in self._window)

    @property
    def usual(self) -> float | None:
        """Median of the window; None before the rate has settled."""
        return statistics.median(self._window) if self.settled else None


class _Watchdog:
    """A thread that prints a line when nothing has ended for long.

    It prints again each time the silence has doubled.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        stall_seconds: float,
        where: Callable[[], str],
        print_line: Callable[[str], None],
    ):
        self._name, self._unit, self._stall_seconds = name, unit, stall_seconds
        self._where, self._print_line = where, print_line
        self._usual: float | None = None
        self._last = time.monotonic()
        self._limit = FIRST_STEP_FACTOR * stall_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watchdog of {name}", daemon=True)
        self._thread.start()

    def beat(self, usual: float | None) -> None:
        """One ended; they usually take this many seconds (None: not known yet)."""
        self._usual = usual
        if usual is None:
            self._limit = FIRST_STEP_FACTOR * self._stall_seconds
        else:
            self._limit = max(self._stall_seconds, STALL_FACTOR * usual)
        self._last = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._stall_seconds / 4)):
            silence = time.monotonic() - self._last
            if silence >= self._limit:
                self._limit = 2 * silence
                usual = ""
                if self._usual is not None:
                    usual = f" (usual: {format_rate(self._usual, self._unit)})"
                self._print_line(
                    f"{self._name}: no {self._unit} ended for {format_duration(silence)}{usual}, "
                    f"now {self._where()}"
                )

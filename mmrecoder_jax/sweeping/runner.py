"""Runs the points of a sweep, some side by side, each as a training command of its own.

A point's output goes to `output.txt` in its directory, in a bucket when its run has ended. Points
that have finished are not run; one that fails is tried again after the others, where it resumes
from its last checkpoint. A point that another process of this machine, or of its file system, works
on (`locks`) is waited for, never run twice.

Children are process groups of their own: the terminal's Ctrl-C reaches this process alone, which
interrupts them, waits, and kills what is left of a group.
"""

import collections
import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mmrecoder_jax import places
from mmrecoder_jax.config import ConfigError, Preempted
from mmrecoder_jax.monitoring.progress import format_duration, format_number
from mmrecoder_jax.pipeline import has_finished
from mmrecoder_jax.sweeping import locks
from mmrecoder_jax.sweeping.points import Point
from mmrecoder_jax.sweeping.results import FAILURE_FILE, Metric, progress, read_result
from mmrecoder_jax.sweeping.settings import DATA, Sweep

LOG_FILE = "output.txt"
EVERY_SECONDS = 30.0  # between lines while nothing ends
POLL_SECONDS = 0.2
ENDING_SECONDS = 30.0  # that a run has to end by itself
_TAIL = 4096  # bytes of a log that are looked through for its last line
_DATA_LOCK = ".data.lock"
_SPLITS = ("train", "val", "test")


@dataclasses.dataclass
class _Run:
    """A point that runs.

    Attributes:
      slot: which of the runs side by side this is.
      began: where its log ended before.
      since: seconds of the monotonic clock.
      step: of the point when it was started.
    """

    point: Point
    process: subprocess.Popen[bytes]
    locks: Sequence[int]
    log: IO[bytes]
    slot: int
    began: int
    since: float
    step: int


class Runner:
    """Runs points.

    Args:
      command: that runs a point; flags are added to it.
      workers: runs side by side.
      retries: further tries of a point that fails.
      metric: shown of each point that finishes.
    """

    def __init__(
        self,
        sweep: Sweep,
        points: Sequence[Point],
        command: Sequence[str],
        workers: int,
        retries: int,
        metric: Metric,
    ):
        self._sweep, self._points, self._command = sweep, points, command
        self._workers, self._tries, self._metric = workers, 1 + retries, metric
        self._running: list[_Run] = []
        self._seconds: list[float] = []  # of the whole points that have finished here
        self._interrupts = 0
        self._preempted = False
        self._done: set[str] = set()  # points that have finished
        self.failures: dict[str, str] = {}

    def run(self) -> None:
        """Runs all points that have not finished; `failures` has the last line of each that
        failed, by name.
        """
        waiting = collections.deque(p for p in self._points if not self._finished(p))
        done = len(self._points) - len(waiting)
        self._say(f"{done} of {len(self._points)} points have finished before")
        tries: collections.Counter[str] = collections.Counter()
        told: set[str] = set()  # points that another process works on
        spoken = time.monotonic()
        with self._ending_all():
            while waiting or self._running:
                if self._preempted:
                    raise Preempted("the same command goes on with the points that are left")
                if self._interrupts:
                    raise KeyboardInterrupt
                self._start_some(waiting, tries, told)
                for run in [run for run in self._running if run.process.poll() is not None]:
                    if run.process.returncode == Preempted.status:
                        tries[run.point.name] -= 1  # nothing failed
                    if not self._take_leave(run) and tries[run.point.name] < self._tries:
                        waiting.append(run.point)
                    spoken = time.monotonic()
                if time.monotonic() - spoken >= EVERY_SECONDS:
                    spoken = time.monotonic()
                    with contextlib.suppress(places.BucketError):  # of progress alone
                        places.refill(self._sweep.workdir)
                    self._say(self._line())
                time.sleep(POLL_SECONDS)

    def _finished(self, point: Point) -> bool:
        if point.name not in self._done:
            directory = str(self._sweep.directory(point))
            if has_finished(self._sweep.config.stage, directory):
                self._done.add(point.name)
        return point.name in self._done

    @staticmethod
    def _say(text: str) -> None:
        print(f"sweep: {text}", flush=True)

    # ------------------------------------------------------------ starting

    def _start_some(
        self,
        waiting: collections.deque[Point],
        tries: collections.Counter[str],
        told: set[str],
    ) -> None:
        """Starts what there is room for; each waiting point is looked at once."""
        for _ in range(len(waiting)):
            if len(self._running) >= self._workers:
                return
            point = waiting.popleft()
            lock = locks.take(self._sweep.of_machine(point))
            if lock is None:
                if point.name not in told:
                    told.add(point.name)
                    who = locks.holder(self._sweep.of_machine(point)) or "another process"
                    self._say(f"{point.name} is being run by {who}: waiting for it")
                waiting.append(point)
                continue
            if self._finished(point):  # by whoever had the lock
                os.close(lock)
                self._ended_elsewhere(point)
                continue
            data = self._lock_of_data()
            if data is None:  # one point builds the charts that all of them need
                os.close(lock)
                waiting.appendleft(point)
                return
            self._start(point, [lock, *data])
            tries[point.name] += 1

    def _ended_elsewhere(self, point: Point) -> None:
        self._say(f"{point.name} was finished by another process | {self._line()}")

    def _lock_of_data(self) -> list[int] | None:
        """Nothing to hold where the shared charts are there; else the lock of who builds them, or
        None where somebody does.
        """
        data = Path(self._sweep.workdir) / DATA
        if not self._sweep.shares_data() or all((data / split).is_dir() for split in _SPLITS):
            return []
        lock = locks.take(Path(self._sweep.workdir), _DATA_LOCK)
        return None if lock is None else [lock]

    def _start(self, point: Point, held: Sequence[int]) -> None:
        self._note_failure(point, "")
        command = [*self._command, *self._sweep.flags(point)]
        log = open(self._log(point), "ab")  # noqa: SIM115 - closed by _take_leave
        began = log.tell()
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        slot = min(set(range(self._workers)) - {run.slot for run in self._running})
        step = progress(self._sweep, point)[0]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(os.environ, self._sweep.workdir, slot, self._workers),
            start_new_session=True,
            pass_fds=held,
        )
        locks.note_process(held[0], process.pid)
        run = _Run(point, process, held, log, slot, began, time.monotonic(), step)
        self._running.append(run)
        self._say(f"{point.name} {'goes on' if step else 'starts'} | {self._line()}")

    # ------------------------------------------------------------ ending

    def _take_leave(self, run: _Run) -> bool:
        """Whether a run that has ended has finished its point."""
        self._clear(run)
        self._keep_log(run.point)
        places.refill(self._sweep.workdir)
        seconds = time.monotonic() - run.since
        if self._finished(run.point):
            self.failures.pop(run.point.name, None)
            if not run.step:
                self._seconds.append(seconds)
            said = f"finished in {format_duration(seconds)}, {self._value(run.point)}"
            self._say(f"{run.point.name} {said} | {self._line()}")
            return True
        if run.process.returncode == Preempted.status:
            self._say(f"{run.point.name} was pre-empted and starts again | {self._line()}")
            return False
        said = last_line(self._log(run.point), run.began)
        failure = f"status {run.process.returncode}: {said}"
        self._note_failure(run.point, failure)
        self.failures[run.point.name] = failure
        self._say(f"{run.point.name} FAILED, {failure} | {self._line()}")
        return False

    def _log(self, point: Point) -> Path:
        return self._sweep.of_machine(point) / LOG_FILE

    def _keep_log(self, point: Point) -> None:
        """Puts what a run of this machine has said beside the point, where that is in a bucket."""
        log, kept = self._log(point), self._sweep.directory(point) / LOG_FILE
        if log != kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, kept)
            places.put(kept)

    def _note_failure(self, point: Point, failure: str) -> None:
        """Writes what became of a point's last run; nothing where it has not failed."""
        path = self._sweep.directory(point) / FAILURE_FILE
        if not failure and not path.exists():
            return
        if failure:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{failure}\n", "utf-8")
        else:
            path.unlink()
        places.put(path)

    def _value(self, point: Point) -> str:
        """The number of a point; a metric that does not exist ends no sweep, but its table."""
        try:
            value = read_result(self._sweep, point, self._metric).value
        except ConfigError as error:
            return str(error)
        return f"{self._metric.name} {format_number(value)}"

    def _clear(self, run: _Run) -> None:
        """Leaves nothing of a run that has ended: what is left of its group is killed."""
        _signal(run, signal.SIGKILL)
        run.log.close()
        for lock in run.locks:
            os.close(lock)
        self._running.remove(run)

    @contextlib.contextmanager
    def _ending_all(self) -> Iterator[None]:
        """Around the loop: whatever ends it ends the runs. Ctrl-C, SIGTERM and SIGHUP are counted,
        so that none comes between the start of a run and the note of it. SIGTERM is passed on, so
        that runs save; the others interrupt them.
        """

        def count(number: int, frame: object) -> None:
            self._interrupts += 1
            self._preempted |= number == signal.SIGTERM

        def nothing(number: int, frame: object) -> None:
            pass

        before: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What nohup or a shell has this process ignore stays ignored; but runs would inherit
            # that, and they are ended by SIGINT.
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not ignored:
                before[number] = signal.signal(number, count)
            elif number == signal.SIGINT:
                before[number] = signal.signal(number, nothing)
        try:
            yield
        finally:
            if self._running:
                self._say(f"ending {len(self._running)} runs; once more kills them")
                self._end_all()
            for heard, handler in before.items():
                signal.signal(heard, handler)

    def _end_all(self) -> None:
        for run in self._running:
            _signal(run, signal.SIGTERM if self._preempted else signal.SIGINT)
        until = time.monotonic() + ENDING_SECONDS
        while any(run.process.poll() is None for run in self._running):
            if time.monotonic() > until or self._interrupts > 1:
                break
            time.sleep(POLL_SECONDS)
        for run in list(self._running):
            _signal(run, signal.SIGKILL)
            run.process.wait()
            self._clear(run)
            with contextlib.suppress(places.BucketError):  # the sweep is ending anyway
                self._keep_log(run.point)

    # ------------------------------------------------------------ progress

    def _line(self) -> str:
        """`2/6 33% ETA 9:12 | eta-0.1_seed-0 12/26`"""
        done = sum(map(self._finished, self._points))
        share = f"{100 * done / len(self._points):.0f}%"
        steps = [self._step_of(run) for run in self._running]
        head = f"{done}/{len(self._points)} {share} ETA {format_duration(self._seconds_left(done))}"
        return " | ".join([head, *(filter(None, [", ".join(steps)]))])

    def _step_of(self, run: _Run) -> str:
        step, steps = progress(self._sweep, run.point)
        return f"{run.point.name} {step}/{steps or '?'}"

    def _seconds_left(self, done: int) -> float:
        """By the points that finished here, and by how far those that run have come since; NaN
        where nothing is known of either.
        """
        parts, spent, missing = float(len(self._seconds)), sum(self._seconds), 0.0
        for run in self._running:
            step, steps = progress(self._sweep, run.point)
            if steps and step > run.step:
                parts += (step - run.step) / steps
                spent += time.monotonic() - run.since
            missing += 1 - step / steps if steps else 1.0
        missing += len(self._points) - done - len(self._running)
        if not missing:
            return 0.0
        return (
            missing * spent / parts / min(self._workers, max(missing, 1)) if parts else float("nan")
        )


def _signal(run: _Run, number: signal.Signals) -> None:
    """Sends a signal to the processes of a run that are still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(run.process.pid, number)


def environment(
    environ: Mapping[str, str], workdir: str, slot: int, workers: int
) -> dict[str, str]:
    """The environment of a run: compiled programs are kept for all points, and the cards that
    CUDA_VISIBLE_DEVICES names are divided among the runs side by side.

    Args:
      slot: which of the runs side by side this is.
    """
    cache = os.path.join(os.path.abspath(workdir), ".jax_cache")
    found = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        **environ,
        "PYTHONUNBUFFERED": "1",
    }
    cards = [card for card in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card.strip()]
    share = len(cards) // workers
    if share:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(cards[slot * share : (slot + 1) * share])
    return found


def last_line(log: Path, start: int) -> str:
    """What a run said last: its own line of an error where there is one.

    Args:
      start: bytes of the log that are of earlier runs.
    """
    with open(log, "rb") as f:
        end = f.seek(0, os.SEEK_END)
        f.seek(max(start, end - _TAIL))
        lines = f.read().decode(errors="replace").splitlines()
    words = [line.strip() for line in lines if line.strip() and not line.startswith("$ ")]
    errors = [line for line in words if line.startswith("error:")]
    return (errors or words or ["it said nothing"])[-1][:500]

"""What every judge has in common: verdicts, their cache, and when a judge counts as down.

A judge compares the render of a turn with the target and gives a score in [0, 1]: `Model` in the
reward of arXiv 2604.01600. `make.BackEnd` lists the judges there are.

A pair is submitted as soon as there is a render and collected when the turn is scored, so that
judging overlaps decoding. A pair that could not be scored (the server never answered, the answer
cannot be read) has `score` None: its trajectory leaves the baseline and gets advantage 0. It never
counts as a score of 0. Too many failures in a row raise `JudgeDown`.
"""

import abc
import contextlib
import dataclasses
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import IO, Self

import numpy as np


class JudgeDown(RuntimeError):
    """The judge fails too often to go on; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge said about one pair.

    Attributes:
      score: in [0, 1]; None if the pair could not be scored.
      points: per dimension of the question (`answers.POINTS`, `differences.CATEGORIES`); empty for
        the visual similarity and without a score.
      problem: why there is no score, else "".
      of_pair: the pair itself is why: it speaks against no judge, and counts as no failure of one.
      seconds: from submission to answer; 0 if the answer was known.
    """

    score: float | None
    points: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0
    of_pair: bool = False


Answer = Callable[[Verdict], None]  # takes the verdict on one pair


_MOST_KNOWN = 100_000  # verdicts in memory; the oldest are forgotten and would be asked again
_LARGEST_FILE = 32 << 20  # bytes of a cache's file; a writer has two
_LONGEST_LINE = 4096  # bytes of a verdict
_MOST_POINTS = 100_000  # of one dimension, of any judge


class VerdictCache:
    """Verdicts by key, kept in JSON-lines files: a resumed run asks nothing twice.

    A line that is no verdict is skipped, whatever made it: half a line of a killed writer, a
    damaged block, another program. A file that has grown too large becomes `verdicts-<writer>-old`,
    in place of the one before, so that neither files nor memory grow without end.

    Args:
      directory: has the files of all writers; the newest verdicts in all files are read. None keeps
        verdicts in memory only.
      writer: name of this process's file.
    """

    def __init__(self, directory: str | None = None, writer: str = "0"):
        self._known: dict[str, Verdict] = {}  # in the order in which they came
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        if directory is None:
            return
        os.makedirs(directory, exist_ok=True)
        names = [name for name in os.listdir(directory) if name.endswith(".jsonl")]
        for name in sorted(names):  # "verdicts-0-old" before "verdicts-0"
            self._read(os.path.join(directory, name))
        self._path = os.path.join(directory, f"verdicts-{writer}.jsonl")
        self._open()

    def _open(self) -> None:
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if self._file.tell():
            self._file.write("\n")  # a killed writer may have left half a line

    def _read(self, path: str) -> None:
        """Adds the verdicts of a file; of a large one, those at its end."""
        # another writer may be renaming it; a pipe or a device of that name has no end
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                return
            with open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LARGEST_FILE))
                while line := file.readline(_LONGEST_LINE):
                    with contextlib.suppress(ValueError, RecursionError):
                        self._remember(*_parse(line))

    def _remember(self, key: str, known: Verdict) -> None:
        self._known.pop(key, None)
        self._known[key] = known
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]

    def get(self, key: str) -> Verdict | None:
        """The verdict for a key, None if there is none."""
        with self._lock:
            return self._known.get(key)

    def put(self, key: str, known: Verdict) -> None:
        """Keeps a verdict that has a score (one without a score is to be asked again)."""
        assert known.score is not None
        points = {name: float(value) for name, value in known.points.items()}
        row = json.dumps({"key": key, "score": float(known.score), "points": points})
        with self._lock:
            self._remember(key, dataclasses.replace(known, seconds=0.0))
            if self._file is None:
                return
            try:
                self._write(row + "\n")
            except OSError:  # the disk is full: this run goes on, a later one asks again
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None

    def _write(self, line: str) -> None:
        assert self._file is not None
        if self._file.tell() + len(line) > _LARGEST_FILE:
            self._file.close()
            os.replace(self._path, self._path.removesuffix(".jsonl") + "-old.jsonl")
            self._open()
        self._file.write(line)
        self._file.flush()

    def close(self) -> None:
        """Closes this process's file."""
        if self._file is not None:
            self._file.close()


def _parse(line: bytes) -> tuple[str, Verdict]:
    """The key and the verdict in a line of a cache; raises ValueError for a line that has none."""
    row = json.loads(line)
    if not isinstance(row, dict) or set(row) != {"key", "score", "points"}:
        raise ValueError("no verdict")
    key, score, points = row["key"], row["score"], row["points"]
    if not isinstance(key, str) or not isinstance(points, dict):
        raise ValueError("no verdict")
    for value, most in ((score, 1), *((value, _MOST_POINTS) for value in points.values())):
        if type(value) not in (int, float) or not 0 <= value <= most:  # NaN fails this
            raise ValueError("no points")
    return key, Verdict(float(score), {name: float(value) for name, value in points.items()})


class Judge(abc.ABC):
    """Scores pairs of pictures. Thread-safe; a context manager.

    Args:
      name: what reports call the judge.
      identity: everything else that decides a score (model, prompt); part of the cache's key.
      cache: where verdicts are kept; the judge closes it.
      max_failures: after this many pairs in a row without a score, every pair fails with JudgeDown.

    A judge of one's own overrides `ask` and nothing else:

        class Luminance(Judge):
            def ask(self, target, render, answer):
                answer(Verdict(render.mean() / 255))
    """

    def __init__(self, name: str, identity: str, cache: VerdictCache, max_failures: int):
        self.name = name
        self._identity = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._cache = cache
        self._lock = threading.Lock()
        self._pending: dict[str, Future[Verdict]] = {}
        self._max_failures, self._failures, self._down = max_failures, 0, ""
        self._stats: dict[str, float] = dict.fromkeys(
            ("requests", "cache_hits", "scored", "unscorable", "retries"), 0
        )
        self._seconds, self._slowest = 0.0, 0.0

    def submit(self, target: bytes, render: np.ndarray) -> Future[Verdict]:
        """Starts judging a pair; equal pairs are asked once.

        Args:
          target: PNG bytes.
          render: uint8 pixels `[height, width, 3]`.

        Returns:
          A future of the verdict; its `result()` raises JudgeDown when the judge is down.
        """
        picture = hashlib.sha256(f"{render.shape}".encode() + render.tobytes())
        key = f"{self._identity}-{hashlib.sha256(target).hexdigest()}-{picture.hexdigest()}"
        future: Future[Verdict] = Future()
        future.set_running_or_notify_cancel()  # shared by equal pairs, so it cannot be cancelled
        with self._lock:
            self._stats["requests"] += 1
            known = self._cache.get(key)
            if known is not None or key in self._pending:
                self._stats["cache_hits"] += 1
                if known is None:
                    return self._pending[key]
                future.set_result(known)
                return future
            self._pending[key] = future
        start = time.monotonic()

        def answer(found: Verdict) -> None:
            self._settle(key, future, found, time.monotonic() - start)

        try:
            self.ask(target, render, answer)
        except Exception as problem:  # whatever it is, the trainer waits for a verdict
            if future.done():
                raise
            answer(Verdict(None, problem=f"{type(problem).__name__}: {problem}"))
        return future

    def finish(self) -> None:  # noqa: B027
        """Called once after the last `submit` of a turn, on every host.

        A judge on the accelerator works here; other judges do nothing.
        """

    def stats(self) -> dict[str, float]:
        """Counts since the start, and latencies in seconds.

        The keys are requests, cache_hits, scored, unscorable, retries, latency_mean, latency_max.
        """
        with self._lock:
            answered = self._stats["scored"] + self._stats["unscorable"]
            return self._stats | {
                "latency_mean": self._seconds / max(answered, 1),
                "latency_max": self._slowest,
            }

    def close(self) -> None:
        """Ends what runs; pairs in flight come back without a score."""
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abc.abstractmethod
    def ask(self, target: bytes, render: np.ndarray, answer: Answer) -> None:
        """Starts judging a pair that is not in the cache; for subclasses to define.

        `answer(verdict)` must be called exactly once, from any thread.
        """

    def _settle(self, key: str, future: Future[Verdict], found: Verdict, seconds: float) -> None:
        found = dataclasses.replace(found, seconds=seconds)
        if found.score is not None and not 0 <= found.score <= 1:  # NaN fails this
            problem = f"a score is a number from 0 to 1, not {found.score!r}"
            found = Verdict(None, problem=problem, seconds=seconds)
        if found.score is not None:
            self._cache.put(key, found)
        with self._lock:
            del self._pending[key]
            self._stats["scored" if found.score is not None else "unscorable"] += 1
            self._seconds += seconds
            self._slowest = max(self._slowest, seconds)
            if not found.of_pair:
                self._failures = 0 if found.score is not None else self._failures + 1
            if self._failures >= self._max_failures and not self._down:
                self._down = (
                    f"{self._failures} pairs in a row without a score (judge.max_failures); "
                    f"the last: {found.problem}"
                )
            down = self._down
        if down:
            future.set_exception(JudgeDown(f"the {self.name} judge is down: {down}"))
        else:
            future.set_result(found)

    def _give_up(self, problem: str) -> None:
        """For subclasses: no further pair can succeed, because of `problem`."""
        with self._lock:
            self._down = self._down or problem

    @property
    def _is_down(self) -> bool:
        with self._lock:
            return bool(self._down)

    def _count_retry(self) -> None:
        with self._lock:
            self._stats["retries"] += 1

"""What every judge has in common: verdicts, their cache, and when a judge counts as down.

A judge compares the render of a turn with the target and gives a score in [0, 1]: `Model` in the
reward of arXiv 2604.01600. `make.BackEnd` lists the judges there are.

A pair is submitted as soon as there is a render and collected when the turn is scored, so that
judging overlaps decoding. A pair that could not be scored (the server never answered, the answer
cannot be read) has `score` None: its trajectory leaves the baseline and gets advantage 0. It never
counts as a score of 0. Too many failures in a row raise `JudgeDown`.
"""

import abc
import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Self

import numpy as np


class JudgeDown(RuntimeError):
    """The judge fails too often to go on; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge said about one pair.

    Attributes:
      score: in [0, 1]; None if the pair could not be scored.
      points: per dimension (`answers.POINTS`); empty for the visual similarity and without a score.
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


class VerdictCache:
    """Verdicts by key, kept in a JSON-lines file: a resumed run asks nothing twice.

    Args:
      directory: has one file per writer; all files in it are read. None keeps verdicts in memory
        only.
      writer: name of this process's file.
    """

    def __init__(self, directory: str | None = None, writer: str = "0"):
        self._known: dict[str, Verdict] = {}
        self._lock = threading.Lock()
        self._file = None
        if directory is None:
            return
        os.makedirs(directory, exist_ok=True)
        for name in sorted(os.listdir(directory)):
            if name.endswith(".jsonl"):
                self._read(os.path.join(directory, name))
        own = os.path.join(directory, f"verdicts-{writer}.jsonl")
        self._file = open(own, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if self._file.tell():
            self._file.write("\n")  # a killed writer may have left half a line

    def _read(self, path: str) -> None:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    self._known[row["key"]] = Verdict(float(row["score"]), row["points"])
                except (ValueError, KeyError, TypeError):
                    continue  # blank, or half a line of a killed writer

    def get(self, key: str) -> Verdict | None:
        """The verdict for a key, None if there is none."""
        with self._lock:
            return self._known.get(key)

    def put(self, key: str, known: Verdict) -> None:
        """Keeps a verdict that has a score (one without a score is to be asked again)."""
        row = json.dumps({"key": key, "score": known.score, "points": dict(known.points)})
        with self._lock:
            self._known[key] = dataclasses.replace(known, seconds=0.0)
            if self._file is not None:
                self._file.write(row + "\n")
                self._file.flush()

    def close(self) -> None:
        """Closes this process's file."""
        if self._file is not None:
            self._file.close()


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
        self.ask(
            target, render, lambda found: self._settle(key, future, found, time.monotonic() - start)
        )
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

"""The scripts that wait for an executor: whoever has room takes the next one.

An executor of this machine waits for a script and has it at once. A connection to another machine
comes for one (`come`), asks that machine for room, and takes a script (`take`) when it has room: no
script waits over there while an executor is idle here. As long as it counts as coming, no other
connection asks for room for the same script.
"""

import collections
import dataclasses
import threading
import time
from concurrent.futures import Future
from typing import Any

from mmrecoder_jax.env.wire import Request


@dataclasses.dataclass(eq=False)
class Job:
    """A script that waits or runs.

    Attributes:
      request: the script, and what is wanted of it.
      watched: its drawing is replayed.
      key: under which its result is kept.
      future: of whoever waits for the result.
      submitted: when, on the monotonic clock.
      waited: seconds until an executor took it, for the last time.
      lost: how many executors died, hung or talked nonsense while they ran it.
      killed: how often somebody else killed its process.
      doubted: the host whose answer for it did not fit together; "" as long as there is none.
    """

    request: Request
    watched: bool
    key: Any
    future: Future[Any]
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    waited: float = 0.0
    lost: int = 0
    killed: int = 0
    doubted: str = ""


class Backlog:
    """A queue of jobs for threads that each serve one executor. Each job wakes one of them."""

    def __init__(self) -> None:
        self._anywhere: collections.deque[Job] = collections.deque()
        self._here: collections.deque[Job] = collections.deque()  # for this machine alone
        lock = threading.Lock()
        self._local, self._remote = threading.Condition(lock), threading.Condition(lock)
        self._resting = 0  # executors of this machine that wait and were not woken
        self._coming = 0
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._anywhere) + len(self._here)

    @property
    def shortage(self) -> int:
        """How many scripts wait that no connection comes for."""
        return len(self._anywhere) - self._coming

    @property
    def waiting_since(self) -> float:
        """When the script that is next was submitted; now where none waits."""
        with self._local:
            return self._anywhere[0].submitted if self._anywhere else time.monotonic()

    def put(self, job: Job) -> None:
        """Adds a script at the end."""
        with self._local:
            self._anywhere.append(job)
            self._wake()

    def put_back(self, job: Job, here: bool) -> None:
        """Puts a script before all others; for the executors of this machine alone if `here`."""
        with self._local:
            (self._here if here else self._anywhere).appendleft(job)
            self._wake()

    def get(self) -> Job | None:
        """Waits for a script, on an executor of this machine; None when the backlog is closed."""
        with self._local:
            while not len(self) and not self._is_closed:
                self._resting += 1
                self._local.wait()  # whoever wakes it takes it out of the count
            return None if self._is_closed else _taken_from(self._here or self._anywhere)

    def come(self, seconds: float) -> bool:
        """Waits until a script has no executor that comes for it.

        Returns:
          Whether that happened in time. Then the caller is counted until `stay_away`.
        """
        with self._remote:
            came = self._remote.wait_for(lambda: self.shortage > 0 or self._is_closed, seconds)
            if not came or self._is_closed:
                return False
            self._coming += 1
            return True

    def stay_away(self) -> None:
        """The caller counts as coming no longer."""
        with self._local:
            self._coming -= 1
            if self.shortage > 0:
                self._wake()

    def take(self, doubted: str = "") -> Job | None:
        """A script for an executor of another machine, if one is left.

        Args:
          doubted: a host whose answers others should check; its own scripts are left to them.
        """
        with self._local:
            if self._is_closed:
                return None
            for place, job in enumerate(self._anywhere):
                if not job.doubted or job.doubted != doubted:
                    return _taken_from(self._anywhere, place)
            return None

    def close(self) -> list[Job]:
        """Ends all waiting, now and from now on; what is left."""
        with self._local:
            self._is_closed = True
            self._local.notify_all()
            self._remote.notify_all()
        return self.empty()

    def empty(self) -> list[Job]:
        """Takes all that waits."""
        with self._local:
            left = [*self._here, *self._anywhere]
            self._here.clear()
            self._anywhere.clear()
            return left

    def _wake(self) -> None:
        if self._resting:
            self._resting -= 1
            self._local.notify()
        else:
            self._remote.notify()


def _taken_from(jobs: collections.deque[Job], place: int = 0) -> Job:
    job = jobs[place]
    del jobs[place]
    job.waited = time.monotonic() - job.submitted
    return job

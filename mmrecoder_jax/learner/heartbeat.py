"""Each process of a run notices which other one is lost, and ends with its name.

Every process writes a number that grows into the store of JAX's coordinator, which process 0 hosts,
and reads those of the others:

    its number stays the same for `seconds`     it was killed, hangs or cannot be reached
    it says that it is leaving                  it has failed; its own words are handed on
    no answer from the store for `seconds`      process 0 is lost

JAX's own heartbeat ends a process from C++, with pages of text and no name of a host; it is left
on, with a longer time. Where process 0 is gone JAX ends the others at once; `before_aborting` finds
the name first. What is not noticed is a process whose main thread hangs while its threads run.
"""

import contextlib
import ctypes
import dataclasses
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

_FOLDER = "mmrecoder/alive/"
_SHARE = 6  # beats in the time after which a process counts as lost
_MOST_SECONDS = 5.0  # between beats
_FIRST_SECONDS = 0.1  # between beats until all others have been heard
_LONGEST = 300  # characters of another one's words


@runtime_checkable
class Store(Protocol):
    """What is used of JAX's coordination client."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclasses.dataclass
class _Other:
    """What is known of another process.

    Attributes:
      beat: the last number that it wrote.
      since: when that was first read.
      host: the name of its machine.
      leaving: why it ends; None while it goes on.
    """

    beat: int
    since: float
    host: str = ""
    leaving: str | None = None


class Heartbeat:
    """Beats from its making to `stop`; ends this process where another one is lost.

    Args:
      store: of all processes.
      number, count: of this process; of all.
      seconds: without a sign of life after which a process is lost.
      end: how this process ends, by the reason.

    Attributes:
      every: seconds between beats.
    """

    def __init__(
        self,
        store: Store,
        number: int,
        count: int,
        seconds: float,
        end: Callable[[str], None],
    ):
        self._store, self._number, self._count = store, number, count
        self._seconds, self._end = seconds, end
        self.every = min(_MOST_SECONDS, seconds / _SHARE)
        now = time.monotonic()
        self._others = {other: _Other(-1, now) for other in range(count) if other != number}
        self._answered = now  # by the store
        self._refused = False  # by the store, since it last answered
        self._asked = False  # whether somebody waits for the name, who will end this process
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._met = threading.Event()  # all others have been heard
        self._lost = ""
        self._writing, self._beats = threading.Lock(), 0
        for name, work in (("heartbeat", self._beat), ("heartbeats of others", self._watch)):
            threading.Thread(target=work, name=name, daemon=True).start()

    def meet(self) -> None:
        """Waits until every other process has been heard, so that the names of their hosts are
        known, but no longer than until one of them is lost.
        """
        self._met.wait(self._seconds)

    def stop(self) -> None:
        """No process is looked for any more, and this one is not ended."""
        self._stopped.set()
        self._wake.set()

    def leave(self, reason: str) -> None:
        """Stops, and tells the others that this process ends, and why ("": as all do).

        Without process 0 the others would not hear it: that one waits for them a little.
        """
        self.stop()
        if self._silenced():
            return  # nobody would hear it
        telling = threading.Thread(target=self._last_words, args=(reason,), daemon=True)
        telling.start()
        telling.join((2 if self._number else 4) * self.every)

    def _last_words(self, reason: str) -> None:
        until = time.monotonic() + 3 * self.every
        with contextlib.suppress(Exception):  # whatever JAX's transport raises
            self._write(reason)
            while self._number == 0 and time.monotonic() < until:
                self._read(self._store.key_value_dir_get(_FOLDER))
                if all(other.leaving is not None for other in self._others.values()):
                    return
                time.sleep(self.every / 10)

    def who_is_lost(self) -> str:
        """Waits until it is known which process is lost, and says so; "" where none is.

        Called where JAX has lost another one, also where it is about to end this process.
        """
        self._asked = True
        self._wake.set()
        until = time.monotonic() + 6 * self.every
        while not self._lost and time.monotonic() < until:
            time.sleep(0.05)
        return self._lost

    def _beat(self) -> None:
        """Writes and reads, again and again; hangs where the store does."""
        while not self._stopped.is_set():
            try:
                self._write(None)
                found = self._store.key_value_dir_get(_FOLDER)
            except Exception:  # whatever JAX's transport raises
                self._refused = True
            else:
                self._refused = False
                self._answered = time.monotonic()
                self._read(found)
            self._wake.wait(self.every if self._met.is_set() else _FIRST_SECONDS)
            self._wake.clear()

    def _write(self, leaving: str | None) -> None:
        with self._writing:
            if leaving is None and self._stopped.is_set():
                return  # the last words stay
            self._beats += 1
            said = {"beat": self._beats, "host": socket.gethostname(), "leaving": leaving}
            self._store.key_value_set(f"{_FOLDER}{self._number}", json.dumps(said), True)

    def _read(self, found: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        for key, text in found:
            other = self._others.get(int(key.rpartition("/")[2]))
            said = json.loads(text)
            if other is not None and said["beat"] != other.beat:
                other.beat, other.since = said["beat"], now
                other.host, other.leaving = said["host"], said["leaving"]
        if all(other.beat >= 0 for other in self._others.values()):
            self._met.set()

    def _watch(self) -> None:
        """Looks at what was read; the process itself may have been stopped meanwhile."""
        looked = time.monotonic()
        while not self._stopped.wait(self.every / 4):
            now = time.monotonic()
            if now - looked > self._seconds / 2:
                self._forget(now)
            looked = now
            self._lost = self._lost or self._who(now)
            if self._lost and not self._asked:
                self.leave(self._lost)
                self._end(self._lost)

    def _forget(self, now: float) -> None:
        """This process was asleep: nobody's silence counts from before."""
        self._answered = now
        for other in self._others.values():
            other.since = now

    def _who(self, now: float) -> str:
        """Which process is lost, in words."""
        silent = now - self._answered
        if self._number and self._silenced():
            return self._named(0, self._words(silent))
        # Where JAX has lost somebody already, three beats without a word are enough.
        patience = 3 * self.every if self._asked else self._seconds
        for number, other in self._others.items():
            quiet = now - other.since
            # The main thread may know more of it, and ends this process by itself.
            if other.leaving and (self._asked or quiet > self.every):
                if re.match(rf"process \d+ of {self._count}\b", other.leaving):
                    return other.leaving  # it blames a third one
                return self._named(number, f"has ended: {other.leaving[:_LONGEST]}")
            # Without an answer from the store nothing is known of the others.
            if other.leaving is None and quiet > patience and silent < patience / 2:
                return self._named(number, self._words(quiet))
        return ""

    def _silenced(self) -> bool:
        """Whether the store is gone: JAX has given up, and calls of it may hang from then on."""
        silent = time.monotonic() - self._answered
        return silent > (2 * self.every if self._asked else self._seconds) or (
            self._asked and self._refused
        )

    def _named(self, number: int, what: str) -> str:
        host = self._others[number].host
        return f"process {number} of {self._count} ({host or 'host unknown'}) {what}"

    def _words(self, seconds: float) -> str:
        silence = f"has given no sign of life for {seconds:.0f} s"
        if self._refused:
            silence = "cannot be reached"
        return (
            f"{silence}: it has ended, or hangs; its own output may say why. Start all of them "
            "again, and they go on from the last checkpoint"
        )


def client() -> Any:
    """The coordination client of this process; JAX has no public name for it, orbax uses it too."""
    from jax._src import distributed  # nothing else here starts JAX

    return distributed.global_state.client


_handler: Any = None  # kept: C calls it


def before_aborting(act: Callable[[], None]) -> None:
    """Calls a function before the process is ended from C++, in the thread that ends it; where the
    function returns, the process is ended.

    A handler of Python's `signal` would run in the main thread, which comes too late.
    """
    global _handler
    signal_of_c = ctypes.CDLL(None).signal
    signal_of_c.restype, signal_of_c.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    first = threading.Lock()

    def handle(number: int) -> None:
        # Every thread that is told of the lost process aborts: the first one speaks for all.
        if first.acquire(blocking=False):
            act()
            signal_of_c(number, before)
        else:
            time.sleep(threading.TIMEOUT_MAX)

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    before = signal_of_c(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))

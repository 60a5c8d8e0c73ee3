"""An executor host: lends the executors of this machine to trainers.

Each connection has a thread and at most one executor of its own, started with the settings of its
trainer: what an executor has in memory is of one pool, and references stay apart from answers here
too (`pools.py`). At most as many scripts run at a time as the host lends executors, whoever asks;
the others wait for room, which is when their trainers have not sent them yet (`remote.py` says what
is said on a connection).

A trainer that knows the secret may have scripts run, inside the sandbox that this host was started
with, and nothing else: no word of a trainer names a file, a program or another sandbox.
"""

import contextlib
import dataclasses
import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmrecoder_jax.env import channel, local, wire
from mmrecoder_jax.env.channel import BEAT, Channel, Refused, pack, printable
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.interpreter import Interpreter
from mmrecoder_jax.env.likeness import likeness
from mmrecoder_jax.env.local import Executor, ExecutorError
from mmrecoder_jax.env.remote import FULL, PING, READY, ROOM, UNWANT, WANT
from mmrecoder_jax.env.sandbox import scratch
from mmrecoder_jax.env.wire import RecordKind, Request, Settings

_GREET_SECONDS = 10.0
_TAKE_SECONDS = 30.0  # for a trainer that has asked for room to use it
_SILENCE_SECONDS = 120.0  # a trainer that says nothing for so long is gone
_LOOK_SECONDS = 0.25  # between two looks whether a wait has become useless
_WORDS = (1 << 16, 0, 0)  # the longest greeting of a trainer
_LONGEST_REASON = 300
_CLOSE_SECONDS = 20.0
_BACKLOG = 128  # connections that were not accepted yet
# What the settings of a trainer may be at most.
_MOST = {"dpi": 10_000, "max_pixels": 1 << 28, "memory_mb": 1 << 20}
_MOST_SECONDS = 86_400.0
_MOST_ABI = 1_000
_MOST_SAID = 1_000  # lines about who connects
_SPARE_CONNECTIONS = 256  # above those with an executor: of keepers, and of who greets


class ExecutorHost:
    """Serves trainers on a listening socket. A context manager.

    Args:
      listener: bound and not yet listening; closed with the host.
      config: how executors run here: `workers` is how many scripts run at a time, `sandbox` the
        only one that scripts run in. Limits and style are those of each trainer.
      python: what executors run on.
      secret: that trainers have to know.
      processes: how many executors may be started at one time, for all trainers together.
      say: shows a line to the user.
    """

    def __init__(
        self,
        listener: socket.socket,
        config: EnvConfig,
        python: Interpreter,
        secret: bytes,
        processes: int,
        say: Callable[[str], None],
    ):
        self._listener, self._config, self._python = listener, config, python
        self._secret, self._most, self._say = secret, processes + _SPARE_CONNECTIONS, say
        self._processes = threading.Semaphore(processes)
        self._room = threading.Semaphore(config.workers)
        self._lock = threading.Lock()
        self._sessions: dict[_Session, threading.Thread] = {}
        self._closing = threading.Event()
        self._said: set[tuple[str, str]] = set()
        self._count = 0
        self._directory = local.make_directory()
        listener.listen(_BACKLOG)
        self._thread = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all connections and executors, and removes their files."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for connections
        self._thread.join()
        self._listener.close()
        with self._lock:
            sessions = dict(self._sessions)
        for session in sessions:
            session.close()
        for thread in sessions.values():
            thread.join(_CLOSE_SECONDS)
        scratch.remove(str(self._directory))

    def __enter__(self) -> "ExecutorHost":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept(self) -> None:
        self._listener.settimeout(_LOOK_SECONDS)
        while not self._closing.is_set():
            try:
                sock, peer = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as problem:  # too many open files, say; or it was closed
                if self._closing.is_set():
                    return
                self._tell("host", f"no connection can be taken ({problem.strerror})")
                self._closing.wait(_LOOK_SECONDS)
                continue
            with self._lock:
                is_full = len(self._sessions) >= self._most
            if is_full:
                sock.close()
                self._tell(peer[0], f"there are {self._most} connections already")
            else:
                self._begin(sock, peer[0])

    def _begin(self, sock: socket.socket, name: str) -> None:
        self._count += 1
        executor = _Factory(self._config, self._python, self._directory, self._count)
        session = _Session(Channel(sock), executor, self._room, self._processes)
        thread = threading.Thread(
            target=self._serve, args=(session, name), name=f"session-{self._count}", daemon=True
        )
        with self._lock:
            self._sessions[session] = thread
        try:
            thread.start()
        except RuntimeError:
            self._tell(name, f"it cannot be served: {local.MORE_PROCESSES}")
            self._forget(session)

    def _serve(self, session: "_Session", name: str) -> None:
        try:
            session.serve(self._secret)
        except (Refused, ExecutorError) as problem:
            self._tell(name, str(problem))
        except (ValueError, KeyError, TypeError) as problem:
            self._tell(name, f"it is no trainer of this version ({problem})")
        except (OSError, EOFError):
            pass  # it went, or is silent
        finally:
            session.end()
            self._forget(session)

    def _forget(self, session: "_Session") -> None:
        with self._lock:
            self._sessions.pop(session, None)

    def _tell(self, name: str, problem: str) -> None:
        """Says once what is wrong with whoever connects from there."""
        problem = printable(problem)
        if (name, problem) not in self._said and len(self._said) < _MOST_SAID:
            self._said.add((name, problem))
            self._say(f"{name}: {problem}")


@dataclasses.dataclass(frozen=True)
class _Factory:
    """Makes the executor of one connection."""

    config: EnvConfig
    python: Interpreter
    directory: Path
    index: int

    def make(self, settings: Settings, is_wrapped: bool) -> Executor:
        """An executor with those settings of a trainer; raises ValueError for what cannot be."""
        wanted = config_of(settings, self.config, is_wrapped)
        return Executor(wanted, self.python, self.directory, self.index)


class _Session:
    """One connection.

    Args:
      line: to the trainer.
      factory: makes its executor.
      room: a place for each script that may run.
      processes: a place for each executor that may be started.
    """

    def __init__(
        self,
        line: Channel,
        factory: _Factory,
        room: threading.Semaphore,
        processes: threading.Semaphore,
    ):
        self._line, self._factory, self._room, self._processes = line, factory, room, processes
        self._executor: Executor | None = None
        self._is_wrapped = True
        self._lock = threading.Lock()  # of the executor being there, and closing
        self._over = threading.Event()
        self._beating = threading.Lock()
        self._is_working = False

    def serve(self, secret: bytes) -> None:
        """Does what the trainer asks for, until it goes.

        Raises:
          Refused: it has another secret.
          ExecutorError: its executor does not start.
          ValueError, KeyError, TypeError: it says what cannot be.
          OSError, EOFError: it is gone.
        """
        line, config = self._line, self._factory.config
        line.admit(secret, _GREET_SECONDS)
        self._is_wrapped = line.receive(_GREET_SECONDS, _WORDS)[0]["bubblewrap"] is True
        here = dataclasses.replace(config, bubblewrap=self._is_wrapped)
        like = likeness(here, self._factory.python)
        line.send({"executors": config.workers, "like": like})
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        while not self._over.is_set():
            words = self._receive(_SILENCE_SECONDS)
            if words == PING:
                line.send(BEAT)
            elif words == WANT and self._executor is not None:
                self._lend(self._executor)
            elif "settings" in words and self._executor is None:
                if not self._prepare(Settings.from_json(words["settings"])):
                    return
            else:
                raise ValueError("words that are not expected here")

    def close(self) -> None:
        """Makes `serve` end, from another thread."""
        with self._lock:
            self._over.set()
            if self._executor is not None:
                self._executor.close()
        self._line.shut()

    def end(self) -> None:
        """Gives everything back, after `serve`."""
        self._over.set()
        self._line.shut()
        if self._executor is not None:
            self._executor.stop()
            self._processes.release()
        self._line.close()

    def _prepare(self, settings: Settings) -> bool:
        """Starts the executor; whether there was one to be had."""
        executor = self._factory.make(settings, self._is_wrapped)
        if not self._processes.acquire(blocking=False):
            self._line.send(FULL)
            return False
        with self._lock:
            self._executor = executor
            if self._over.is_set():
                executor.close()
        try:
            with self._working():
                self._start(executor)
        except ExecutorError as problem:
            self._line.send({"failed": str(problem)[:_LONGEST_REASON]})
            raise
        self._line.send(READY)
        return True

    def _start(self, executor: Executor) -> None:
        executor.start()
        executor.wait_ready()

    def _lend(self, executor: Executor) -> None:
        """Waits for room and runs one script, if the trainer has still one."""
        with self._working():
            if not executor.is_running:
                self._start(executor)
            while not self._room.acquire(timeout=_LOOK_SECONDS):
                if self._over.is_set():
                    raise EOFError("the host ends")
        try:
            self._line.send(ROOM)
            words = self._receive(_TAKE_SECONDS)
            if words != UNWANT:
                self._run(executor, words)
        finally:
            self._room.release()

    def _run(self, executor: Executor, words: Mapping[str, Any]) -> None:
        number, watched, code = words["run"], words["watched"], words["code"]
        if not isinstance(number, int) or not isinstance(watched, bool):
            raise ValueError("no number of a script")
        if not isinstance(code, str) or len(code) > wire.MAX_CODE_CHARACTERS:
            raise ValueError("no script, or one that is too long")
        request = Request(code, RecordKind(words["kind"]))
        answer = None
        with self._working(), contextlib.suppress(OSError, EOFError, ValueError):
            answer = executor.execute(request, watched)
        if answer is None:
            executor.stop()
            self._line.send({"number": number, "lost": True})
        else:
            outcome, claim, pixels = answer
            self._line.send({"number": number, "outcome": outcome.to_json()}, claim, pack(pixels))

    def _receive(self, seconds: float) -> dict[str, Any]:
        return self._line.receive(seconds, (wire.MAX_CONTROL_BYTES, 0, 0), seconds)[0]

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Says to the trainer, as long as this lasts, that it does."""
        self._is_working = True
        try:
            yield
        finally:
            with self._beating:  # no beat comes behind the answer
                self._is_working = False

    def _beat(self) -> None:
        while not self._over.wait(channel.BEAT_SECONDS):
            with self._beating:
                if not self._is_working:
                    continue
                try:
                    self._line.send(BEAT)
                    continue
                except OSError:
                    pass
            self.close()  # its trainer is gone: the script ends


def config_of(settings: Settings, here: EnvConfig, is_wrapped: bool) -> EnvConfig:
    """What an executor of this host is started with for a trainer.

    Args:
      settings: of the trainer, not checked yet.
      here: of this host.
      is_wrapped: whether the trainer has its executors in bubblewrap.

    Raises:
      ValueError: a setting cannot be; the sandbox is another one than this host's.
    """
    numbers = {name: getattr(settings, name) for name in _MOST}
    seconds = settings.wall_seconds, settings.cpu_seconds
    style, preload, abi = settings.rc_params, settings.preload, settings.landlock_abi
    right = (
        all(_is_whole(number, _MOST[name]) for name, number in numbers.items())
        and all(_is_duration(each) for each in seconds)
        and isinstance(style, dict)
        and all(isinstance(name, str) for name in preload)
        and isinstance(settings.partial, bool)
        and (abi is None or _is_whole(abi, _MOST_ABI))
    )
    if not right:
        raise ValueError("settings that cannot be")
    if settings.sandbox != here.sandbox:
        raise ValueError(f"sandbox={str(settings.sandbox)[:20]!r}, and {here.sandbox!r} is here")
    return dataclasses.replace(
        here,
        **numbers,
        wall_seconds=settings.wall_seconds,
        cpu_seconds=settings.cpu_seconds,
        rc_params=style,
        preload=preload,
        partial=settings.partial,
        landlock_abi=abi,
        bubblewrap=is_wrapped,
    )


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_duration(value: Any) -> bool:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    return right and math.isfinite(value) and 0 < value <= _MOST_SECONDS

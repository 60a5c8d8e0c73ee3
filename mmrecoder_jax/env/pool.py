"""A pool of executors: scripts in, `Execution`s out, as they finish.

Each of `EnvConfig.workers` long-lived threads owns one zygote (`executor/zygote.py`), started by
exec with a clean environment and one Unix socket. The trainer is never forked, and a limit is
enforced by killing a process, never by asking a thread to stop. A zygote that dies or does not
answer is replaced and its script is run once more. When the trainer goes, the sockets close and the
zygotes end.
"""

import collections
import contextlib
import hashlib
import os
import queue
import shutil
import signal
import site
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any, Literal, Self, overload

from mmrecoder_jax.env import interpreter, wire
from mmrecoder_jax.env.execution import EnvConfig, Execution, Replay, decode
from mmrecoder_jax.env.records import OfficialRecord, Plot2CodeRecord, Record
from mmrecoder_jax.env.sandbox import bubblewrap, confinement
from mmrecoder_jax.env.sandbox.confinement import SandboxMode
from mmrecoder_jax.env.wire import Flag, Outcome, RecordKind, Request, Settings, Status

OfficialKind = Literal[
    RecordKind.OFFICIAL_RUN,
    RecordKind.OFFICIAL_TEXT,
    RecordKind.OFFICIAL_LAYOUT,
    RecordKind.OFFICIAL_TYPE,
    RecordKind.OFFICIAL_COLOR,
    RecordKind.OFFICIAL_CALLS,
]
Plot2CodeKind = Literal[RecordKind.PLOT2CODE, RecordKind.PLOT2CODE_TARGET]
GRACE_SECONDS = 15.0  # a zygote answers at the latest this long after the script's own limit
_ZYGOTE = Path(__file__).parent / "executor" / "zygote.py"
_START_SECONDS = 180.0  # imports on a loaded machine
# of the cache: the code, what was wanted of it, and whether its drawing is replayed for sure
_Key = tuple[str, RecordKind, bool]
_COUNTS = (
    *("requests", "cache_hits", "executions", "retries", "respawns"),
    *("replays", "replays_undecided", "seconds", "cpu_seconds"),
)
# each flag, and among what its rate is counted
_WHOLES = {
    Flag.TAMPER: "executions",
    Flag.HIDDEN_TEXT: "replays",
    Flag.FORGED: "replays",
}
_UNSTABLE = (Status.TIMEOUT, Status.KILLED)  # may come out otherwise next time: not cached


def total(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The counts (`ExecutorPool.stats`) of several pools together."""
    if len(stats) == 1:
        return dict(stats[0])
    names = dict.fromkeys(name for own in stats for name in own if not name.startswith("rate_"))
    return _with_rates({name: sum(own.get(name, 0) for own in stats) for name in names})


def _with_rates(counts: Mapping[str, float]) -> dict[str, float]:
    return dict(counts) | {
        f"rate_{flag}": counts.get(f"flag_{flag}", 0) / max(counts[whole], 1)
        for flag, whole in _WHOLES.items()
    }


class ExecutorError(RuntimeError):
    """An executor could not be started."""


class ExecutorPool:
    """Runs scripts in `config.workers` executors. A context manager.

    Identical code gives an identical result, so results are kept (least recently used first out)
    and identical code that is already running is not run twice. Time-outs and killed scripts are
    not kept.

    Raises:
      SandboxUnavailable: this host cannot contain scripts as the configuration asks.
      InterpreterError: executors cannot run on `config.python`.
      ExecutorError: an executor cannot start.
    """

    def __init__(self, config: EnvConfig):
        confinement.check(config.sandbox)
        python = interpreter.find(config.python)
        self.config = config
        self._directory = Path(tempfile.mkdtemp(prefix="mmrecoder-env-"))
        self._requests: queue.SimpleQueue[tuple[_Key, Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[_Key, Future[Any]] = collections.OrderedDict()
        self._cache_bytes = 0
        self._stats: dict[str, float] = collections.defaultdict(float, dict.fromkeys(_COUNTS, 0))
        self._closed = False
        (self._directory / "matplotlib").mkdir()
        self._executors = [
            _Executor(config, python, self._directory, index) for index in range(config.workers)
        ]
        # Each executor is started, used and replaced by one thread, which lives as long as the
        # pool.
        self._threads = []
        started: list[Future[None]] = [Future() for _ in self._executors]
        for index, (executor, future) in enumerate(zip(self._executors, started, strict=True)):
            thread = threading.Thread(
                target=self._serve, args=(executor, future), name=f"executor-{index}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        try:
            for future in started:
                future.result()
        except BaseException:
            self.close()
            raise

    @overload
    def submit(
        self, code: str | None, kind: Literal[RecordKind.TRAINING] = ...
    ) -> Future[Execution[Record]]: ...
    @overload
    def submit(self, code: str | None, kind: OfficialKind) -> Future[Execution[OfficialRecord]]: ...
    @overload
    def submit(
        self, code: str | None, kind: Plot2CodeKind
    ) -> Future[Execution[Plot2CodeRecord]]: ...
    def submit(self, code: str | None, kind: RecordKind = RecordKind.TRAINING) -> Future[Any]:
        """Queues one script; `None` (no code in the response) is answered at once.

        `kind` says which record is wanted; only TRAINING also gives an image.
        """
        future: Future[Any] = Future()
        # shared by identical requests, so it cannot be cancelled
        future.set_running_or_notify_cancel()
        if code is None:
            future.set_result(
                Execution(Status.NO_CODE, error="The response holds no ```python block.")
            )
            return future
        return self._submit((code, kind, False), future)

    def watch(self, code: str) -> Future[Execution[Record]]:
        """Queues one script whose drawing is replayed for sure, whatever `replay_share` says."""
        future: Future[Execution[Record]] = Future()
        future.set_running_or_notify_cancel()
        return self._submit((code, RecordKind.TRAINING, True), future)

    def _submit(self, key: _Key, future: Future[Any]) -> Future[Any]:
        with self._lock:
            if self._closed:
                raise ExecutorError("the pool is closed")
            self._stats["requests"] += 1
            if key in self._cache:
                self._stats["cache_hits"] += 1
                self._cache.move_to_end(key)
                return self._cache[key]
            # Before it has run: identical code that comes meanwhile waits for the same result.
            self._cache[key] = future
            self._requests.put((key, future))
        return future

    def run(self, codes: Iterable[str | None]) -> list[Execution[Record]]:
        """Runs all scripts and returns their results in order."""
        return [future.result() for future in [self.submit(code) for code in codes]]

    def stream(self, codes: Iterable[str | None]) -> Iterator[tuple[int, Execution[Record]]]:
        """Yields (index, result) as scripts finish."""
        indices: dict[Future[Execution[Record]], list[int]] = {}
        for index, code in enumerate(codes):
            indices.setdefault(self.submit(code), []).append(index)
        for future in as_completed(indices):
            for index in indices[future]:
                yield index, future.result()

    def stats(self) -> dict[str, float]:
        """Counts since the start.

        requests, cache_hits, executions, retries, respawns, replays, replays_undecided,
        status_<status>, flag_<flag>; summed seconds and cpu_seconds of the scripts; rate_tamper
        among the executions, rate_hidden_text and rate_forged among the replays.
        """
        with self._lock:
            return _with_rates(self._stats)

    def pids(self) -> list[int]:
        """The process ids of the executors, each the leader of its process group.

        Where bubblewrap is used, it is part of that group.
        """
        return [executor.pid for executor in self._executors]

    def close(self) -> None:
        """Ends the executors; queued scripts come back as KILLED."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for executor in self._executors:
            self._requests.put(None)
            executor.stop()
        for thread in self._threads:
            thread.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _serve(self, executor: "_Executor", started: Future[None]) -> None:
        try:
            executor.start()
            executor.wait_ready()
        except BaseException as problem:
            started.set_exception(problem)
            return
        started.set_result(None)
        while (item := self._requests.get()) is not None:
            key, future = item
            execution = self._execute(executor, *key)
            self._remember(key, execution)
            future.set_result(execution)

    def _execute(
        self, executor: "_Executor", code: str, kind: RecordKind, watched: bool
    ) -> Execution[Any]:
        for attempt in range(2):
            if self._closed:
                return Execution(Status.KILLED, error="The executors were shut down.")
            try:
                if attempt:
                    self._count("retries")
                    executor.stop()
                    executor.start()
                    executor.wait_ready()
                    self._count("respawns")
                return executor.execute(code, kind, watched)
            except (OSError, EOFError, ValueError, ExecutorError):
                continue
        return Execution(Status.KILLED, error="The script brought its executor down twice.")

    def _remember(self, key: _Key, execution: Execution[Any]) -> None:
        """Counts a result and makes room for it in the cache, which its future is in already."""
        with self._lock:
            self._tally(execution)
            if execution.status in _UNSTABLE:
                del self._cache[key]
                return
            self._cache_bytes += _image_bytes(execution)
            max_bytes = self.config.cache_mb << 20
            while len(self._cache) > self.config.cache_size or self._cache_bytes > max_bytes:
                if not self._drop_oldest():
                    break

    def _tally(self, execution: Execution[Any]) -> None:
        stats = self._stats
        stats["executions"] += 1
        stats[f"status_{execution.status}"] += 1
        stats["seconds"] += execution.seconds
        stats["cpu_seconds"] += execution.cpu_seconds
        stats["replays"] += execution.replay == Replay.DONE
        stats["replays_undecided"] += execution.replay == Replay.UNDECIDED
        for flag in execution.flags:
            stats[f"flag_{flag}"] += 1

    def _drop_oldest(self) -> bool:
        """Drops the result that was not asked for the longest; False when all are running."""
        for key, future in self._cache.items():
            if future.done():
                self._cache_bytes -= _image_bytes(future.result())
                del self._cache[key]
                return True
        return False

    def _count(self, name: str) -> None:
        with self._lock:
            self._stats[name] += 1


class _Executor:
    """One zygote process and its socket.

    Used by one thread at a time; `stop` may be called from another.
    """

    def __init__(
        self, config: EnvConfig, python: interpreter.Interpreter, directory: Path, index: int
    ):
        self._config = config
        self._python = python
        self._directory = directory
        self._index = index
        self._generation = 0
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    @property
    def pid(self) -> int:
        return self._process_and_socket()[0].pid

    def start(self) -> None:
        """Starts the process and sends its settings."""
        config = self._config
        self._generation += 1
        private = self._private()
        private.mkdir(mode=0o700)
        ours, theirs = socket.socketpair()
        with theirs, open(private / "log", "wb") as log:
            program = [str(_ZYGOTE), str(theirs.fileno())]
            # -P: nothing of the working directory is imported; -B: no .pyc files are written.
            command = [self._python.path, "-P", "-B", *interpreter.user_site_flags(), *program]
            if config.bubblewrap and config.sandbox == SandboxMode.AUTO and bubblewrap.program():
                command = bubblewrap.wrap(command, self._python.reads, self._directory, private)
            process = subprocess.Popen(
                command,
                env=_environment(self._directory),
                cwd=private,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                # a group of its own: it can be killed with bubblewrap, and no Ctrl-C reaches it
                process_group=0,
            )
        self._running = process, ours
        ours.settimeout(_START_SECONDS)
        settings = Settings(
            directory=str(private),
            rc_params=dict(config.rc_params),
            preload=tuple(config.preload),
            dpi=config.dpi,
            max_pixels=config.max_pixels,
            wall_seconds=config.wall_seconds,
            cpu_seconds=config.cpu_seconds,
            memory_mb=config.memory_mb,
            partial=config.partial,
            sandbox=config.sandbox,
            landlock_abi=config.landlock_abi,
        )
        wire.send(ours, settings.to_json())

    def wait_ready(self) -> None:
        """Waits for the imports.

        Raises:
          ExecutorError: they failed; it has the end of the process's log.
        """
        _, connection = self._process_and_socket()
        try:
            wire.receive(connection)
        except (OSError, EOFError, ValueError) as problem:
            self.stop()
            log = (self._private() / "log").read_text(errors="replace")
            raise ExecutorError(
                f"an executor did not start: {log.strip()[-2000:] or problem}"
            ) from problem
        connection.settimeout(self._config.wall_seconds + GRACE_SECONDS)

    def execute(self, code: str, kind: RecordKind, watched: bool) -> Execution[Any]:
        """Runs one script; `watched` replays it whatever its lot is.

        Raises:
          OSError, EOFError, ValueError: the zygote is gone, late or talks nonsense.
        """
        _, connection = self._process_and_socket()
        lot = _draw_lot(code, self._config.replay_seed)
        watched |= kind == RecordKind.TRAINING and lot < self._config.replay_share
        wire.send(connection, wire.RUN)
        wire.send(connection, Request(code, kind).to_json())
        wire.send(connection, wire.WATCHED if watched else wire.UNWATCHED)
        control, claim, pixels = wire.receive(
            connection, wire.MAX_CLAIM_BYTES, 4 * self._config.max_pixels
        )
        return decode(Outcome.from_json(control), claim, pixels, self._config, kind)

    def stop(self) -> None:
        """Closes the socket, which ends the zygote and its child; kills it if it lingers."""
        if self._running is None:
            return
        process, connection = self._running
        with contextlib.suppress(OSError):
            wire.send(connection, wire.FAREWELL)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _private(self) -> Path:
        """The folder of this generation: the log, and the scripts' working directory."""
        return self._directory / f"{self._index}-{self._generation}"

    def _process_and_socket(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        if self._running is None:
            raise ExecutorError("this executor was not started")
        return self._running


def _image_bytes(execution: Execution[Any]) -> int:
    return 0 if execution.image is None else execution.image.nbytes


def _draw_lot(code: str, seed: int) -> float:
    """A number in [0, 1) that depends on the code and on a seed that no script sees."""
    key = seed.to_bytes(8, signed=True)
    digest = hashlib.blake2b(code.encode(errors="replace"), digest_size=4, key=key).digest()
    return int.from_bytes(digest) / 2**32


def _environment(directory: Path) -> dict[str, str]:
    """The whole environment of an executor: nothing of the trainer's own goes in."""
    # An executor has one core, and a process with threads must not fork.
    libraries = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB")
    threads = {f"{name}_NUM_THREADS": "1" for name in libraries}
    return {
        "PATH": os.defpath,
        "HOME": str(directory),
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONUSERBASE": site.getuserbase(),  # as HOME is another
        "MPLBACKEND": "agg",
        "MPLCONFIGDIR": str(directory / "matplotlib"),
        **threads,
    }

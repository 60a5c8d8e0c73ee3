"""A pool of executors: scripts in, `Execution`s out, as they finish.

Each of `EnvConfig.workers` long-lived threads owns one zygote (`executor/zygote.py`), started by
exec with a clean environment and one Unix socket. The trainer is never forked, and a limit is
enforced by killing a process, never by asking a thread to stop. When the trainer goes, the sockets
close and the zygotes end.

A script cannot reach its zygote, so a zygote that dies or does not answer is no fault of the script
that it ran: another one is started, and the script is run again. The same holds for a script's own
process that somebody else killed. Both have a bound, as something of the script's own may be behind
it (it fills the memory of the host), and so has starting zygotes: where none starts for minutes,
that is an error of the environment and no result of a script.
"""

import collections
import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import resource
import select
import signal
import site
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any, Literal, Self, overload

from mmrecoder_jax.env import interpreter, wire
from mmrecoder_jax.env.execution import EnvConfig, Execution, Replay, decode
from mmrecoder_jax.env.records import (
    Chart2CodeRecord,
    OfficialRecord,
    Plot2CodeRecord,
    Record,
)
from mmrecoder_jax.env.sandbox import bubblewrap, confinement, quota, scratch
from mmrecoder_jax.env.sandbox.confinement import SandboxMode
from mmrecoder_jax.env.wire import End, Flag, Outcome, RecordKind, Request, Settings, Status

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
START_SECONDS = 180.0  # imports on a loaded machine; also, for how long starting is tried again
_ZYGOTE = Path(__file__).parent / "executor" / "zygote.py"
# Executors that die while they run one script, and times that nobody we know kills it.
_MAX_LOST = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds before starting is tried again
_LONGEST_LOG = 1 << 16
_LAST_WORDS_SECONDS = 10.0  # for a process that has failed to say why
_LEAST_FILES = 64  # open ones, of a zygote and its child
_MORE_PROCESSES = "this user has too many processes: end some, or raise `ulimit -u`"
_REMEDIES = {
    errno.EMFILE: "raise `ulimit -n`, or use fewer workers",
    errno.ENFILE: "this host has too many open files: close some",
    errno.EAGAIN: _MORE_PROCESSES,
    errno.ENOMEM: "this host has too little memory: use fewer workers",
    errno.ENOSPC: "free space, or set TMPDIR to a folder on another disk",
    errno.EDQUOT: "free space, or set TMPDIR to a folder on another disk",
}
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
    """An executor could not be started; one line says why. What it wrote is in the notes."""


class _Lost(ExecutorError):
    """An executor died while it started, and said nothing: it was killed."""


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
        _check_limits(config)
        if config.bubblewrap:
            bubblewrap.program()  # tried before there is a folder that our death could leave
        self.config = config
        self._directory = _make_directory()
        self._requests: queue.SimpleQueue[tuple[_Key, Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[_Key, Future[Any]] = collections.OrderedDict()
        self._cache_bytes = 0
        self._stats: dict[str, float] = collections.defaultdict(float, dict.fromkeys(_COUNTS, 0))
        self._closing = threading.Event()
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
            try:
                thread.start()
            except RuntimeError as problem:
                self.close()
                raise ExecutorError(f"a thread cannot be started: {_MORE_PROCESSES}") from problem
            self._threads.append(thread)
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
    @overload
    def submit(
        self, code: str | None, kind: Literal[RecordKind.CHART2CODE]
    ) -> Future[Execution[Chart2CodeRecord]]: ...
    def submit(self, code: str | None, kind: RecordKind = RecordKind.TRAINING) -> Future[Any]:
        """Queues one script; `None` (no code in the response) is answered at once.

        `kind` says which record is wanted; only TRAINING also gives an image. Code that is too long
        is not run.
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
        if len(key[0]) > wire.MAX_CODE_CHARACTERS:
            error = f"The script has {len(key[0])} characters: at most {wire.MAX_CODE_CHARACTERS} "
            future.set_result(Execution(Status.ERROR, error=error + "are run."))
            return future
        with self._lock:
            if self._closing.is_set():
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
            if self._closing.is_set():
                return
            self._closing.set()
        for executor in self._executors:
            self._requests.put(None)
            executor.close()
        for thread in self._threads:
            thread.join()
        scratch.remove(str(self._directory))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _serve(self, executor: "_Executor", started: Future[None]) -> None:
        try:
            self._start(executor, is_first=True)
        except BaseException as problem:
            executor.stop()
            started.set_exception(problem)
            return
        started.set_result(None)
        self._run_requests(executor)
        executor.stop()

    def _run_requests(self, executor: "_Executor") -> None:
        while (item := self._requests.get()) is not None:
            key, future = item
            try:
                execution = self._execute(executor, *key)
            except BaseException as problem:  # whoever waits must learn of it
                with self._lock:
                    del self._cache[key]
                future.set_exception(problem)
                continue
            self._remember(key, execution)
            future.set_result(execution)

    def _start(self, executor: "_Executor", is_first: bool = False) -> None:
        """Starts an executor; tries again where that may help.

        Raises:
          ExecutorError: it does not start.
        """
        deadline = time.monotonic() + START_SECONDS
        pause = _FIRST_PAUSE
        while not self._closing.is_set():
            try:
                executor.start()
                executor.wait_ready()
                return
            except ExecutorError as problem:
                # The first one says what is wrong with the configuration; later, it was right once.
                is_final = is_first and not isinstance(problem, _Lost)
                if is_final or time.monotonic() > deadline:
                    raise
            self._closing.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise ExecutorError("the pool is closed")

    def _execute(
        self, executor: "_Executor", code: str, kind: RecordKind, watched: bool
    ) -> Execution[Any]:
        lost = killed = 0
        while True:
            try:
                if self._closing.is_set():
                    raise ExecutorError("the pool is closed")
                if not executor.is_running:
                    self._start(executor)
                    self._count("respawns")
                execution, by_others = executor.execute(code, kind, watched)
                killed += by_others
                if not by_others or killed == _MAX_LOST:
                    return execution
            except ExecutorError:
                if self._closing.is_set():
                    return Execution(Status.KILLED, error="The executors were shut down.")
                raise
            except (OSError, EOFError, ValueError):
                executor.stop()
                lost += 1
                if lost == _MAX_LOST:
                    error = f"The script brought its executor down {lost} times."
                    return Execution(Status.KILLED, error=error)
            self._count("retries")

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

    Used by one thread; only `close` and `pid` may be called from another.
    """

    def __init__(
        self, config: EnvConfig, python: interpreter.Interpreter, directory: Path, index: int
    ):
        self._config = config
        self._python = python
        self._directory = directory
        self._index = index
        self._generation = 0
        self._lock = threading.Lock()  # of `_running` and `_is_closed`
        self._is_closed = False
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._log = -1  # a file in memory: what the process writes until it is ready

    @property
    def pid(self) -> int:
        return self._process_and_socket()[0].pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and is not known to have ended."""
        if self._running is None:
            return False
        poll = select.poll()
        poll.register(self._running[1], select.POLLHUP)
        return not poll.poll(0)

    def start(self) -> None:
        """Starts the process and sends its settings.

        Raises:
          ExecutorError: that is not possible; one line says why.
        """
        self.stop()
        self._generation += 1
        try:
            private = self._private()
            private.mkdir()
            private.chmod(0o700)  # whatever the umask is
            self._log = os.memfd_create("log")
            ours, theirs = _socket_pair()
            with theirs, self._lock:
                if self._is_closed:
                    ours.close()
                    raise ExecutorError("the pool is closed")
                self._running = self._open_process(private, theirs.fileno()), ours
        except OSError as problem:
            remedy = _REMEDIES.get(problem.errno or 0, "see what this user may do here")
            raise ExecutorError(f"an executor cannot be started ({problem}): {remedy}") from problem
        ours.settimeout(START_SECONDS)
        with contextlib.suppress(OSError):  # it may be gone already: `wait_ready` tells
            wire.send(ours, self._settings(private).to_json())

    def _open_process(self, private: Path, connection: int) -> subprocess.Popen[bytes]:
        config = self._config
        program = [str(_ZYGOTE), str(connection)]
        # -P: nothing of the working directory is imported; -B: no .pyc files are written.
        command = [self._python.path, "-P", "-B", *interpreter.user_site_flags(), *program]
        if config.bubblewrap and config.sandbox == SandboxMode.AUTO and bubblewrap.program():
            command = bubblewrap.wrap(command, self._python.reads, self._directory, private)
        return subprocess.Popen(
            command,
            env=_environment(self._directory),
            cwd=private,
            pass_fds=[connection],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            # a group of its own: it can be killed with bubblewrap, and no Ctrl-C reaches it
            process_group=0,
        )

    def _settings(self, private: Path) -> Settings:
        config = self._config
        return Settings(
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

    def wait_ready(self) -> None:
        """Waits for the imports.

        Raises:
          ExecutorError: they failed. A `_Lost`: the process was killed.
        """
        process, connection = self._process_and_socket()
        try:
            said = wire.receive(connection)[0]
        except (OSError, EOFError, ValueError) as problem:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS_SECONDS)
            log = self._stop_and_read()
            if process.returncode < 0 or not log:
                raise _Lost(f"an executor was ended while it started ({problem})") from problem
            said = {wire.FAILED: log.splitlines()[-1]}
        else:
            log = "" if said == wire.READY else self._stop_and_read()
        if said != wire.READY:
            error = ExecutorError(f"an executor did not start: {said[wire.FAILED]}")
            error.add_note(log)
            raise error
        # A script, and a replay of what it drew.
        connection.settimeout(2 * self._config.wall_seconds + GRACE_SECONDS)

    def _stop_and_read(self) -> str:
        """Ends the process; what it wrote."""
        process, connection = self._process_and_socket()
        self._end(process, connection)
        log = os.pread(self._log, _LONGEST_LOG, 0).decode(errors="replace").strip()
        self.stop()
        return log

    def execute(self, code: str, kind: RecordKind, watched: bool) -> tuple[Execution[Any], bool]:
        """Runs one script; `watched` replays it whatever its lot is.

        Returns:
          Its result, and whether its process was killed by somebody else: a script cannot do that,
          and no limit of ours did.

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
        outcome = Outcome.from_json(control)
        by_others = (
            outcome.end == End.SIGNAL
            and outcome.code == signal.SIGKILL
            and outcome.cpu_seconds < self._config.cpu_seconds
        )
        return decode(outcome, claim, pixels, self._config, kind), by_others

    def stop(self) -> None:
        """Ends the zygote and its child, and removes their files."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            self._end(*running)
            running[1].close()
            scratch.remove(str(self._private()))
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def close(self) -> None:
        """Makes whatever waits for the zygote end, now and from now on; `stop` has to follow."""
        with self._lock:
            self._is_closed = True
            if self._running is not None:
                _, connection = self._running
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _end(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        """Closes the connection, which ends the zygote and its child; kills it if it lingers."""
        try:
            connection.settimeout(1.0)
            wire.send(connection, wire.FAREWELL)
        except OSError:  # without a farewell it would remove our files: it must not live on
            _kill(process)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()

    def _private(self) -> Path:
        """The folder of this generation, in which its scripts' working directory is."""
        return self._directory / f"{self._index}-{self._generation}"

    def _process_and_socket(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        running = self._running
        if running is None:
            raise ExecutorError("this executor was not started")
        return running


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, neither of which has the number of standard input or output.

    Those may be free where a launcher has closed them; `Popen` puts other files there, and
    libraries print to them.
    """
    low = socket.socketpair()
    with low[0], low[1]:
        ours, theirs = (
            socket.socket(fileno=fcntl.fcntl(each.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))
            for each in low
        )
    return ours, theirs


def _make_directory() -> Path:
    """The folder that the executors share. Nobody else may enter it, whatever the umask is."""
    try:
        directory = Path(tempfile.mkdtemp(prefix=scratch.POOL_PREFIX))
        directory.chmod(0o700)
        fonts = directory / "matplotlib"
        fonts.mkdir()
        fonts.chmod(0o700)
    except OSError as problem:
        raise ExecutorError(
            f"no folder for executors can be made ({problem}): set TMPDIR to a folder that this "
            "user may write to, on a disk with room"
        ) from problem
    return directory


def _check_limits(config: EnvConfig) -> None:
    """Raises ExecutorError where this process was given less than scripts are promised."""
    promised = (
        (resource.RLIMIT_FSIZE, quota.DISK_MB << 20, "bytes of a file", "ulimit -f"),
        (resource.RLIMIT_AS, config.memory_mb << 20, "bytes of memory", "ulimit -v"),
        (resource.RLIMIT_DATA, config.memory_mb << 20, "bytes of memory", "ulimit -d"),
        (resource.RLIMIT_CPU, round(config.cpu_seconds), "seconds of CPU time", "ulimit -t"),
        (resource.RLIMIT_NOFILE, _LEAST_FILES, "open files", "ulimit -n"),
    )
    for name, least, what, command in promised:
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY and hard < least:
            raise ExecutorError(
                f"the limit of {what} is {hard}, and executors need {least}: raise `{command}`"
            )


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

"""An executor of this machine: one zygote process (`executor/zygote.py`) and its socket.

It is started by exec with a clean environment and one Unix socket. The process that starts it is
never forked, and a limit is enforced by killing a process, never by asking a thread to stop. When
the process that started it goes, the socket closes and the zygote ends.
"""

import contextlib
import errno
import fcntl
import os
import resource
import select
import signal
import site
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from mmrecoder_jax.env import interpreter, wire
from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.sandbox import bubblewrap, quota, scratch
from mmrecoder_jax.env.sandbox.confinement import SandboxMode
from mmrecoder_jax.env.wire import Outcome, Request, Settings

GRACE_SECONDS = 15.0  # a zygote answers at the latest this long after the script's own limit
START_SECONDS = 180.0  # imports on a loaded machine; also, for how long starting is tried again
MORE_PROCESSES = "this user has too many processes: end some, or raise `ulimit -u`"
_ZYGOTE = Path(__file__).parent / "executor" / "zygote.py"
_LONGEST_LOG = 1 << 16
_LAST_WORDS_SECONDS = 10.0  # for a process that has failed to say why
_LEAST_FILES = 64  # open ones, of a zygote and its child
_REMEDIES = {
    errno.EMFILE: "raise `ulimit -n`, or use fewer workers",
    errno.ENFILE: "this host has too many open files: close some",
    errno.EAGAIN: MORE_PROCESSES,
    errno.ENOMEM: "this host has too little memory: use fewer workers",
    errno.ENOSPC: "free space, or set TMPDIR to a folder on another disk",
    errno.EDQUOT: "free space, or set TMPDIR to a folder on another disk",
}


class ExecutorError(RuntimeError):
    """An executor could not be started; one line says why. What it wrote is in the notes."""


class ExecutorLost(ExecutorError):
    """An executor died while it started, and said nothing: it was killed."""


class Answer(NamedTuple):
    """What comes back of one script: the zygote's facts, and what the script's process claims."""

    outcome: Outcome
    claim: bytes
    pixels: bytes


class Executor:
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
            wire.send(ours, settings(self._config, str(private)).to_json())

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

    def wait_ready(self) -> None:
        """Waits for the imports.

        Raises:
          ExecutorError: they failed. An `ExecutorLost`: the process was killed.
        """
        process, connection = self._process_and_socket()
        try:
            said = wire.receive(connection)[0]
        except (OSError, EOFError, ValueError) as problem:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS_SECONDS)
            log = self._stop_and_read()
            if process.returncode < 0 or not log:
                raise ExecutorLost(
                    f"an executor was ended while it started ({problem})"
                ) from problem
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

    def execute(self, request: Request, watched: bool) -> Answer:
        """Runs one script; `watched` replays what it drew.

        Raises:
          OSError, EOFError, ValueError: the zygote is gone, late or talks nonsense.
        """
        _, connection = self._process_and_socket()
        wire.send(connection, wire.RUN)
        wire.send(connection, request.to_json())
        wire.send(connection, wire.WATCHED if watched else wire.UNWATCHED)
        control, claim, pixels = wire.receive(
            connection, wire.MAX_CLAIM_BYTES, 4 * self._config.max_pixels
        )
        return Answer(Outcome.from_json(control), claim, pixels)

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


def settings(config: EnvConfig, directory: str) -> Settings:
    """What a zygote is told of `config`.

    Args:
      directory: its own, which exists.
    """
    return Settings(
        directory=directory,
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


def make_directory() -> Path:
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


def check_limits(config: EnvConfig) -> None:
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

"""The zygote: imports the plotting libraries once, then forks a fresh child for every script.

`pool.py` starts it as a program:

    python -P -B zygote.py FD

FD is a connected Unix socket; the environment holds only what `pool.py` names.

The parent part never runs model code and never reads what a child says: it forwards the child's
bytes with the facts that it knows itself (how the child ended, times). It holds no secret, no
target, and nothing of earlier scripts: a child reads its code itself, what it sends lies in memory
that is given back, and the names of files that it leaves are read by another fork. It ends when its
socket does. It imports nothing of the trainer's side: what it has loaded, every untrusted child has
(tests/env/executor/test_zygote.py lists it).
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping

# Started by its path, with -P: the package is not on the path, and stays off it for scripts.
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3)))
from mmrecoder_jax.env.executor import beginning

if __name__ == "__main__":
    beginning.begin(int(sys.argv[1]))
from mmrecoder_jax.env import wire
from mmrecoder_jax.env.child import display_list, script
from mmrecoder_jax.env.child.main_module import SCRIPT_NAME
from mmrecoder_jax.env.executor.warm_start import warm_start
from mmrecoder_jax.env.sandbox import confinement, quota, scratch
from mmrecoder_jax.env.wire import End, Finding, Outcome, RecordKind, Request, Settings

del sys.path[0]

_FAILED = 99  # exit status of a child that could not do its work
_DECIDED = range((Finding.HIDDEN_TEXT | Finding.FORGED) + 1)
_CLEAN_SECONDS = 10.0  # to empty the working directory
_LONGEST_WAIT = 1.0  # seconds
_STALL_SECONDS = 1.0  # a process that wakes so much too late was stopped
_PATIENCE = 25  # tries to fork, 0.2 s apart, where there are too many processes


def main(descriptor: int) -> None:
    """Serves executions over the socket of that number, until it is closed."""
    trainer = socket.socket(fileno=descriptor)
    farewell = False
    try:
        farewell = _serve(trainer)
    finally:
        if not farewell:
            beginning.clean_up(descriptor)


def _serve(trainer: socket.socket) -> bool:
    """Starts, and runs what is asked for; whether the trainer said that it goes."""
    settings = Settings.from_json(wire.receive(trainer)[0])
    try:
        zygote = Zygote(settings, trainer)
        zygote.try_it()
    except Exception as problem:
        wire.send(trainer, {wire.FAILED: f"{type(problem).__name__}: {problem}"})
        raise
    beginning.stop_watching()
    wire.send(trainer, wire.READY)
    with contextlib.suppress(EOFError, OSError):
        while (word := wire.receive(trainer)[0]) == wire.RUN and zygote.fit:
            zygote.execute(trainer)
        return word == wire.FAREWELL
    # Farewell may have been said while a script ran.
    with contextlib.suppress(EOFError, OSError):
        while wire.receive(trainer)[0] != wire.FAREWELL:
            pass
        return True
    return False


class Zygote:
    """A warm interpreter and the loop around one child.

    Args:
      settings: from the trainer.
      trainer: the socket; a child must not keep it, and its end is noticed while a child runs.

    Attributes:
      fit: False once something went wrong that a fresh zygote would not have; it must not go on.
    """

    def __init__(self, settings: Settings, trainer: socket.socket):
        self.fit = True
        self._settings = settings
        self._trainer = trainer
        scratch.move_into_memory(settings.directory)
        self._directory = os.path.join(settings.directory, "work")
        self._trash = os.path.join(settings.directory, "trash")
        os.mkdir(self._directory, 0o700)
        self._confinement = confinement.prepare(
            settings.sandbox, settings.landlock_abi, self._directory, _limits(settings)
        )
        self._metered = self._confinement.asking is not None
        self._intake = wire.Intake(settings.max_pixels, display_list.MAX_BYTES)
        self._unheard = wire.Intake(0, 0)
        self._warm = warm_start(settings)

    def try_it(self) -> None:
        """Runs an empty script; raises RuntimeError where that does not work here."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(self._settings.wall_seconds)
            wire.send(theirs, Request("", RecordKind.TRAINING).to_json())
            wire.send(theirs, wire.UNWATCHED)
            self.execute(ours)
            outcome, claim, _ = wire.receive(theirs, wire.MAX_CLAIM_BYTES)
        if not claim:
            raise RuntimeError(f"a script cannot be run here: {outcome}")

    def execute(self, source: socket.socket) -> None:
        """Runs one script in a child and, where asked, its display list in another.

        The outcome goes back with the child's own bytes, claim and pixels, length-checked.

        Args:
          source: where the child finds its request, and what follows it the zygote: whether the
            display list is wanted. That is read when the claim is there: what a child is forked
            from does not know it.
        """

        def run(connection: socket.socket) -> None:
            request = Request.from_json(wire.receive(source)[0])
            out = self._confine(connection)
            warm = self._warm
            if request.kind == RecordKind.TRAINING:
                warm.reserve.open()
            script.work(out, request, warm.capture, warm.untouched, self._settings.partial)

        watched = functools.cache(lambda: wire.receive(source)[0] == wire.WATCHED)
        try:
            outcome = self._fork(run, self._intake, watched)
            claim, pixels, display = self._intake.parts()
            if watched() and outcome.end == End.EXIT and pixels:
                whole = outcome.code == 0
                finding = self._replay(claim, pixels, display) if whole else Finding.UNDECIDED
                outcome = dataclasses.replace(outcome, replay=finding)
            wire.send(source, outcome.to_json(), claim, pixels)
        finally:
            self._intake.forget()

    def _replay(self, claim: memoryview, pixels: memoryview, display: memoryview) -> Finding:
        """What a replay finds, by the exit status of a child that runs no model code.

        Nothing that this child says is read either: it parses what the script's process sent.
        """
        if not display:
            return Finding.UNDECIDED

        def check(connection: socket.socket) -> None:
            self._confine(connection)
            record = json.loads(bytes(claim))["record"]
            os._exit(display_list.check(bytes(display), bytes(pixels), record))

        outcome = self._fork(check, self._unheard, lambda: False)
        self._unheard.forget()
        decided = outcome.end == End.EXIT and outcome.code in _DECIDED
        return Finding(outcome.code) if decided else Finding.UNDECIDED

    def _confine(self, connection: socket.socket) -> int:
        """Confines this child, whose only descriptor is the one that comes back."""
        out = confinement.enter(self._confinement, connection.detach())
        random.seed(0)  # Python's own generator is seeded anew by each fork
        return out

    def _fork(
        self,
        work: Callable[[socket.socket], None],
        intake: wire.Intake,
        is_watched: Callable[[], bool],
    ) -> Outcome:
        """Runs `work` in a child, which confines itself to the connection that it is given.

        Args:
          intake: takes what it sends.
          is_watched: whether the child's display list is wanted; asked when its claim is there.
        """
        ours, theirs = socket.socketpair()
        start = time.monotonic()
        pid = _fork_patiently()
        if pid == 0:
            try:
                ours.close()
                work(theirs)
            except BaseException:
                os._exit(_FAILED)
            os._exit(0)
        theirs.close()
        with ours, contextlib.closing(_Child(pid, ours, intake, self._metered)) as child:
            end = self._attend(child, start, is_watched)
            if end is None and os.WIFEXITED(child.status) and not child.is_confined:
                raise RuntimeError("a child could not be confined")  # no fault of its script
            signaled = os.WIFSIGNALED(child.status)
            outcome = Outcome(
                end=end or (End.SIGNAL if signaled else End.EXIT),
                code=os.WTERMSIG(child.status) if signaled else os.WEXITSTATUS(child.status),
                seconds=time.monotonic() - start,
                cpu_seconds=child.cpu_seconds,
            )
        self.fit = self._clean(child.created)
        return outcome

    def _attend(self, child: "_Child", start: float, is_watched: Callable[[], bool]) -> End | None:
        """Waits until the child has ended, or ends it; always reaps it.

        Returns:
          Why it was ended; None where it did so by itself.
        """
        deadline = start + self._settings.wall_seconds
        due = start  # when we should be awake again
        end = None
        child.poll.register(self._trainer, select.POLLHUP)
        try:
            while end is None and not child.has_ended:
                now = time.monotonic()
                if now - due > _STALL_SECONDS:
                    deadline += now - due  # we were stopped, and the child may have waited for us
                elif now >= deadline:
                    return End.WALL
                due = min(deadline, now + _LONGEST_WAIT)
                ready = dict(child.poll.poll(1000 * max(0.0, due - now)))
                if self._trainer.fileno() in ready:
                    raise EOFError("the trainer is gone")
                end = child.attend(ready)
                child.answer(is_watched)
        finally:
            child.reap()
        return end

    def _clean(self, created: int | None) -> bool:
        """Empties the working directory; False where that fails, or takes too long.

        The names of files are a script's text, and stay out of this process: but for the script's
        own file, whatever is there is removed by a fork.

        Args:
          created: how many files and folders there can be; None: any number.
        """
        if created is not None and created <= 1:
            try:
                os.unlink(os.path.join(self._directory, SCRIPT_NAME))
                return True
            except FileNotFoundError:
                if created == 0:
                    return True
        pid = _fork_patiently()
        if pid == 0:
            with contextlib.suppress(BaseException):
                scratch.empty(self._directory, self._trash)
                os._exit(0)
            os._exit(_FAILED)
        process = os.pidfd_open(pid)
        if not select.select([process], [], [], _CLEAN_SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
        os.close(process)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class _Child:
    """A forked child as its zygote sees it: what it sends, what it writes, how it ends.

    Args:
      connection: to it.
      intake: takes what it sends.
      is_metered: it hands over its quota first.

    Attributes:
      has_ended: by itself; `reap` has still to be called.
      created: how many files and folders it asked for; None where that is not counted.
      status, cpu_seconds: of the process, after `reap`.
    """

    def __init__(self, pid: int, connection: socket.socket, intake: wire.Intake, is_metered: bool):
        self.has_ended = False
        self.created: int | None = 0 if is_metered else None
        self.status, self.cpu_seconds = 0, 0.0
        self._pid, self._connection, self._intake = pid, connection, intake
        self._is_metered = is_metered
        self._meter: quota.Meter | None = None
        self._answered = False
        self._process = os.pidfd_open(pid)
        self.poll = select.poll()
        self.poll.register(connection, select.POLLIN)
        self.poll.register(self._process, select.POLLIN)

    @property
    def is_confined(self) -> bool:
        """Whether it came so far, where that is known."""
        return not self._is_metered or self._meter is not None

    def attend(self, ready: Mapping[int, int]) -> End | None:
        """Does what the descriptors in `ready` ask for; why the child must be ended, else None."""
        if self._connection.fileno() in ready and not self._read():
            self.poll.unregister(self._connection)
        if self._intake.is_too_long():
            return End.FLOOD
        if self._meter is not None and self._meter.descriptor in ready:
            if not ready[self._meter.descriptor] & select.POLLIN:  # nobody is left to be counted
                self.poll.unregister(self._meter.descriptor)
            elif not self._meter.count():
                return End.DISK
        self.has_ended = self._process in ready
        return None

    def answer(self, is_watched: Callable[[], bool]) -> None:
        """Says once, when its claim is there, whether the child's display list is wanted."""
        if not self._answered and self._intake.has_claim():
            self._answered = True
            with contextlib.suppress(OSError):  # it may be gone
                self._connection.send(wire.WANTED if is_watched() else wire.UNWANTED)

    def reap(self) -> None:
        """Kills what still runs, and takes what was sent to the end."""
        # The child leads its own session: what it may have started goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.kill(self._pid, signal.SIGKILL)  # it may not have come so far as to lead one
        _, self.status, usage = os.wait4(self._pid, 0)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        self._read()
        if self._meter is not None:
            self.created = self._meter.created

    def close(self) -> None:
        os.close(self._process)
        if self._meter is not None:
            self._meter.close()

    def _read(self) -> bool:
        """Reads what is there; False at the end of the stream."""
        if self._is_metered and self._meter is None:
            try:
                self._meter = quota.Meter(self._connection)
            except (EOFError, OSError):
                return False
            self.poll.register(self._meter.descriptor, select.POLLIN)
        return self._intake.read(self._connection)


def _fork_patiently() -> int:
    """`os.fork`, where other processes of this user may end soon.

    Raises:
      RuntimeError: there are too many for seconds.
    """
    for _ in range(_PATIENCE):
        with contextlib.suppress(BlockingIOError):
            return os.fork()
        time.sleep(0.2)
    raise RuntimeError(
        "no process can be started: this user has too many (raise `ulimit -u`, or end some)"
    )


def _limits(settings: Settings) -> list[tuple[int, int, int]]:
    """Limits of a child: (resource, soft, hard); none is above what this process may set."""
    cpu = max(1, round(settings.cpu_seconds))
    memory, disk = settings.memory_mb << 20, quota.DISK_MB << 20
    wanted = [
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, disk, disk),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_CORE, 0, 0),
    ]
    limits = []
    for name, soft, hard in wanted:
        _, highest = resource.getrlimit(name)
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        limits.append((name, soft, hard))
    return limits


if __name__ == "__main__":
    main(int(sys.argv[1]))

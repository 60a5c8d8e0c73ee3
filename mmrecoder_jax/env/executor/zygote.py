"""The zygote: imports the plotting libraries once, then forks a fresh child for every script.

`pool.py` starts it as a program:

    python -P -B zygote.py FD

FD is a connected Unix socket; the environment holds only what `pool.py` names.

The parent part never runs model code and never reads what a child says: it forwards the child's
bytes with the facts that it knows itself (how the child ended, times). It holds no secret, and no
target. It ends when its socket does. It imports nothing of the trainer's side: what it has loaded,
every untrusted child has (tests/env/executor/test_zygote.py lists it).
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable

# Started by its path, with -P: the package is not on the path, and stays off it for scripts.
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3)))
from mmrecoder_jax.env import wire
from mmrecoder_jax.env.child import display_list, script
from mmrecoder_jax.env.executor.warm_start import warm_start
from mmrecoder_jax.env.sandbox import confinement
from mmrecoder_jax.env.wire import End, Finding, Outcome, RecordKind, Request, Settings

del sys.path[0]

_DISK_MB, _DISK_FILES = 64, 1000
_ADDR_NO_RANDOMIZE = 0x0040000
_FAILED = 99  # exit status of a child that could not do its work
_DECIDED = range((Finding.HIDDEN_TEXT | Finding.FORGED) + 1)
_POLL_MILLISECONDS = 100.0  # between looks at the disk


def main() -> None:
    """Serves executions over the socket whose number is the only argument, until it is closed."""
    _fix_addresses()
    trainer = socket.socket(fileno=int(sys.argv[1]))
    control, _, _ = wire.receive(trainer)
    settings = Settings.from_json(control)
    zygote = Zygote(settings, trainer)
    outcome, claim, _ = zygote.execute(Request("", RecordKind.TRAINING), lambda: False)
    if not claim:
        raise RuntimeError(f"a script cannot be run here: {outcome}")
    wire.send(trainer, wire.READY)
    farewell = False
    with contextlib.suppress(EOFError, OSError):
        while not farewell:
            control, _, _ = wire.receive(trainer)
            farewell = control == wire.FAREWELL
            if not farewell:
                outcome, claim, pixels = zygote.execute(
                    Request.from_json(control), lambda: wire.receive(trainer)[0] == wire.WATCHED
                )
                wire.send(trainer, outcome.to_json(), claim, pixels)
    with contextlib.suppress(EOFError, OSError):
        while not farewell:  # it may have been said while a script ran
            farewell = wire.receive(trainer)[0] == wire.FAREWELL
    if not farewell:  # the trainer died: nobody else cleans up
        shutil.rmtree(os.path.dirname(settings.directory), ignore_errors=True)


def _fix_addresses() -> None:
    """Starts this program again without randomised addresses, where that is allowed.

    Constrained layouts depend on addresses in the last digits.
    """
    libc = ctypes.CDLL(None)
    current = libc.personality(ctypes.c_ulong(0xFFFFFFFF))
    if (
        current >= 0
        and not current & _ADDR_NO_RANDOMIZE
        and libc.personality(ctypes.c_ulong(current | _ADDR_NO_RANDOMIZE)) >= 0
    ):
        os.execv(sys.executable, sys.orig_argv)


class Zygote:
    """A warm interpreter and the loop around one child.

    Args:
      settings: from the trainer.
      trainer: the socket; a child must not keep it, and its end is noticed while a child runs.
    """

    def __init__(self, settings: Settings, trainer: socket.socket):
        self._settings = settings
        self._trainer = trainer
        self._directory = os.path.join(settings.directory, "work")
        os.mkdir(self._directory, 0o700)
        self._confinement = confinement.prepare(
            settings.sandbox, settings.landlock_abi, self._directory, _limits(settings)
        )
        self._max_result = wire.max_result_bytes(settings.max_pixels, display_list.MAX_BYTES)
        self._warm = warm_start(settings)

    def execute(
        self, request: Request, is_watched: Callable[[], bool]
    ) -> tuple[Outcome, bytes, memoryview]:
        """Runs one script in a child and, where asked, its display list in another.

        Args:
          is_watched: asked when the claim is there: what a child is forked from does not know it.

        Returns:
          The outcome, and the child's own bytes, claim and pixels, length-checked.
        """

        def run(out: int) -> None:
            warm = self._warm
            if request.kind == RecordKind.TRAINING:
                warm.reserve.open()
            script.work(out, request, warm.capture, warm.untouched, self._settings.partial)

        watched = functools.cache(is_watched)
        outcome, data = self._fork(run, watched)
        claim, pixels, display = wire.split_result(data, 4 * self._settings.max_pixels)
        if watched() and outcome.end == End.EXIT and pixels:
            whole = outcome.code == 0
            finding = self._replay(claim, pixels, display) if whole else Finding.UNDECIDED
            outcome = dataclasses.replace(outcome, replay=finding)
        return outcome, claim, pixels

    def _replay(self, claim: bytes, pixels: memoryview, display: memoryview) -> Finding:
        """What a replay finds, by the exit status of a child that runs no model code.

        Nothing that this child says is read either: it parses what the script's process sent.
        """
        if not display:
            return Finding.UNDECIDED

        def check(out: int) -> None:
            record = json.loads(claim)["record"]
            os._exit(display_list.check(bytes(display), bytes(pixels), record))

        outcome, _ = self._fork(check, lambda: False)
        decided = outcome.end == End.EXIT and outcome.code in _DECIDED
        return Finding(outcome.code) if decided else Finding.UNDECIDED

    def _fork(
        self, work: Callable[[int], None], is_watched: Callable[[], bool]
    ) -> tuple[Outcome, bytearray]:
        """Runs `work` in a confined child, which may write to the descriptor that it is given.

        Args:
          is_watched: whether the child's display list is wanted; asked when its claim is there.

        Returns:
          How it ended, and what it wrote.
        """
        reader, writer = (end.detach() for end in socket.socketpair())
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                out = confinement.enter(self._confinement, writer)
                random.seed(0)  # Python's own generator is seeded anew by each fork
                work(out)
            except BaseException:
                os._exit(_FAILED)
            os._exit(0)
        os.close(writer)
        try:
            killed, status, usage, data = self._attend(pid, reader, start, is_watched)
        finally:
            os.close(reader)
            self._clean()
        signaled = os.WIFSIGNALED(status)
        outcome = Outcome(
            end=killed or (End.SIGNAL if signaled else End.EXIT),
            code=os.WTERMSIG(status) if signaled else os.WEXITSTATUS(status),
            seconds=time.monotonic() - start,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
        )
        return outcome, data

    def _attend(
        self, pid: int, reader: int, start: float, is_watched: Callable[[], bool]
    ) -> tuple[End | None, int, resource.struct_rusage, bytearray]:
        """Reads what the child sends, until it has ended or must be ended; always reaps it."""
        limit = self._max_result
        data = bytearray()
        process = os.pidfd_open(pid)
        os.set_blocking(reader, False)
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        poll.register(process, select.POLLIN)
        poll.register(self._trainer, select.POLLHUP)
        killed = None
        answered = False
        try:
            while killed is None:
                left = start + self._settings.wall_seconds - time.monotonic()
                ready = dict(poll.poll(min(_POLL_MILLISECONDS, max(0.0, 1000 * left))))
                if reader in ready and not _drain(reader, data, limit):
                    poll.unregister(reader)
                if not answered and wire.has_claim(data):
                    answered = True
                    with contextlib.suppress(OSError):  # it may be gone
                        os.write(reader, wire.WANTED if is_watched() else wire.UNWANTED)
                if process in ready:
                    break
                if self._trainer.fileno() in ready:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    raise EOFError("the trainer is gone")
                if left <= 0 or len(data) > limit:
                    killed = End.WALL
                elif not ready and not self._disk_is_fine():
                    killed = End.DISK
        finally:
            os.close(process)
        # The child leads its own session: what it may have started goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        _drain(reader, data, limit)
        return killed, status, usage, data

    def _disk_is_fine(self) -> bool:
        size = count = 0
        for folder, folders, files in os.walk(self._directory):
            count += len(files) + len(folders)
            for name in files:
                with contextlib.suppress(OSError):
                    size += os.lstat(os.path.join(folder, name)).st_blocks * 512
            if size > _DISK_MB << 20 or count > _DISK_FILES:
                return False
        return True

    def _clean(self) -> None:
        """Empties the working directory, whatever modes its folders have and however deep they are.

        Each folder is moved up before it is emptied: a path may be longer than the kernel takes.
        """
        folders = [self._directory]
        moved = 0
        while folders:
            folder = folders.pop()
            os.chmod(folder, 0o700)
            with os.scandir(folder) as entries:
                for entry in list(entries):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.path)
                    elif folder == self._directory:
                        folders.append(entry.path)
                    else:
                        moved += 1
                        folders.append(f"{self._directory}/\x7f{moved}")
                        os.rename(entry.path, folders[-1])
            if folder != self._directory:
                os.rmdir(folder)


def _limits(settings: Settings) -> list[tuple[int, int, int]]:
    cpu = max(1, round(settings.cpu_seconds))
    return [
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, settings.memory_mb << 20, settings.memory_mb << 20),
        (resource.RLIMIT_FSIZE, _DISK_MB << 20, _DISK_MB << 20),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_CORE, 0, 0),
    ]


def _drain(reader: int, data: bytearray, limit: int) -> bool:
    """Reads what is there; False at the end of the stream.

    Stops once more than `limit` bytes are there, which the caller treats as a failure. A child that
    is gone without having read the answer to its claim resets the stream, which ends it too.
    """
    try:
        while len(data) <= limit:
            chunk = os.read(reader, 1 << 20)
            if not chunk:
                return False
            data += chunk
    except BlockingIOError:
        pass
    except ConnectionResetError:
        return False
    return True


if __name__ == "__main__":
    main()

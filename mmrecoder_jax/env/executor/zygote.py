"""The executor: imports the plotting libraries once, then forks a fresh child for every script.
Started by `pool.py` as a program.

    python -P -B zygote.py FD        (FD: a connected Unix socket; the environment holds only what `pool.py` names)

The parent part never runs model code and never reads what a child says: it forwards the child's
bytes with the facts that it knows itself (how the child ended, times). It holds no secret, and no
target. It ends when its socket does.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from types import CodeType, TracebackType
from typing import Any

sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), *[os.pardir] * 3)))
from mmrecoder_jax.env import wire
from mmrecoder_jax.env.child import capture, chartmimic_recorder, display_list, recorder
from mmrecoder_jax.env.execution import MAX_CLAIM_BYTES
from mmrecoder_jax.env.executor import integrity, warm_start
from mmrecoder_jax.env.sandbox import confinement

del sys.path[0]

SCRIPT_NAME = "script.py"
_LENGTHS = struct.Struct("<III")  # of claim, pixels and display list, from child to zygote
_DISK_MB, _DISK_FILES = 64, 1000
_SHOWN_FRAMES = 3
_ADDR_NO_RANDOMIZE = 0x0040000
_FAILED = 99  # exit status of a child that could not do its work


def main() -> None:
    """Serves executions over the socket whose number is the only argument, until the socket is
    closed.
    """
    _fix_addresses()
    trainer = socket.socket(fileno=int(sys.argv[1]))
    settings, _, _ = wire.receive(trainer)
    zygote = Zygote(settings, trainer)
    outcome, claim, _ = zygote.execute("", "training", False)
    if not claim:
        raise RuntimeError(f"a script cannot be run here: {outcome}")
    wire.send(trainer, {"ready": True, "pid": os.getpid()})
    farewell = False
    with contextlib.suppress(EOFError, OSError):
        while not farewell:
            request, _, _ = wire.receive(trainer)
            farewell = "stop" in request
            if not farewell:
                wire.send(
                    trainer, *zygote.execute(request["code"], request["record"], request["replay"])
                )
    with contextlib.suppress(EOFError, OSError):
        farewell = farewell or bool(wire.receive(trainer))  # said while a script ran
    if not farewell:  # the trainer died: nobody else cleans up
        shutil.rmtree(os.path.dirname(settings["directory"]), ignore_errors=True)


def _fix_addresses() -> None:
    """Starts this program again without randomised addresses, where that is allowed: constrained
    layouts depend on them.
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
      settings: "rc_params", "preload", "dpi", "max_pixels", "wall_seconds", "cpu_seconds",
        "memory_mb", "partial", "sandbox", "landlock_abi" and "directory" (private, exists).
      trainer: the socket; a child must not keep it, and its end is noticed while a child runs.
    """

    def __init__(self, settings: dict[str, Any], trainer: socket.socket):
        self._settings = settings
        self._trainer = trainer
        self._directory = os.path.join(settings["directory"], "work")
        os.mkdir(self._directory, 0o700)
        self._policy = confinement.prepare(settings, self._directory, _limits(settings))
        self._capture = _prepare_matplotlib(settings)
        for name in settings["preload"]:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        recorder.install()
        display_list.install()
        warm_start.fonts_in_memory()
        _seed()
        _warm_up()
        recorder.start()
        self._reserve = warm_start.Reserve()
        self._reserve.install()
        self._untouched = integrity.snapshot()
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)

    def execute(
        self, code: str, record: str, replay: bool
    ) -> tuple[dict[str, Any], bytes, memoryview]:
        """Runs one script in a child, and with `replay` its display list in another
        (`display_list.py`).

        Returns the outcome (see `execution.decode`) and the child's own bytes, length-checked.
        """
        replay = replay and record == "training"
        outcome, data = self._fork(lambda out: self._script(out, code, record, replay))
        claim, pixels, display = _split(data)
        if replay and outcome["end"] == "exit" and outcome["code"] == 0 and pixels:
            outcome["replay"] = self._replay(claim, pixels, display)
        return outcome, claim, pixels

    def _replay(self, claim: bytes, pixels: memoryview, display: memoryview) -> int:
        """What a replay finds, by the exit status of a child that runs no model code: nothing that
        it says is read.
        """
        if not display:
            return display_list.UNDECIDED

        def check(out: int) -> None:
            texts = json.loads(claim)["record"]["texts"]
            os._exit(display_list.check(bytes(display), bytes(pixels), texts))

        outcome, _ = self._fork(check)
        found = outcome["code"] if outcome["end"] == "exit" else display_list.UNDECIDED
        return found if found in (0, 1, 2, 3) else display_list.UNDECIDED

    def _fork(self, work: Callable[[int], None]) -> tuple[dict[str, Any], bytearray]:
        """Runs `work` in a confined child, which may write to the descriptor that it is given.
        Returns how it ended, and what it wrote.
        """
        reader, writer = os.pipe()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                out = confinement.enter(self._policy, writer)
                random.seed(0)  # Python's own generator is seeded anew by each fork
                work(out)
            except BaseException:
                os._exit(_FAILED)
            os._exit(0)
        os.close(writer)
        try:
            end, status, usage, data = self._attend(pid, reader, start)
        finally:
            os.close(reader)
            self._clean()
        outcome = {
            "end": end or ("signal" if os.WIFSIGNALED(status) else "exit"),
            "code": os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status),
            "seconds": time.monotonic() - start,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }
        return outcome, data

    def _attend(
        self, pid: int, reader: int, start: float
    ) -> tuple[str | None, int, resource.struct_rusage, bytearray]:
        """Reads what the child sends, until it has ended or must be ended; always reaps it."""
        limit = (
            _LENGTHS.size
            + MAX_CLAIM_BYTES
            + 4 * self._settings["max_pixels"]
            + display_list.MAX_BYTES
        )
        data = bytearray()
        process = os.pidfd_open(pid)
        os.set_blocking(reader, False)
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        poll.register(process, select.POLLIN)
        poll.register(self._trainer, select.POLLHUP)
        end = None
        try:
            while True:
                left = start + self._settings["wall_seconds"] - time.monotonic()
                ready = dict(poll.poll(min(100.0, max(0.0, 1000 * left))))
                if reader in ready and not _drain(reader, data, limit):
                    poll.unregister(reader)
                if process in ready:
                    break
                if self._trainer.fileno() in ready:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    raise EOFError("the trainer is gone")
                if left <= 0 or len(data) > limit:
                    end = "wall"
                elif not ready and not self._disk_is_fine():
                    end = "disk"
                if end:
                    break
        finally:
            os.close(process)
        # The child leads its own session: what it may have started goes with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        _drain(reader, data, limit)
        return end, status, usage, data

    def _script(self, out: int, code: str, record: str, replay: bool) -> None:
        """What the child of a script does."""
        if replay:
            display_list.start()
        if record == "training":
            self._reserve.open()
            claim, pixels = _run(self._capture, self._untouched, code, self._settings["partial"])
        else:
            claim, pixels = _run_official(code, record), b""
        display = self._capture.display if replay and pixels else b""
        _write_all(out, _LENGTHS.pack(len(claim), len(pixels), len(display)) + claim)
        _write_all(out, pixels)
        _write_all(out, display)

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
        """Empties the working directory, whatever modes its folders have and however deep they are:
        each is moved up and emptied.
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


def _prepare_matplotlib(settings: dict[str, Any]) -> capture.Capture:
    """Agg, the library's own defaults plus the house style, and only the fonts that come with
    matplotlib.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(settings["rc_params"])
    own = os.path.join(matplotlib.get_data_path(), "fonts")
    manager = font_manager.fontManager
    manager.ttflist = [
        font for font in manager.ttflist if os.path.join(own, "") in os.path.join(own, font.fname)
    ]
    manager.afmlist = [
        font for font in manager.afmlist if os.path.join(own, "") in os.path.join(own, font.fname)
    ]
    result = capture.Capture(
        settings["dpi"],
        settings["max_pixels"],
        describe=recorder.finish,
        display=display_list.taken,
    )
    result.install()
    return result


def _seed() -> None:
    """Every child starts from the same random state, also in generators that would ask the system
    for entropy.
    """
    import numpy as np

    np.random.seed(0)
    np.random.bit_generator.randbits = lambda k: 12345


def _warm_up() -> None:
    """Draws a figure, so that what matplotlib loads and caches at first use is there before the
    fork.
    """
    from matplotlib import font_manager, mathtext
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots()
    axes.bar(["a", "b"], [1.5, 20])
    axes.plot([0, 1], [1, 2], label="l")
    axes.scatter([0, 1], [0, 1])
    axes.set(title="T", xlabel="x", ylabel="$y$")
    axes.grid(True)
    axes.legend()
    figure.tight_layout()
    figure.canvas.draw()
    plt.close("all")
    # An open font file would be shared, with its offset, by all children.
    font_manager._get_font.cache_clear()
    mathtext.MathTextParser._parse_cached.cache_clear()
    gc.collect()


def _limits(settings: dict[str, Any]) -> list[tuple[int, int, int]]:
    cpu = max(1, round(settings["cpu_seconds"]))
    return [
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, settings["memory_mb"] << 20, settings["memory_mb"] << 20),
        (resource.RLIMIT_FSIZE, _DISK_MB << 20, _DISK_MB << 20),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_CORE, 0, 0),
    ]


def _run(
    captured: capture.Capture, untouched: integrity.Snapshot, code: str, partial: bool
) -> tuple[bytes, bytes]:
    """Executes the script and describes what came of it: the claim and the pixels."""
    status, error = "ok", ""
    try:
        compiled = compile(code, SCRIPT_NAME, "exec", dont_inherit=True)
        captured.start(compiled)
        try:
            exec(compiled, {"__name__": "__main__", "__builtins__": __builtins__})
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
        captured.finish()
    except MemoryError:
        status = "killed"
    except capture.NoFigure:
        status = "no_figure"
    except BaseException as problem:
        status, error = "error", describe(problem, code)
        if partial:
            with contextlib.suppress(BaseException):
                captured.finish()
    size = captured.size if status == "ok" else None
    record = captured.record if status == "ok" or partial else None
    flags = ["tamper"] if integrity.changed(untouched) else []
    claim = json.dumps(
        {"status": status, "error": error, "record": record, "size": size, "flags": flags}
    ).encode()
    return claim[:MAX_CLAIM_BYTES], captured.pixels if size else b""


def _run_official(code: str, parts: str) -> bytes:
    """Executes a script for the official record; the claim."""
    error, record = chartmimic_recorder.run(code, parts.split(","))
    return json.dumps(
        {
            "status": "error" if error else "ok",
            "error": error[:1000],
            "record": record,
            "size": None,
            "flags": [],
        }
    ).encode()


def describe(problem: BaseException, code: str) -> str:
    """The error as the model reads it: the script's own lines, innermost last, then type and
    message.

    line 5, in <module>: draw(ax)
    line 3, in draw: ax.plot(x, colour='red')
    AttributeError: Line2D.set() got an unexpected keyword argument 'colour'
    """
    lines = code.splitlines()
    shown = []
    for frame, number in _own_frames(problem.__traceback__):
        source = lines[number - 1].strip()[:200] if number <= len(lines) else ""
        shown.append(f"line {number}, in {frame.co_name}: {source}")
    try:
        message = "".join(traceback.format_exception_only(type(problem), problem)).strip()
    except BaseException:
        message = "an error whose message cannot be shown"
    message = message.replace(f'File "{SCRIPT_NAME}", ', "")
    if len(message) > 800:
        message = message[:400] + " … " + message[-390:]
    return "\n".join([*shown[-_SHOWN_FRAMES:], message])


def _own_frames(trace: TracebackType | None) -> list[tuple[CodeType, int]]:
    frames = []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == SCRIPT_NAME:
            frames.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return frames


def _drain(reader: int, data: bytearray, limit: int) -> bool:
    """Reads what is there; False at the end of the stream. Stops one byte over the limit, which the
    caller treats as a failure.
    """
    with contextlib.suppress(BlockingIOError):
        while len(data) <= limit:
            chunk = os.read(reader, 1 << 20)
            if not chunk:
                return False
            data += chunk
    return True


def _split(data: bytearray) -> tuple[bytes, memoryview, memoryview]:
    """Claim, pixels and display list, all empty when the lengths do not fit."""
    if len(data) >= _LENGTHS.size:
        claim, pixels, display = _LENGTHS.unpack_from(data)
        if claim <= MAX_CLAIM_BYTES and len(data) == _LENGTHS.size + claim + pixels + display:
            first = _LENGTHS.size + claim
            return (
                bytes(data[_LENGTHS.size : first]),
                memoryview(data)[first : first + pixels],
                memoryview(data)[first + pixels :],
            )
    return b"", memoryview(b""), memoryview(b"")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


if __name__ == "__main__":
    main()

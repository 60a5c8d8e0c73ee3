"""What one run of a script gives back, and how the claims of an untrusted process become it.

The process that ran the script is the script's own: whatever it says about itself is a *claim*. Two
things are not claims: how the process ended (the zygote's `wait4`) and that a message is well
formed (checked here). `decode` turns both into an `Execution`; it parses JSON and copies raw
pixels, nothing else, and never raises on what a hostile process may send.
"""

import dataclasses
import enum
import functools
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mmrecoder_jax.env.records import AnyRecord, is_count, parse
from mmrecoder_jax.env.sandbox import scratch
from mmrecoder_jax.env.sandbox.confinement import SandboxMode
from mmrecoder_jax.env.wire import End, Finding, Flag, Outcome, RecordKind, Status

RecordT_co = TypeVar("RecordT_co", bound=AnyRecord, covariant=True)
# A process cannot know these of itself.
_NOT_CLAIMABLE = (Status.TIMEOUT, Status.NO_CODE, Status.OVERSIZED, Status.REFUSED)
_FLAG_OF = {Finding.HIDDEN_TEXT: Flag.HIDDEN_TEXT, Finding.FORGED: Flag.FORGED}
_TOO_MUCH_DISK = "The script was stopped: it wrote too many or too large files."
_LONGEST_ERROR = 2500  # characters that are looked at; ours are far shorter
_NO_RESULT = "The script ended its process before it gave a result."
_TOO_MUCH_SENT = "The script was stopped: its result is too large."


class Replay(enum.StrEnum):
    """What became of the display list."""

    NOT_ASKED = ""
    DONE = "done"
    UNDECIDED = "undecided"  # it cannot be replayed


@dataclasses.dataclass(frozen=True)
class Execution(Generic[RecordT_co]):
    """The result of one script. An `Execution[Record]` holds the training record.

    Attributes:
      status: how it ended.
      image: uint8 [H, W, 3], read-only, on white where the figure was transparent; None unless the
        status is OK and pixels were asked for.
      error: feedback text for the model, "" when ok; at most `EnvConfig.feedback_chars` characters.
      record: what was drawn, of the kind that was asked for; None where there is none, or where it
        was found to be forged.
      seconds: wall time from fork to the end of the process.
      cpu_seconds: CPU time of that process.
      flags: what speaks against it.
      replay: whether the display list was replayed, which two of the flags come from.
    """

    status: Status
    image: np.ndarray | None = None
    error: str = ""
    record: RecordT_co | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flags: tuple[Flag, ...] = ()
    replay: Replay = Replay.NOT_ASKED

    @property
    def ok(self) -> bool:
        return self.status == Status.OK


def _spare_cores() -> int:
    """One core is the trainer's."""
    return max(1, (os.cpu_count() or 2) - 1)


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """How scripts are run.

    Attributes:
      workers: zygotes, each running one script at a time; one per core, less one for the trainer.
        0: scripts run on `hosts` alone.
      hosts: executor hosts ("name:port"), whose executors run scripts beside the workers.
      secret: a file with the secret that the hosts know; "" only where all are on this machine.
      python: the program that executors run on, with the libraries that scripts draw with; "": the
        trainer's own Python.
      dpi: dots per inch of every render, whatever the script asks for.
      rc_params: matplotlib rc settings in force before each script (the data set's house style).
      wall_seconds, cpu_seconds: limits of one script, enforced by killing it.
      memory_mb: address space of one script.
      max_pixels: largest figure, width times height.
      preload: modules a zygote imports once, where they are installed. Fewer make a fork cheaper;
        the others still import, slowly.
      cache_size, cache_mb: results kept by code: entries, and megabytes of their images.
      partial: also record what a script drew before it raised (ChartMimic's `no_filter` scores need
        it).
      feedback_chars: longest feedback text.
      replay_share: share of the executions whose display list is drawn again, to find records and
        pictures that were not drawn.
      replay_seed: which ones depends on their code and on this number, which no script sees.
      sandbox: a `SandboxMode`: "auto" contains scripts or refuses to start; "unsafe" runs them with
        this user's rights.
      bubblewrap: also put the executors into bubblewrap, where it is installed and works.
      landlock_abi: use no newer Landlock ABI than this, as on an older kernel; None: what the
        kernel has.
    """

    workers: int = dataclasses.field(default_factory=_spare_cores)
    hosts: tuple[str, ...] = ()
    secret: str = ""
    python: str = ""
    dpi: int = 100
    rc_params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wall_seconds: float = 30.0
    cpu_seconds: float = 15.0
    memory_mb: int = 2048
    max_pixels: int = 4_000_000
    preload: tuple[str, ...] = (
        *("numpy", "matplotlib", "pandas", "seaborn"),
        *("scipy", "networkx", "squarify", "matplotlib_venn"),
    )
    cache_size: int = 4096
    cache_mb: int = 512
    partial: bool = False
    feedback_chars: int = 1200
    replay_share: float = 0.05
    replay_seed: int = 0
    sandbox: str = SandboxMode.AUTO
    bubblewrap: bool = True
    landlock_abi: int | None = None


def decode(
    outcome: Outcome,
    claim: bytes,
    pixels: bytes,
    config: EnvConfig,
    kind: RecordKind = RecordKind.TRAINING,
) -> Execution[Any]:
    """Builds an `Execution` from the zygote's facts and from what the script's process sent.

    Args:
      outcome: trusted.
      claim: untrusted JSON, may be empty or garbage.
      pixels: untrusted RGBA bytes, row by row from the top.
      kind: what was asked for, which says how the record is read.
    """
    image, record, replay = None, None, Replay.NOT_ASKED
    flags: tuple[Flag, ...] = ()
    if outcome.end != End.EXIT:
        status, error = _why_ended(outcome, config)
    else:
        try:
            status, error, record, flags = _read_claim(claim, kind)
            if status == Status.OK and kind == RecordKind.TRAINING:
                image = _read_pixels(claim, pixels, config.max_pixels)
        except (ValueError, RecursionError, KeyError, TypeError):
            status, error, record, flags = Status.KILLED, _NO_RESULT, None, ()
        else:
            error = _own_words(status, config) or error
    if status == Status.OK and outcome.replay is not None:
        replay = Replay.UNDECIDED if outcome.replay == Finding.UNDECIDED else Replay.DONE
        flags += tuple(flag for finding, flag in _FLAG_OF.items() if finding & outcome.replay)
        if Flag.FORGED in flags:
            record = None  # scores nothing
    # Not all of it: to look for paths takes time that grows with the square of the length.
    error = clean_text(error[-_LONGEST_ERROR:], config.feedback_chars)
    times = outcome.seconds, outcome.cpu_seconds
    return Execution(status, image, error, record, *times, flags, replay)


def is_no_result(execution: Execution[Any]) -> bool:
    """Whether the process of a script ended by itself, and nothing that it sent was a result."""
    return execution.status == Status.KILLED and execution.error == _NO_RESULT


def clean_text(text: str, limit: int) -> str:
    """A text that the policy may read: at most `limit` characters, of which the end is kept.

    Host paths are removed; control characters and lone surrogates become question marks.
    """
    text = _working_directory().sub(lambda match: "" if match["inside"] else ".", text)
    text = _HOST_PATHS.sub("", text)
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return text if len(text) <= limit else "…" + text[len(text) - limit + 1 :]


def _why_ended(outcome: Outcome, config: EnvConfig) -> tuple[Status, str]:
    """Status and error text of a script that did not come to its end by itself."""
    if outcome.end == End.WALL:
        limit = f"it ran longer than {config.wall_seconds:g} seconds"
        return Status.TIMEOUT, f"The script was stopped: {limit}."
    if outcome.end == End.DISK:
        return Status.KILLED, _TOO_MUCH_DISK
    if outcome.end == End.FLOOD:
        return Status.KILLED, _TOO_MUCH_SENT
    if outcome.code == signal.SIGXCPU or outcome.cpu_seconds >= config.cpu_seconds:
        limit = f"it used more than {config.cpu_seconds:g} seconds of CPU time"
        return Status.TIMEOUT, f"The script was stopped: {limit}."
    if outcome.code == signal.SIGXFSZ:
        return Status.KILLED, _TOO_MUCH_DISK
    return Status.KILLED, f"The script was killed by {_signal_name(outcome.code)}."


def _own_words(status: Status, config: EnvConfig) -> str:
    """The error text where the process is not believed in its own; "" where it is."""
    if status == Status.KILLED:
        return f"The script was stopped: it needed more than {config.memory_mb} MB of memory."
    if status == Status.NO_FIGURE:
        return "The script ran to its end but made no figure."
    return ""


def _read_claim(
    claim: bytes, kind: RecordKind
) -> tuple[Status, str, AnyRecord | None, tuple[Flag, ...]]:
    data = json.loads(claim, parse_constant=_no_constant)
    status = Status(data["status"])
    if status in _NOT_CLAIMABLE:
        raise ValueError("a process cannot claim this status")
    error, flags = data["error"], data["flags"]
    if not isinstance(error, str) or not isinstance(flags, list) or not set(flags) <= {Flag.TAMPER}:
        raise ValueError("bad error or flags")
    if status == Status.ERROR and not error:
        raise ValueError("an error needs a text")
    record = None if data["record"] is None else parse(kind, data["record"])
    return status, "" if status == Status.OK else error, record, tuple(map(Flag, flags))


def _read_pixels(claim: bytes, pixels: bytes, max_pixels: int) -> np.ndarray | None:
    size = json.loads(claim)["size"]
    if size is None:
        return None
    width, height = size
    if (
        not is_count(width)
        or not is_count(height)
        or not 0 < width * height <= max_pixels
        or len(pixels) != 4 * width * height
    ):
        raise ValueError("the size does not fit the pixels")
    rgba = np.frombuffer(pixels, np.uint8).reshape(height, width, 4)
    image = rgba[..., :3].copy()
    alpha = rgba[..., 3]
    if alpha.min() < 255:
        weight = alpha[..., None].astype(np.uint16)
        image = ((image * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
    image.flags.writeable = False
    return image


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not data")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _host_paths() -> re.Pattern[str]:
    """Matches the directories of this host's Python, its packages and its temporary files.

    The longest come first, so that no part of a path is left over.
    """
    roots = {
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        *(path for path in sys.path if path.startswith("/")),
        str(Path(__file__).parents[2]),
    }
    paths = sorted(
        (root.rstrip("/") + "/" for root in roots if len(root) > 1), key=len, reverse=True
    )
    # The executors may run on another Python than the trainer.
    others = r"/[^\s'\"]*?/(?:(?:site|dist)-packages|lib/python3\.\d+)/"
    return re.compile("|".join([*map(re.escape, paths), others]))


@functools.cache
def _working_directory() -> re.Pattern[str]:
    """Matches where a script runs (`pool`, `zygote`).

    It is named at random, and the same code must read the same error.
    """
    return re.compile(
        rf"(?:{re.escape(tempfile.gettempdir())}|/[^\s'\"]*?)"
        rf"/{scratch.POOL_PREFIX}[^/\s'\"]+(?:/\d+-\d+/work)?(?P<inside>/?)"
    )


_HOST_PATHS = _host_paths()

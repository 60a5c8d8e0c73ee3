"""The protocol of the trainer, the zygote and the process of a script: messages and their words.

Every side imports this module, so it needs nothing but the standard library.

    trainer -> zygote    Settings once; then RUN, Request and WATCHED or UNWATCHED, again and again,
                         and FAREWELL
    zygote -> trainer    READY once, or what FAILED; then per request an Outcome with the child's
                         claim and pixels
    child -> zygote      one result: claim, pixels, display list

A Request is read by the child, from the trainer's own socket and before it is confined: the zygote,
from which later scripts are forked, never has the code in its memory.

A frame between trainer and zygote is three lengths (little-endian uint32) and three byte strings:

    | 4  len(control) | 4  len(claim) | 4  len(pixels) | control | claim | pixels |

`control` is JSON of the zygote or the trainer, which trust each other; `claim` and `pixels` come
from the script's process and are opaque to the zygote. Lengths are checked before anything is
allocated. A child's result is two lengths, claim, pixels, and a display list up to its end:

    | 4  len(claim) | 4  len(pixels) | claim | pixels | display list |

Each part has a bound of its own, and what is over one is not read (`Intake`).
"""

import dataclasses
import enum
import json
import mmap
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Self

MAX_CONTROL_BYTES = 8 << 20
MAX_CODE_CHARACTERS = 1 << 19  # of which JSON makes 12 bytes at most
MAX_CLAIM_BYTES = 1 << 20  # JSON of one result
READY = {"ready": True}  # the zygote has imported everything and has run a script
FAILED = "failed"  # in place of READY; the value says why
RUN = {"run": True}  # a Request follows
WATCHED, UNWATCHED = {"replay": True}, {"replay": False}  # read when the script has ended
FAREWELL = {"stop": True}  # the trainer goes on purpose, and cleans up itself
_RESULT = struct.Struct("<II")  # lengths of claim and pixels
WANTED, UNWANTED = b"1", b"0"  # the zygote's answer to them: whether it wants the display list
_HEADER = struct.Struct("<III")


class RecordKind(enum.StrEnum):
    """What is wanted of a script: how it is run, and which record is made of it.

    The official evaluator of ChartMimic runs a script once per part, each time with other functions
    replaced; OFFICIAL_CALLS makes three parts in one run, where that makes no difference.
    """

    TRAINING = "training"  # picture and `records.Record`, by `child.recorder`
    OFFICIAL_RUN = "official_run"  # nothing but whether it runs to its end, without any hook
    OFFICIAL_TEXT = "official_text"  # `records.OfficialRecord`, by `child.chartmimic_recorder`
    OFFICIAL_LAYOUT = "official_layout"
    OFFICIAL_TYPE = "official_type"
    OFFICIAL_COLOR = "official_color"
    OFFICIAL_CALLS = "official_calls"  # layout, type and color
    PLOT2CODE = "plot2code"  # `records.Plot2CodeRecord`, by `child.plot2code_recorder`
    PLOT2CODE_TARGET = "plot2code_target"  # the same of a reference script, run as a module
    CHART2CODE = "chart2code"  # `records.Chart2CodeRecord`, by `child.chart2code_recorder`


class Part(enum.StrEnum):
    """The parts of ChartMimic's low-level metric: what is recorded, and what is scored."""

    TEXT = "text"
    LAYOUT = "layout"
    TYPE = "type"
    COLOR = "color"


class Status(enum.StrEnum):
    """How an execution ended. A script's process may claim all but the last three and TIMEOUT."""

    OK = "ok"  # a figure was drawn
    ERROR = "error"  # the script raised, or its figure is too large
    TIMEOUT = "timeout"  # killed at the wall-clock or CPU limit
    KILLED = "killed"  # ended by a signal, by a memory or file limit, or without a result
    NO_FIGURE = "no_figure"  # ran to its end and drew nothing
    NO_CODE = "no_code"  # the response holds no code
    OVERSIZED = "oversized"  # the figure is too large or too thin to be shown to the policy
    REFUSED = "refused"  # nothing was asked of the policy: the chart itself cannot be shown


class Flag(enum.StrEnum):
    """What speaks against an execution (docs/environment.md, "Watching for lies")."""

    TAMPER = "tamper"  # the script changed matplotlib or the recorder; claimed by its process
    HIDDEN_TEXT = "hidden_text"  # the record claims texts that cannot be seen; from a replay
    FORGED = "forged"  # picture or record do not follow from what was drawn; from a replay


class End(enum.StrEnum):
    """How a child ended, as the zygote saw it."""

    EXIT = "exit"
    SIGNAL = "signal"
    WALL = "wall"  # killed: over the wall-clock limit
    DISK = "disk"  # killed: it wrote too much
    FLOOD = "flood"  # killed: it sent more than a part of a result may hold


class Finding(enum.IntFlag):
    """What a replay of a display list found; also the exit status of its process. 0: nothing."""

    HIDDEN_TEXT = 1
    FORGED = 2
    UNDECIDED = 64  # it cannot be replayed; alone


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a zygote is told once. `directory` is its own and exists; the rest: `EnvConfig`."""

    directory: str
    rc_params: dict[str, Any]
    preload: tuple[str, ...]
    dpi: int
    max_pixels: int
    wall_seconds: float
    cpu_seconds: float
    memory_mb: int
    partial: bool
    sandbox: str
    landlock_abi: int | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**{**data, "preload": tuple(data["preload"])})


@dataclasses.dataclass(frozen=True)
class Request:
    """One script to run, after RUN. `WATCHED` or `UNWATCHED` follows, read when it has ended."""

    code: str
    kind: RecordKind

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(data["code"], RecordKind(data["kind"]))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the zygote itself knows of a run: facts, no claims.

    Attributes:
      code: exit status, or the number of the signal.
      seconds: wall time from the fork to the end of the process.
      cpu_seconds: CPU time of that process.
      replay: what the replay found; None where there was none.
    """

    end: End
    code: int
    seconds: float
    cpu_seconds: float
    replay: Finding | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        replay = None if data["replay"] is None else Finding(data["replay"])
        return cls(End(data["end"]), data["code"], data["seconds"], data["cpu_seconds"], replay)


# --------------------------------------------------------------------- between trainer and zygote


def send(
    sock: socket.socket,
    control: dict[str, Any],
    claim: bytes | memoryview = b"",
    pixels: bytes | memoryview = b"",
) -> None:
    """Sends one frame; raises OSError when the peer is gone. Claim and pixels are not copied."""
    head = json.dumps(control).encode()
    sock.sendall(_HEADER.pack(len(head), len(claim), len(pixels)) + head)
    for part in (claim, pixels):
        if len(part):
            sock.sendall(part)


def receive(
    sock: socket.socket, max_claim: int = 0, max_pixels: int = 0
) -> tuple[dict[str, Any], bytes, bytes]:
    """Receives one frame: control, claim, pixels.

    Raises:
      EOFError: the peer is gone.
      ValueError: the frame is over its limits.
      OSError: the socket's time-out passed.
    """
    frame = receive_frame(sock.recv_into, (MAX_CONTROL_BYTES, max_claim, max_pixels))
    return json.loads(frame.control), frame.claim, frame.pixels


class Frame(NamedTuple):
    """A frame as it came; nothing of it was looked at but its lengths."""

    control: bytes
    claim: bytes
    pixels: bytes

    def head(self) -> bytes:
        """The three lengths, as they are sent."""
        return _HEADER.pack(*map(len, self))


def receive_frame(receive_into: Callable[[memoryview], int], most: tuple[int, int, int]) -> Frame:
    """Receives one frame and parses nothing.

    Args:
      receive_into: puts what there is into a buffer; how much it was, 0 at the end of the stream.
      most: the largest lengths of the three parts.

    Raises:
      EOFError, ValueError: as for `receive`.
    """
    lengths = _HEADER.unpack(exactly(receive_into, _HEADER.size))
    if any(length > bound for length, bound in zip(lengths, most, strict=True)):
        raise ValueError(f"frame of {lengths} bytes is over the limit")
    return Frame(*(exactly(receive_into, length) for length in lengths))


def exactly(receive_into: Callable[[memoryview], int], length: int) -> bytes:
    """So many bytes; raises EOFError where the stream ends before."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    done = 0
    while done < length:
        count = receive_into(view[done:])
        if count == 0:
            raise EOFError("the other process is gone")
        done += count
    return bytes(buffer)


# ------------------------------------------------------------------------ between child and zygote


def write_result(
    descriptor: int, claim: bytes, pixels: bytes, display: Callable[[], bytes] = bytes
) -> None:
    """What a child sends of its script.

    Claim and pixels come first and cannot be taken back. Then the zygote says whether it wants the
    display list, and only then is it made: no script knows before.
    """
    _write(descriptor, _RESULT.pack(len(claim), len(pixels)), claim, pixels)
    if pixels and os.read(descriptor, 1) == WANTED:
        _write(descriptor, display())


def _write(descriptor: int, *parts: bytes) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[os.write(descriptor, view) :]


class Intake:
    """What a zygote reads of a child, part by part, in memory that does not outlive it.

    Every later child is a copy of the zygote: what an earlier script has sent, lines of its code
    among it, must not be there. `forget` gives the memory back to the system, which is as good as
    writing zeros over it.
    """

    def __init__(self, max_pixels: int, max_display: int):
        """The bounds of a result: `max_pixels` of four bytes, and bytes of a display list."""
        self._max_pixels, self._max_display = 4 * max_pixels, max_display
        size = _RESULT.size + MAX_CLAIM_BYTES + self._max_pixels + max_display + 1
        # private: a child has a copy of it, and not the memory itself
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self._length = 0

    def read(self, connection: socket.socket) -> bool:
        """Reads what is there without waiting; False at the end of the stream.

        Stops as soon as the result `is_too_long`. A child that is gone without having read the
        answer to its claim resets the stream, which ends it too.
        """
        try:
            while not self.is_too_long():
                space = self._view[self._length : self._bound() + 1]
                count = connection.recv_into(space, 0, socket.MSG_DONTWAIT)
                if not count:
                    return False
                self._length += count
        except BlockingIOError:
            pass
        except ConnectionResetError:
            return False
        return True

    def is_too_long(self) -> bool:
        """Whether a part of what came so far, or its length, is over its bound."""
        if self._length < _RESULT.size:
            return False
        claim, pixels = self._lengths()
        too_long = claim > MAX_CLAIM_BYTES or pixels > self._max_pixels
        return too_long or self._length > self._bound()

    def has_claim(self) -> bool:
        """Whether all of claim and pixels is there, and the child waits for an answer."""
        if self._length < _RESULT.size:
            return False
        claim, pixels = self._lengths()
        return pixels > 0 and self._length >= _RESULT.size + claim + pixels

    def parts(self) -> tuple[memoryview, memoryview, memoryview]:
        """Claim, pixels and display list; all empty when the lengths do not fit."""
        nothing = memoryview(b"")
        if self._length < _RESULT.size or self.is_too_long():
            return nothing, nothing, nothing
        claim, pixels = self._lengths()
        first = _RESULT.size + claim
        if self._length < first + pixels:
            return nothing, nothing, nothing
        view = self._view[: self._length]
        return view[_RESULT.size : first], view[first : first + pixels], view[first + pixels :]

    def forget(self) -> None:
        """Makes room for the next result."""
        self._memory.madvise(mmap.MADV_DONTNEED)
        self._length = 0

    def _lengths(self) -> tuple[int, int]:
        claim, pixels = _RESULT.unpack_from(self._view)
        return claim, pixels

    def _bound(self) -> int:
        """Where the next part must end; past the lengths only when they are known."""
        if self._length < _RESULT.size:
            return _RESULT.size - 1
        return _RESULT.size + sum(self._lengths()) + self._max_display

"""What one run of a script gives back, and how the claims of an untrusted process become it.

The process that ran the script is the script's own: whatever it says about itself is a *claim*. Two
things are not claims: how the process ended (the zygote's `wait4`) and that a message is well
formed (checked here). `decode` turns both into an `Execution`; it parses JSON and copies raw
pixels, nothing else, and never raises on what a hostile process may send.
"""

import dataclasses
import enum
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_CLAIM_BYTES = 1 << 20  # JSON of one result
_MAX_ENTRIES = 5_000  # of each list in a record
_MAX_TEXT = 2_000  # characters of one recorded text
_FOUND, _UNDECIDED = {1: "hidden_text", 2: "forged"}, 64  # of a replay (`display_list.check`)


class Status(enum.StrEnum):
    """How an execution ended."""

    OK = "ok"  # a figure was drawn
    ERROR = "error"  # the script raised, or its figure is too large
    TIMEOUT = "timeout"  # killed at the wall-clock or CPU limit
    KILLED = "killed"  # ended by a signal, by a memory or file limit, or without a result
    NO_FIGURE = "no_figure"  # ran to its end and drew nothing
    NO_CODE = "no_code"  # the response holds no code


@dataclasses.dataclass(frozen=True)
class Record:
    """What the script drew, as ChartMimic's low-level metrics see it.

    Attributes:
      texts: every text drawn, one entry a line, with repeats.
      layout: one (nrows, ncols, row_start, row_end, col_start, col_end) for each axes on a grid,
        zero-based and inclusive.
      types: calls of each hooked drawing function.
      colors: sorted distinct strings "<file>/<function>--<color>".
    """

    texts: tuple[str, ...] = ()
    layout: tuple[tuple[int, int, int, int, int, int], ...] = ()
    types: Mapping[str, int] = dataclasses.field(default_factory=dict)
    colors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "texts": list(self.texts),
            "layout": [list(row) for row in self.layout],
            "types": dict(self.types),
            "colors": list(self.colors),
        }

    @classmethod
    def from_json(cls, data: Any) -> "Record":
        """Validates and builds a record. `data` may be hostile: raises ValueError on anything but
        plain, bounded data.
        """
        if not isinstance(data, dict) or set(data) != {"texts", "layout", "types", "colors"}:
            raise ValueError(
                "a record is an object with exactly the fields texts, layout, types, colors"
            )
        for name, kind in (("texts", list), ("layout", list), ("types", dict), ("colors", list)):
            if not isinstance(data[name], kind) or len(data[name]) > _MAX_ENTRIES:
                raise ValueError(
                    f"record field {name} is not a {kind.__name__} of at most {_MAX_ENTRIES} entries"
                )
        for text in (*data["texts"], *data["colors"], *data["types"]):
            if not isinstance(text, str) or len(text) > _MAX_TEXT:
                raise ValueError(
                    f"a record's texts, colors and type names are strings of at most {_MAX_TEXT} characters"
                )
        for row in data["layout"]:
            if (
                not isinstance(row, list)
                or len(row) != 6
                or not all(_is_count(value) for value in row)
            ):
                raise ValueError(f"a layout entry is six counts, not {str(row)[:80]}")
        if not all(_is_count(value) for value in data["types"].values()):
            raise ValueError("a record's types are counts")
        return cls(
            texts=tuple(data["texts"]),
            layout=tuple(tuple(row) for row in data["layout"]),
            types=dict(data["types"]),
            colors=tuple(sorted(set(data["colors"]))),
        )


@dataclasses.dataclass(frozen=True)
class Execution:
    """The result of one script.

    Attributes:
      status: how it ended.
      image: uint8 [H, W, 3], read-only, on white where the figure was transparent; None unless the
        status is OK and pixels were asked for.
      error: feedback text for the model, "" when ok; at most `EnvConfig.feedback_chars` characters.
      record: what was drawn; None where there is none.
      seconds: wall time from fork to the end of the process.
      cpu_seconds: CPU time of that process.
      flags: "tamper" when the script changed matplotlib or the recorder; from a replay,
        "hidden_text" when the record claims texts that cannot be seen, "forged" when picture or
        record do not follow from what was drawn.
      replay: "done" when the display list was replayed, "undecided" when it could not be, "" when
        it was not asked for.
    """

    status: Status
    image: np.ndarray | None = None
    error: str = ""
    record: Record | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flags: tuple[str, ...] = ()
    replay: str = ""

    @property
    def ok(self) -> bool:
        return self.status == Status.OK


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """How scripts are run.

    Attributes:
      workers: zygotes, each running one script at a time; by default one per core but the trainer's.
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
      replay_share: share of the executions whose display list is drawn again, to find texts that
        are recorded but cannot be seen. Which ones depends on their code.
      sandbox: "auto" contains scripts or refuses to start; "unsafe" runs them with this user's
        rights. (`confinement.LAYERS` has two more, for looking at one layer alone.)
      bubblewrap: also put the executors into bubblewrap, where it is installed and works.
      landlock_abi: use no newer Landlock ABI than this, as on an older kernel; None: what the
        kernel has.
    """

    workers: int = dataclasses.field(default_factory=lambda: max(1, (os.cpu_count() or 2) - 1))
    dpi: int = 100
    rc_params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wall_seconds: float = 30.0
    cpu_seconds: float = 15.0
    memory_mb: int = 2048
    max_pixels: int = 4_000_000
    preload: tuple[str, ...] = (
        "numpy",
        "matplotlib",
        "pandas",
        "seaborn",
        "scipy",
        "networkx",
        "squarify",
        "matplotlib_venn",
    )
    cache_size: int = 4096
    cache_mb: int = 512
    partial: bool = False
    feedback_chars: int = 1200
    replay_share: float = 0.05
    sandbox: str = "auto"
    bubblewrap: bool = True
    landlock_abi: int | None = None


def decode(outcome: Mapping[str, Any], claim: bytes, pixels: bytes, config: EnvConfig) -> Execution:
    """Builds an `Execution` from the zygote's `outcome` and from what the script's process sent.

    Args:
      outcome: trusted: "end" ("exit", "signal", "wall", "disk"), "code" (exit status or signal),
        "seconds", "cpu_seconds", and "replay" (what `display_list.check` found) where there was
        one.
      claim: untrusted JSON, may be empty or garbage.
      pixels: untrusted RGBA bytes, row by row from the top.
    """
    seconds = {"seconds": outcome["seconds"], "cpu_seconds": outcome["cpu_seconds"]}
    end, code = outcome["end"], outcome["code"]
    if end == "wall":
        return Execution(
            Status.TIMEOUT,
            error=f"The script was stopped: it ran longer than {config.wall_seconds:g} seconds.",
            **seconds,
        )
    if end == "disk":
        return Execution(
            Status.KILLED,
            error="The script was stopped: it wrote too many or too large files.",
            **seconds,
        )
    if end == "signal":
        if code == signal.SIGXCPU or outcome["cpu_seconds"] >= config.cpu_seconds:
            error = f"The script was stopped: it used more than {config.cpu_seconds:g} seconds of CPU time."
            return Execution(Status.TIMEOUT, error=error, **seconds)
        if code == signal.SIGXFSZ:
            return Execution(
                Status.KILLED,
                error="The script was stopped: it wrote too many or too large files.",
                **seconds,
            )
        return Execution(
            Status.KILLED, error=f"The script was killed by {_signal_name(code)}.", **seconds
        )
    try:
        status, error, record, flags = _read_claim(claim)
        image = _read_pixels(claim, pixels, config.max_pixels) if status == Status.OK else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return Execution(
            Status.KILLED, error="The script ended its process before it gave a result.", **seconds
        )
    if status == Status.KILLED:
        error = f"The script was stopped: it needed more than {config.memory_mb} MB of memory."
    elif status == Status.NO_FIGURE:
        error = "The script ran to its end but made no figure."
    replay = ""
    if status == Status.OK and "replay" in outcome:
        replay = "undecided" if outcome["replay"] == _UNDECIDED else "done"
        flags += tuple(name for bit, name in _FOUND.items() if outcome["replay"] & bit)
    return Execution(
        status,
        image,
        clean_text(error, config.feedback_chars),
        record,
        flags=flags,
        replay=replay,
        **seconds,
    )


def clean_text(text: str, limit: int) -> str:
    """`text` without host paths, control characters and lone surrogates, cut to `limit` characters
    with its end kept.
    """
    text = _HOST_PATHS.sub("", text)
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    return text if len(text) <= limit else "…" + text[len(text) - limit + 1 :]


def _read_claim(claim: bytes) -> tuple[Status, str, Record | None, tuple[str, ...]]:
    data = json.loads(claim, parse_constant=_no_constant)
    status = Status(data["status"])
    if status in (Status.TIMEOUT, Status.NO_CODE):
        raise ValueError("a process cannot claim this status")
    error, flags = data["error"], data["flags"]
    if not isinstance(error, str) or not isinstance(flags, list) or not set(flags) <= {"tamper"}:
        raise ValueError("bad error or flags")
    if status != Status.OK and not error and status == Status.ERROR:
        raise ValueError("an error needs a text")
    record = None if data["record"] is None else Record.from_json(data["record"])
    return status, "" if status == Status.OK else error, record, tuple(flags)


def _read_pixels(claim: bytes, pixels: bytes, max_pixels: int) -> np.ndarray | None:
    size = json.loads(claim)["size"]
    if size is None:
        return None
    width, height = size
    if (
        not _is_count(width)
        or not _is_count(height)
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


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not data")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _host_paths() -> re.Pattern[str]:
    """Matches the directories of this host's Python, its packages and temporary files, longest
    first.
    """
    roots = {
        sys.prefix,
        sys.base_prefix,
        sys.exec_prefix,
        *(path for path in sys.path if path.startswith("/")),
    }
    paths = sorted(
        (root.rstrip("/") + "/" for root in roots if len(root) > 1), key=len, reverse=True
    )
    return re.compile("|".join([*map(re.escape, paths), r"/[^\s'\"]*?/site-packages/"]))


_HOST_PATHS = _host_paths()

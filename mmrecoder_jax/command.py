"""How every command ends: an error that a user can cause is one line, without a traceback.

    error: --workdir='gs://bucket/run': a local path is needed; ...

`explain` is the one place that knows those errors; anything else is a bug of ours and keeps its
traceback. `--traceback`, a flag of every command, shows it for the others too. The exit status is 1
(130 after Ctrl-C, 75 where SIGTERM ended a training command). Nothing here starts JAX: the commands
that score and import need none.
"""

import argparse
import contextlib
import difflib
import errno
import inspect
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from mmrecoder_jax import places
from mmrecoder_jax.config import ConfigError, Preempted
from mmrecoder_jax.data.rows import RowError
from mmrecoder_jax.data.survey import TooManyBadRows
from mmrecoder_jax.env.channel import SecretError
from mmrecoder_jax.env.interpreter import InterpreterError
from mmrecoder_jax.env.local import ExecutorError
from mmrecoder_jax.env.remote import HostsError
from mmrecoder_jax.env.sandbox.confinement import SandboxUnavailable
from mmrecoder_jax.env.sandbox.syscalls import UnsupportedMachine
from mmrecoder_jax.images import BadImage
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.rl.judge.base import JudgeDown
from mmrecoder_jax.rl.web import ServerDown

# Their messages are written for users: the value and the remedy are in them.
_OURS = (
    *(ConfigError, CheckpointError, RowError, TooManyBadRows, BadImage),
    *(SandboxUnavailable, UnsupportedMachine, InterpreterError, ExecutorError),
    *(HostsError, SecretError),
    *(JudgeDown, ServerDown),
)
_ANOTHER_PLACE = "name another path, or move what is there"
_RIGHTS = "name a place that this user may use, or change its rights"
_SPACE = "free space and give the same command again: what is written whole is kept"
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.EISDIR: _ANOTHER_PLACE,
    errno.ENOTDIR: _ANOTHER_PLACE,
    errno.EEXIST: _ANOTHER_PLACE,
    errno.ENOTEMPTY: _ANOTHER_PLACE,
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "a link leads back to itself",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.EADDRINUSE: "another process uses this port: end it, or choose another port",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUTPUTS = ("workdir", "out", "jsonl")  # flags that say where a command writes
_LIBRARIES_OF_CHECKPOINTS = ("orbax", "tensorstore")
_DEVICE_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_LONGEST = 2000  # characters of an error


def explain(error: BaseException) -> str | None:
    """What a user reads of an error that a user can cause, in one line; None for any other."""
    reason: BaseException | None = error
    while reason is not None:
        text = _explain_one(reason)
        if text is not None:
            return _one_line(places.shown(text))
        reason = reason.__cause__
    return None


def _explain_one(error: BaseException) -> str | None:
    if isinstance(error, _OURS):
        return str(error)
    if type(error).__name__ in _DEVICE_ERRORS:
        return _of_the_device(str(error))
    if _is_of_a_checkpoint(error):
        return (
            f"a checkpoint cannot be read or written ({error}): free space where the disk is full; "
            "where files are damaged, move its step directory (checkpoints/<step>) away"
        )
    if isinstance(error, places.errors()):
        return places.reason(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, MemoryError):
        return f"the memory of this machine does not suffice ({error}): use smaller batches"
    return None


def _of_the_system(error: OSError) -> str:
    if error.errno is None or error.strerror is None:  # raised by us, or by a library in words
        return str(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if not names and error.errno in _NO_ROOM:  # a write does not know the name of its file
        names = _outputs(sys.argv)
    where = " -> ".join(names) + ": " if names else ""
    remedy = _REMEDIES.get(error.errno)
    return f"{where}{error.strerror}" + (f": {remedy}" if remedy else "")


def _outputs(argv: Sequence[str]) -> list[str]:
    """Where a command line says that the command writes: `--workdir=runs/a`."""
    found = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, given, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name in _OUTPUTS:
            found.append(f"--{name}={value if given else following}")
    return found


def _of_the_device(text: str) -> str | None:
    if "RESOURCE_EXHAUSTED" in text:
        return (
            f"the memory of a device does not suffice ({text}): lower train.micro_batch_size, "
            "rl.rollout_prompts or eval.batch_size; `python -m mmrecoder_jax.memory` says what fits"
        )
    if "already in use" in text:
        return f"{text}: {_REMEDIES[errno.EADDRINUSE]}"
    return None


def _is_of_a_checkpoint(error: BaseException) -> bool:
    """Whether the libraries that read and write checkpoints raised an error about their files."""
    if not isinstance(error, ValueError | OSError | RuntimeError | KeyError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(_package(frame) in _LIBRARIES_OF_CHECKPOINTS for frame in frames)


def _package(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines)[:_LONGEST]


@contextlib.contextmanager
def ending_in_one_line(show_traceback: bool = False) -> Iterator[None]:
    """Around all that a command does: ends the process with one line where `explain` has one.

    Args:
      show_traceback: leaves every error as it is.
    """
    try:
        yield
    except KeyboardInterrupt:
        if show_traceback:
            raise
        print("error: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except Preempted as notice:
        print(f"preempted: {places.shown(str(notice))}", file=sys.stderr)
        sys.exit(notice.status)
    except Exception as error:
        text = None if show_traceback else explain(error)
        if text is None:
            raise
        sys.exit(f"error: {text}")


# ---------------------------------------------------------------- commands with absl's flags


def run_with_flags(
    main: Callable[[], None],
    example: str,
    parse: Callable[[list[str]], list[str]] | None = None,
) -> NoReturn:
    """Runs a command that reads absl flags; does not return.

    Args:
      main: everything the command does.
      example: a flag, for who writes a word that is none.
      parse: parses the arguments, as `app.run` wants it; `parse_flags` by default.
    """
    shown = flags.DEFINE_bool(
        "traceback", False, "Shows the traceback of every error, not of our own bugs alone."
    )

    def start(argv: list[str]) -> None:
        if not shown.value:
            quiet()
        with ending_in_one_line(shown.value):
            check_arguments(argv, example)
            main()

    app.run(start, flags_parser=parse or parse_flags)
    raise AssertionError("app.run ends the process")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, whose errors are one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {_one_line(about_missing(str(error)))}")


def about_missing(message: str) -> str:
    """What absl says of flags, where one that must be given is not: "give" it, and what it is."""

    def said(match: re.Match[str]) -> str:
        return f"give --{match[1]}: {(flags.FLAGS[match[1]].help or '').strip().rstrip('.')}"

    missing = r"^flags? [^:]*: Flag --([\w.]+) must have a value other than None\.$"
    return re.sub(missing, said, message, flags=re.MULTILINE)


def check_arguments(argv: list[str], example: str) -> None:
    """Raises ConfigError for words that are not flags."""
    if len(argv) > 1:
        raise ConfigError(
            f"unexpected argument {argv[1]!r}: every setting is a flag, e.g. {example}"
        )


def quiet() -> None:
    """Keeps what libraries report of their work out of a command's output.

    Their errors too: where they matter, they are raised as well, and become our one line.
    """
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = _uncatchable


def _uncatchable(problem: Any) -> None:
    """Prints an error that nobody can catch, as Python does, but for what libraries leave behind.

    A save that failed leaves tensorstore's threads, each of which says that its event loop is
    closed. Of a checkpoint whose arrays are damaged orbax raises the first array's error; the
    coroutines of the others end unheard.
    """
    closed = str(problem.exc_value) == "Event loop is closed"
    if not closed and not inspect.iscoroutine(problem.object):
        sys.__unraisablehook__(problem)


# ---------------------------------------------------------------- commands with argparse


class Parser(argparse.ArgumentParser):
    """An argument parser with `--traceback`, whose errors are one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.add_argument(
            "--traceback",
            action="store_true",
            help="show the traceback of every error, not of our own bugs alone",
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Words that are no flags are answered with the nearest flag."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            name = rest[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        sys.exit(f"error: {message}; --help lists the flags")

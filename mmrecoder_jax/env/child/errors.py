"""What a script's exception looks like to the model that wrote the script.

The text is the same in whichever executor the script ran: what differs from process to process
(addresses, names of temporary files) is left out. A failure that is the sandbox's doing is named as
what it means to the script: "[Errno 1] Operation not permitted" teaches nothing.
"""

import errno
import io
import os
import re
import socket
import sys
import traceback
from types import CodeType, TracebackType

from mmrecoder_jax.env.child.main_module import SCRIPT_NAME

_SHOWN_FRAMES = 3
_LONGEST_CHAIN = 20  # of exceptions that led to one another
_LAST_WORDS = 600  # characters of what is written to stderr
_NO_NETWORK = "There is no network here: the script must hold its data."
_NO_LATEX = "There is no LaTeX here: leave text.usetex off, mathtext draws formulas."
_NO_SCREEN = "There is no screen here: draw with matplotlib and save or show the figure."
_NO_PROCESS = "No other program or process can be started here."
_NO_ACCESS = "No file outside the script's own folder can be used here."
_NO_FILE = "There is no file or folder here but what the script makes: it must hold its data."
# what lies behind an error, by a module of its traceback, the first that fits
_BEHIND = (
    (socket.__file__, _NO_NETWORK),
    (os.path.join("matplotlib", "texmanager.py"), _NO_LATEX),
    (os.path.join("matplotlib", "dviread.py"), _NO_LATEX),
    (os.path.join("matplotlib", "backends", "backend_pgf.py"), _NO_LATEX),
    (os.path.join("tkinter", "__init__.py"), _NO_SCREEN),
    ("subprocess.py", _NO_PROCESS),
    (os.path.join("multiprocessing", "synchronize.py"), _NO_PROCESS),
)
# Of one process: addresses of objects, names that the module `tempfile` makes up.
_ADDRESS = re.compile(r"\b0x[0-9a-f]{9,16}\b")
_TEMPORARY = re.compile(r"\btmp[a-z0-9_]{8}\b")


class LastWords(io.TextIOWrapper):
    """The script's `sys.stderr`: writes to descriptor 2 and keeps the end of it.

    A program that is used wrongly says how on stderr and exits with a number.
    """

    def __init__(self) -> None:
        raw = io.FileIO(2, "wb", closefd=False)
        super().__init__(io.BufferedWriter(raw), "utf-8", "replace", line_buffering=True)
        self.text = ""

    def write(self, text: str) -> int:
        self.text = (self.text + text)[-_LAST_WORDS:]
        return super().write(text)


def keep_last_words() -> LastWords:
    """Replaces `sys.stderr` in the child, before the script runs."""
    words = LastWords()
    sys.stderr = words
    return words


def describe(problem: BaseException, code: str, last_words: str = "") -> str:
    """The script's own lines, innermost last, then the type and the message of its exception.

    line 5, in <module>: draw(ax)
    line 3, in draw: ax.plot(x, colour='red')
    AttributeError: Line2D.set() got an unexpected keyword argument 'colour'

    Args:
      problem: what the script raised.
      code: of the script.
      last_words: the end of what it wrote to stderr, shown where it exited with a number.
    """
    lines = code.splitlines()
    shown = []
    for frame, number in _own_frames(problem.__traceback__):
        source = lines[number - 1].strip()[:200] if number <= len(lines) else ""
        shown.append(f"line {number}, in {frame.co_name}: {source}")
    try:
        message = "".join(traceback.format_exception_only(type(problem), problem)).strip()
    except BaseException:  # a script may write an exception whose `__str__` raises
        message = "an error whose message cannot be shown"
    message = message.replace(f'File "{SCRIPT_NAME}", ', "")
    message = _TEMPORARY.sub("tmp…", _ADDRESS.sub("0x…", message))
    if len(message) > 800:
        message = message[:400] + " … " + message[-390:]
    if isinstance(problem, SystemExit) and isinstance(problem.code, int) and last_words.strip():
        message += f"\n{last_words.strip()}"
    reason = _reason(problem)
    if reason == _NO_SCREEN:  # what follows are folders of the host
        message = message.partition("\n")[0]
    if reason:
        message += f"\n{reason}"
    return "\n".join([*shown[-_SHOWN_FRAMES:], message])


def _reason(problem: BaseException) -> str:
    """What an exception means here, by it or by what led to it; "" for an ordinary one."""
    for _ in range(_LONGEST_CHAIN):  # a script may make a circle
        if reason := _reason_of_one(problem):
            return reason
        before = problem.__cause__ or problem.__context__
        if before is None:
            return ""
        problem = before
    return ""


def _reason_of_one(problem: BaseException) -> str:
    modules = _modules(problem.__traceback__)
    for module, reason in _BEHIND:
        if any(name.endswith(module) for name in modules):
            return reason
    if not isinstance(problem, OSError) or not modules:
        return ""
    raised_by_script = problem.errno is None and modules[-1] == SCRIPT_NAME
    if isinstance(problem, FileNotFoundError) and not raised_by_script:
        return _NO_FILE
    if isinstance(problem, PermissionError) and problem.errno is not None:
        if problem.filename is not None:
            return _NO_ACCESS
        # refused by the filter of system calls
        return f"{_NO_PROCESS} There is no network." if problem.errno == errno.EPERM else ""
    return ""


def _modules(trace: TracebackType | None) -> list[str]:
    """The files of the functions that an exception passed, the innermost last."""
    names = []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return names


def _own_frames(trace: TracebackType | None) -> list[tuple[CodeType, int]]:
    frames = []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == SCRIPT_NAME:
            frames.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return frames

"""What a script's exception looks like to the model that wrote the script."""

import socket
import traceback
from types import CodeType, TracebackType

from mmrecoder_jax.env.child.main_module import SCRIPT_NAME

_SHOWN_FRAMES = 3
_LONGEST_CHAIN = 20  # of exceptions that led to one another
_NO_NETWORK = "\nThere is no network here: the script must hold its data."


def describe(problem: BaseException, code: str) -> str:
    """The script's own lines, innermost last, then the type and the message of its exception.

    line 5, in <module>: draw(ax)
    line 3, in draw: ax.plot(x, colour='red')
    AttributeError: Line2D.set() got an unexpected keyword argument 'colour'

    An error of the network says that there is none: "Operation not permitted" would not.
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
    if len(message) > 800:
        message = message[:400] + " … " + message[-390:]
    if _is_of_the_network(problem):
        message += _NO_NETWORK
    return "\n".join([*shown[-_SHOWN_FRAMES:], message])


def _is_of_the_network(problem: BaseException) -> bool:
    """Whether the exception, or what led to it, was raised by Python's sockets."""
    for _ in range(_LONGEST_CHAIN):  # a script may make a circle
        trace = problem.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and trace.tb_frame.f_code.co_filename == socket.__file__:
            return True
        before = problem.__cause__ or problem.__context__
        if before is None:
            return False
        problem = before
    return False


def _own_frames(trace: TracebackType | None) -> list[tuple[CodeType, int]]:
    frames = []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == SCRIPT_NAME:
            frames.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return frames

"""What a script's exception looks like to the model that wrote the script."""

import traceback
from types import CodeType, TracebackType

SCRIPT_NAME = "script.py"  # the file that a script is compiled as
_SHOWN_FRAMES = 3


def describe(problem: BaseException, code: str) -> str:
    """The script's own lines, innermost last, then the type and the message of its exception.

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
    except BaseException:  # a script may write an exception whose `__str__` raises
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

"""What the process of a script does between its confinement and its end.

It runs the script, describes what came of it, and sends the description (the claim), the pixels and
the display list to the zygote. From the moment the script runs, this process is the script's own.
"""

import contextlib
import json

from mmrecoder_jax.env import wire
from mmrecoder_jax.env.child import (
    capture,
    chart2code_recorder,
    chartmimic_recorder,
    integrity,
    plot2code_recorder,
)
from mmrecoder_jax.env.child.errors import describe, keep_last_words
from mmrecoder_jax.env.child.main_module import become_main
from mmrecoder_jax.env.wire import Flag, RecordKind, Request, Status

_PLOT2CODE = (RecordKind.PLOT2CODE, RecordKind.PLOT2CODE_TARGET)
_MAX_ERROR = 1000  # characters of an error that no model reads


def work(
    out: int,
    request: Request,
    captured: capture.Capture,
    untouched: integrity.Snapshot,
    partial: bool,
) -> None:
    """Everything the child does, in order.

    Args:
      out: the descriptor that the result goes to.
      captured: the zygote's own, installed before the fork.
      untouched: matplotlib and the recorder as they were before the fork.
      partial: also send the record of a script that raised.
    """
    if request.kind != RecordKind.TRAINING:
        wire.write_result(out, _run_for_benchmark(request), b"")
        return
    claim, pixels = _run_for_training(captured, untouched, request.code, partial)
    wire.write_result(out, claim, pixels, captured.display)


def _run_for_training(
    captured: capture.Capture, untouched: integrity.Snapshot, code: str, partial: bool
) -> tuple[bytes, bytes]:
    """The claim and the pixels."""
    status, error = Status.OK, ""
    words = keep_last_words()
    try:
        compiled, names = become_main(code)
        captured.start(compiled)
        try:
            exec(compiled, names)
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
        captured.finish()
    except MemoryError:
        status = Status.KILLED
    except capture.NoFigure:
        status = Status.NO_FIGURE
    except BaseException as problem:
        status, error = Status.ERROR, describe(problem, code, words.text)
        if partial:
            with contextlib.suppress(BaseException):
                captured.finish()
    size = captured.size if status == Status.OK else None
    record = captured.record if status == Status.OK or partial else None
    flags = [Flag.TAMPER] if integrity.changed(untouched) else []
    claim = json.dumps(
        {"status": status, "error": error, "record": record, "size": size, "flags": flags}
    ).encode()
    return claim[: wire.MAX_CLAIM_BYTES], captured.pixels if size else b""


def _run_for_benchmark(request: Request) -> bytes:
    """The claim of a script that ran as a benchmark's own evaluator runs it."""
    if request.kind == RecordKind.CHART2CODE:
        error, record = chart2code_recorder.run(request.code)
    elif request.kind in _PLOT2CODE:
        error, record = plot2code_recorder.run(request.code, request.kind)
    else:
        error, record = chartmimic_recorder.run(request.code, request.kind)
    status = Status.ERROR if error else Status.OK
    return json.dumps(
        {"status": status, "error": error[:_MAX_ERROR], "record": record, "size": None, "flags": []}
    ).encode()

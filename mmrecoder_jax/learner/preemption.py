"""SIGTERM: the notice that a machine is about to be taken away.

    a stage trains        the step goes on to its end, a checkpoint is saved, `Preempted` is raised
    anything else runs    `Preempted` is raised at once: there is nothing to save
    a second SIGTERM, or `checkpoint.grace_seconds` without the end of a step
                          the process ends, with 143

The notice of one host is that of all (`is_asked`). A thread counts the seconds, which also runs
while the main thread is inside a compilation. Whoever starts the command again goes on from the
checkpoint; `Preempted.status` tells that from a failure.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import numpy as np

from mmrecoder_jax.config import KILLED, Preempted
from mmrecoder_jax.learner import distributed

GRACE_SECONDS = 25.0  # where nobody says otherwise: clouds give 30 before they pull the plug


class _Notice:
    """What this process was told."""

    def __init__(self) -> None:
        self.asked = False
        self.stages = 0  # that train


_notice = _Notice()


def listen(grace_seconds: float = GRACE_SECONDS) -> None:
    """From here on SIGTERM is a notice. Called by the main thread, once a process.

    Args:
      grace_seconds: from the notice to the end of the process at the latest.
    """
    # Python's own handler waits for the main thread; a byte arrives at once.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGTERM, _told)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reading, grace_seconds), name="preemption")
    watch.daemon = True
    watch.start()


def _watch(reading: int, grace_seconds: float) -> None:
    """Ends the process where the notice is not followed in time, or given twice."""
    told = False
    while number := os.read(reading, 1):
        if number[0] != signal.SIGTERM:
            continue
        if told:
            os._exit(KILLED)
        told = True
        timer = threading.Timer(grace_seconds, os._exit, [KILLED])
        timer.daemon = True
        timer.start()


def _told(number: int, frame: FrameType | None) -> None:
    _notice.asked = True
    if not _notice.stages:
        raise Preempted("the same command goes on where it stopped")


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Around a stage that asks `is_asked` after every step.

    Raises:
      Preempted: the notice came after the last step, while its checkpoint was written.
    """
    _notice.stages += 1
    try:
        yield
    finally:
        _notice.stages -= 1
    if is_asked():
        raise Preempted("the same command goes on behind this stage")


def is_asked() -> bool:
    """Whether a host was told to end; all hosts ask together, after the same step."""
    return bool(distributed.global_max(np.array([_notice.asked]))[0])

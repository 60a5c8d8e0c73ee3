"""A trace of some steps of a stage, for https://ui.perfetto.dev: the flag `--profile` of `train`.

    <workdir>/profile/plugins/profile/<time>/perfetto_trace.json.gz

The phases of `progress.Progress` are named slices of the trace. Only the main process writes one.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import jax

from mmrecoder_jax.config import ConfigError

_wanted: tuple[int, int] | None = None  # first and last step


def want(steps: str) -> None:
    """From now on, stages of this process write a trace of these steps.

    Args:
      steps: "3", "3-4", or "" for none.

    Raises:
      ConfigError: something else.
    """
    global _wanted
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", steps, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if steps and not 1 <= first <= last:
        raise ConfigError(
            f"--profile={steps}: use a step, such as 3, or the first and the last of some, such as "
            "3-4; steps count from 1"
        )
    _wanted = (first, last) if steps else None


class Profile:
    """Writes the trace of the steps that are wanted; a context manager.

    Args:
      workdir: of the stage.
      active: whether this process writes one.
    """

    def __init__(self, workdir: str, active: bool):
        self._directory = os.path.join(workdir, "profile")
        self._steps = _wanted if active else None
        self._running: tuple[int, int] | None = None  # first and last step in the trace

    def annotate(self, name: str) -> contextlib.AbstractContextManager[object]:
        """Names what happens inside; costs nothing where no trace is wanted."""
        if self._steps is None:
            return contextlib.nullcontext()
        return jax.profiler.TraceAnnotation(name)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around everything that one step does."""
        if self._steps is None:
            yield
            return
        first, last = self._steps
        if first <= step <= last:
            if self._running is None:
                # Python's own calls would make the trace large and the steps slow.
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                jax.profiler.start_trace(
                    self._directory, create_perfetto_trace=True, profiler_options=options
                )
            self._running = (self._running or (step, step))[0], step
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            yield
        if step == last:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, problem: object, *_: object) -> None:
        self._stop()
        if self._steps is not None and problem is None:
            print(f"no trace of {_named(*self._steps)}: the run took none of them", flush=True)

    def _stop(self) -> None:
        """Writes the trace where one is under way."""
        if self._running is None:
            return
        jax.profiler.stop_trace()
        traces = Path(self._directory).glob("plugins/profile/*/perfetto_trace.json.gz")
        newest = max(traces, key=lambda path: path.stat().st_mtime)
        print(f"trace of {_named(*self._running)}: {newest}", flush=True)
        self._steps = self._running = None


def _named(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first}-{last}"

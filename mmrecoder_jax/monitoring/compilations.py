"""What JAX compiles while a stage runs, for metrics.jsonl.

    compiles/<phase>    programs that XLA compiled while this phase was open, on any thread
    compiles/seconds    what that took; programs that are compiled side by side are added up
    compiles/cached     programs that were read from the persistent cache instead

A program is compiled for each new shape. After the first steps none should be: one that is costs
more than the step it belongs to.
"""

import collections
import threading
from collections.abc import Callable
from typing import Any, Self

import jax.monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"  # of a program from the cache too
_CACHED = "/jax/compilation_cache/cache_hits"  # comes before the other, on the same thread


class Compilations:
    """Counts the compilations of this process while it is open; a context manager.

    Args:
      phase: names the phase that a compilation is booked on.
    """

    def __init__(self, phase: Callable[[], str]):
        self._phase = phase
        self._counts: dict[str, float] = collections.defaultdict(float)
        self._lock = threading.Lock()
        self._thread = threading.local()

    def taken(self) -> dict[str, float]:
        """The metrics above since the last call; what is zero is left out."""
        with self._lock:
            counts = {f"compiles/{name}": count for name, count in self._counts.items()}
            self._counts.clear()
        return counts

    def __enter__(self) -> Self:
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._event)
        jax.monitoring.unregister_event_duration_listener(self._duration)

    def _event(self, event: str, **_: Any) -> None:
        if event == _CACHED:
            self._thread.cached = True

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != _COMPILED:
            return
        cached = getattr(self._thread, "cached", False)
        self._thread.cached = False
        with self._lock:
            if cached:
                self._counts["cached"] += 1
            else:
                self._counts[self._phase()] += 1
                self._counts["seconds"] += duration_secs

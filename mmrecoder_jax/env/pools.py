"""Two pools: what runs an answer has never run a reference.

A script can look around in its own process, which was forked from its executor: whatever that
executor has read may still be in memory.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

from mmrecoder_jax.env.execution import EnvConfig
from mmrecoder_jax.env.pool import ExecutorPool


@dataclasses.dataclass(frozen=True)
class Pools:
    """The pool of the reference scripts and that of the answers, configured alike."""

    references: ExecutorPool
    answers: ExecutorPool

    @property
    def config(self) -> EnvConfig:
        return self.answers.config


@contextlib.contextmanager
def separate_pools(config: EnvConfig) -> Iterator[Pools]:
    """Starts both, each with `config.workers` executors; raises what `ExecutorPool` raises."""
    with ExecutorPool(config) as references, ExecutorPool(config) as answers:
        yield Pools(references, answers)

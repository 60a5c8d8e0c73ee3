"""Which split a chart of a grammar belongs to: what the hash of its code says.

So train, val and test never share a chart, whatever the seeds and the counts.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

# Percent of the hash of the code.
SPLITS = {
    "train": range(0, 90),
    "val": range(90, 95),
    "test": range(95, 100),
}


@runtime_checkable
class Spec(Protocol):
    """What one chart of a grammar shows."""

    def code(self) -> str:
        """The script, without a newline at its end."""
        ...

    def response(self) -> str:
        """The first-turn answer that is right for this chart."""
        ...


AnySpec = TypeVar("AnySpec", bound=Spec)


def split_of(code: str) -> str:
    """The split that a chart with this code belongs to: a property of the code alone."""
    bucket = int.from_bytes(hashlib.sha256(code.encode()).digest()[:4], "big") % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def first_of_split(
    draw: Callable[[random.Random], AnySpec], seed: int, index: int, split: str
) -> AnySpec:
    """Chart number `index` of a split.

    Each number has its own stream of charts, of which the first one in the split is taken.

    Raises:
      ValueError: a split that is not in `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are: {', '.join(SPLITS)}")
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        spec = draw(rng)
        if split_of(spec.code()) == split:
            return spec

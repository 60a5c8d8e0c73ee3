"""Self-correction: what a later turn did to an earlier one (arXiv 2604.01600).

Counted only over samples whose first turn executes: making a crashed script run is not
self-correction. The one home of the rule; training metrics, evaluation and report all use it.

    first turn executes    yes    yes    yes    no
    score before, after    .5 .7  .5 .5  .5 .4  .0 .9
                           improved      regressed     not counted      mean improvement +.033
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from mmrecoder_jax.env.response import extract_code

MARGIN = 1e-6  # a change of the low-level score that is smaller is rounding, not a change


def improved(before: float, after: float) -> bool:
    """Whether a score rose."""
    return bool(after - before > MARGIN)


def regressed(before: float, after: float) -> bool:
    """Whether a score fell."""
    return bool(before - after > MARGIN)


def same_code(first: str, second: str) -> bool:
    """Whether two responses contain the same code, up to surrounding blank space."""
    a, b = extract_code(first), extract_code(second)
    return a is not None and b is not None and a.strip() == b.strip()


@dataclasses.dataclass(frozen=True)
class Correction:
    """A turn against an earlier one, over the samples that count.

    Attributes:
      gains: change of the low-level score per counted sample; may be empty.
      improved, regressed, code_repeat: shares of the counted samples.
    """

    gains: Float[np.ndarray, " samples"]
    improved: float
    regressed: float
    code_repeat: float


def correction(
    executed: Bool[np.ndarray, " samples"],
    before: Float[np.ndarray, " samples"],
    after: Float[np.ndarray, " samples"],
    repeats: Bool[np.ndarray, " samples"],
) -> Correction | None:
    """Compares the scores of samples before and after.

    Args:
      executed: whether the first turn executes.
      before, after: low-level scores of the two turns.
      repeats: whether the later turn repeats code.

    Returns:
      None where no first turn executes.
    """
    if not executed.any():
        return None
    pairs = list(zip(before[executed], after[executed], strict=True))
    return Correction(
        gains=after[executed] - before[executed],
        improved=float(np.mean([improved(*pair) for pair in pairs])),
        regressed=float(np.mean([regressed(*pair) for pair in pairs])),
        code_repeat=float(repeats[executed].mean()),
    )

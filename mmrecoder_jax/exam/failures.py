"""What a later turn came to, against the turn before it, which is what it saw.

Each answer is one of these, the first that holds:

    crash         the code does not run to its end
    no_change     its code is that of the turn before
    regression    the low-level score is lower
    improvement   the low-level score is higher; also where the turn before crashed
    same          other code, the same score

Scores that differ by less than `rl.correction.MARGIN` are the same. A crash scores 0. Beside them
stands whether a thought announced what the code does not contain (`exam.announcements`).
"""

import enum

from mmrecoder_jax.rl.correction import improved, regressed


class Outcome(enum.StrEnum):
    """Of a later turn."""

    CRASH = "crash"
    NO_CHANGE = "no_change"
    REGRESSION = "regression"
    IMPROVEMENT = "improvement"
    SAME = "same"


def outcome(executed: bool, repeats: bool, before: float, after: float) -> Outcome:
    """What a turn came to.

    Args:
      executed: whether its code runs.
      repeats: whether its code is that of the turn before.
      before, after: the low-level scores of the turn before and of this one.
    """
    if not executed:
        return Outcome.CRASH
    if repeats:
        return Outcome.NO_CHANGE
    if regressed(before, after):
        return Outcome.REGRESSION
    return Outcome.IMPROVEMENT if improved(before, after) else Outcome.SAME

"""Each outcome of a later turn, and which comes first."""

import pytest

from mmrecoder_jax.exam.failures import Outcome, outcome


@pytest.mark.parametrize(
    "executed, repeats, before, after, expected",
    [
        (False, False, 0.8, 0.0, Outcome.CRASH),
        (False, True, 0.0, 0.0, Outcome.CRASH),
        (True, True, 0.5, 0.5, Outcome.NO_CHANGE),
        (True, False, 0.5, 0.4, Outcome.REGRESSION),
        (True, False, 0.5, 0.6, Outcome.IMPROVEMENT),
        (True, False, 0.0, 0.3, Outcome.IMPROVEMENT),  # the turn before crashed
        (True, False, 0.5, 0.5 + 1e-9, Outcome.SAME),
    ],
)
def test_outcomes(executed, repeats, before, after, expected):
    assert outcome(executed, repeats, before, after) is expected

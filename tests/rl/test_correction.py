"""Self-correction against numbers worked out by hand."""

import numpy as np
import pytest

from mmrecoder_jax.rl.correction import MARGIN, correction, improved, regressed, same_code

EXECUTED = np.array([True, True, True, False])
BEFORE, AFTER = np.array([0.5, 0.5, 0.5, 0.0]), np.array([0.7, 0.5, 0.4, 0.9])
REPEATS = np.array([False, True, False, False])


def test_only_first_turns_that_execute_count():
    found = correction(EXECUTED, BEFORE, AFTER, REPEATS)
    np.testing.assert_allclose(found.gains, [0.2, 0.0, -0.1])
    assert found.improved == found.regressed == found.code_repeat == pytest.approx(1 / 3)


def test_nothing_executes():
    assert correction(np.zeros(4, bool), BEFORE, AFTER, REPEATS) is None


@pytest.mark.parametrize(
    "change, up, down", [(2 * MARGIN, True, False), (MARGIN / 2, False, False)]
)
def test_rounding_is_no_change(change, up, down):
    assert improved(0.5, 0.5 + change) is up and regressed(0.5, 0.5 + change) is down
    assert regressed(0.5 + change, 0.5) is up and improved(0.5 + change, 0.5) is down


def test_code_is_compared_up_to_blank_space_around_it():
    first, padded = "```python\nx\n```", "<think>no</think>\n```python\n\nx\n\n```"
    assert same_code(first, padded)
    assert not same_code(first, "```python\ny\n```")
    assert not same_code("no code", "no code")

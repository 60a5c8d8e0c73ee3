"""Intervals against what is known of them: normal data, equal pairs, charts that stay together."""

import math

import numpy as np
import pytest

from mmrecoder_jax.exam.intervals import Sums, difference, estimate, over_seeds


def sums(values, chart=None):
    values = np.asarray(values, float)
    chart = np.arange(len(values)) if chart is None else np.asarray(chart)
    return Sums.of(values, chart, int(chart.max()) + 1)


def test_an_interval_has_the_width_that_theory_gives_it():
    values = np.random.default_rng(1).normal(0.3, 0.1, 400)
    found = estimate(sums(values))
    assert found.mean == pytest.approx(values.mean()) and found.count == 400
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)
    assert found == estimate(sums(values))


def test_samples_of_a_chart_stay_together():
    """Ten equal samples of each chart say no more than one."""
    values = np.random.default_rng(2).normal(0.3, 0.1, 100)
    one, ten = (estimate(sums(np.repeat(values, n), np.repeat(np.arange(100), n))) for n in (1, 10))
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))
    assert ten.count == 1000


def test_values_that_are_none_are_left_out_of_every_resample():
    found = estimate(sums([1.0, math.nan, 1.0, math.nan]))
    assert (found.mean, found.low, found.high, found.count) == (1.0, 1.0, 1.0, 2)
    nothing = estimate(sums([math.nan, math.nan]))
    assert math.isnan(nothing.mean) and nothing.count == 0
    assert nothing.to_json() == {"mean": None, "low": None, "high": None, "count": 0}


def test_pairs_are_compared_chart_by_chart():
    """What charts have in common goes out: each interval is wide, that of the difference is not."""
    base = np.random.default_rng(3).uniform(0, 1, 200)
    one, other = sums(base), sums(base + 0.01)
    assert estimate(one).high - estimate(one).low > 0.05
    found = difference(one, other)
    assert (found.mean, found.low, found.high) == pytest.approx((0.01, 0.01, 0.01))
    assert found.count == 200


def test_an_interval_over_seeds_is_students():
    found = over_seeds(np.array([0.5, 0.6, 0.7]))
    # the mean .6, the deviation .1, t(2, .975) = 4.303
    assert found.low == pytest.approx(0.6 - 4.303 * 0.1 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(0.6 + 4.303 * 0.1 / math.sqrt(3), abs=1e-4)
    assert math.isnan(over_seeds(np.array([0.5])).low)

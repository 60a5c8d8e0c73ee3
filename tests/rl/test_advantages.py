"""Group-relative advantages against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.rl.advantages import Baseline, group_advantages


def advantages(rewards, scorable=None, eps=1e-6, ddof=1, baseline=Baseline.GROUP):
    rewards = jnp.array(rewards, jnp.float32)
    scorable = jnp.ones(rewards.shape, bool) if scorable is None else jnp.array(scorable)
    values, silent = group_advantages(rewards, scorable, eps, ddof, baseline)
    return np.asarray(values), np.asarray(silent)


def test_two_values_population_deviation():
    values, silent = advantages([[1.0, 0.0]], eps=0.0, ddof=0)  # mean 0.5, std 0.5
    np.testing.assert_allclose(values, [[1.0, -1.0]], rtol=1e-6)
    assert not silent.any()


def test_sample_deviation():
    values, _ = advantages([[3.0, 1.0, 2.0]], eps=0.0, ddof=1)  # mean 2, std 1
    np.testing.assert_allclose(values, [[1.0, -1.0, 0.0]], atol=1e-6)


def test_eps_is_added_to_the_deviation():
    values, _ = advantages([[1.0, 0.0]], eps=0.5, ddof=0)
    np.testing.assert_allclose(values, [[0.5, -0.5]], rtol=1e-6)


def test_groups_do_not_mix():
    values, _ = advantages([[1.0, 0.0], [10.0, 30.0]], eps=0.0, ddof=0)
    np.testing.assert_allclose(values, [[1.0, -1.0], [-1.0, 1.0]], rtol=1e-6)


def test_equal_rewards_give_nothing_and_are_counted():
    values, silent = advantages([[0.7, 0.7, 0.7], [0.1, 0.2, 0.3]])
    np.testing.assert_array_equal(values[0], 0.0)
    np.testing.assert_array_equal(silent, [True, False])


def test_an_unscorable_sample_does_not_make_equal_rewards_differ():
    values, silent = advantages([[0.7, 0.7, 0.0]], [[True, True, False]])
    np.testing.assert_array_equal(values, 0.0)
    assert silent.all()


def test_unscorable_leaves_the_baseline():
    values, silent = advantages(
        [[1.0, 0.0, 0.5, 99.0]], [[True, True, True, False]], eps=0.0, ddof=0
    )
    deviation = np.sqrt((0.25 + 0.25 + 0.0) / 3)  # of the three scorable ones, around 0.5
    np.testing.assert_allclose(
        values, [[0.5 / deviation, -0.5 / deviation, 0.0, 0.0]], rtol=1e-6, atol=1e-7
    )
    assert not silent.any()


@pytest.mark.parametrize("scorable", [[True, False], [False, False]])
def test_too_few_scorable(scorable):
    values, silent = advantages([[1.0, 0.0]], [scorable])
    np.testing.assert_array_equal(values, 0.0)
    assert silent.all()


def test_without_a_deviation_rewards_keep_their_size():
    values, _ = advantages([[1.0, 0.0, 0.5], [0.1, 0.1, 0.4]], baseline=Baseline.MEAN)
    np.testing.assert_allclose(values, [[0.5, -0.5, 0.0], [-0.1, -0.1, 0.2]], atol=1e-6)


def test_the_baseline_of_the_others():
    """0.9 against 0.3 and 0.6 is 0.45 above; one that is not scorable is nobody's baseline."""
    values, _ = advantages([[0.9, 0.3, 0.6]], baseline=Baseline.RLOO)
    np.testing.assert_allclose(values, [[0.45, -0.45, 0.0]], atol=1e-6)
    values, silent = advantages([[0.9, 0.3, 9.0]], [[True, True, False]], baseline=Baseline.RLOO)
    np.testing.assert_allclose(values, [[0.6, -0.6, 0.0]], atol=1e-6)
    assert not silent.any()
    values, silent = advantages([[0.9, 0.3]], [[True, False]], baseline=Baseline.RLOO)
    assert silent.all() and (values == 0).all()

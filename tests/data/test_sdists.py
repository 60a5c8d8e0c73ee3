"""Fetching and unpacking are tested from end to end in tests/test_build_gallery.py."""

from mmrecoder_jax.data import sdists


def test_a_sample_is_evenly_spread():
    assert sdists.evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert sdists.evenly([1, 2], 5) == [1, 2]
    assert sdists.evenly([1, 2], 0) == [1, 2]

"""Rows over devices and micro-batches, on few enough to see that it is right."""

import numpy as np
import pytest

from mmrecoder_jax.data.dealing import Room, Unit, deal, fewest_micro_batches


def units(*tokens, rows=1, images=0):
    return [Unit(tuple(range(i * rows, (i + 1) * rows)), n, images) for i, n in enumerate(tokens)]


def tokens(parts):
    return [sorted(unit.tokens for unit in part) for part in parts]


def test_the_largest_come_first_each_where_there_is_least():
    assert tokens(deal(units(9, 2, 8, 3), 2, Room(2, 0))) == [[2, 9], [3, 8]]


def test_the_fullest_part_changes_units_with_others():
    """One after the other they would come to 5 + 4 + 3 = 12 and 5 + 4 + 1 = 10."""
    assert sorted(map(sum, tokens(deal(units(5, 5, 4, 4, 3, 1), 2, Room(3, 0))))) == [11, 11]


@pytest.mark.parametrize("seed", range(20))
def test_all_units_are_dealt_once_and_no_part_is_too_full(seed):
    rng = np.random.default_rng(seed)
    some = [
        Unit((100 * i, 100 * i + 1)[: int(rng.integers(1, 3))], int(n), int(rng.integers(0, 3)))
        for i, n in enumerate(rng.integers(10, 90, 24))
    ]
    room = Room(6, 7)
    count = fewest_micro_batches(some, 2, room)
    parts = deal(some, 2 * count, room)
    assert sorted(u.numbers for part in parts for u in part) == sorted(u.numbers for u in some)
    for part in parts:
        assert sum(len(u.numbers) for u in part) <= 6 and sum(u.images for u in part) <= 7
    assert count == 1 or deal(some, 2 * count - 2, room) is None


def test_what_does_not_fit_is_said():
    assert deal(units(5, 1, rows=2), 1, Room(3, 0)) is None
    assert deal(units(5, 1, images=2), 1, Room(9, 3)) is None
    assert deal(units(5, 1), 1, Room(9, 0)) is not None


def test_as_few_micro_batches_as_rows_and_images_ask_for():
    assert fewest_micro_batches(units(5, 5, 5), 1, Room(2, 0)) == 2
    assert fewest_micro_batches(units(5, 5, 5), 3, Room(2, 0)) == 1
    assert fewest_micro_batches(units(5, 5, 5, images=2), 1, Room(9, 4)) == 2

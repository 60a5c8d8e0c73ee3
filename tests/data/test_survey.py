"""Which rows are kept, and that a file of lengths is used only where it still fits."""

import numpy as np
import pytest

from mmrecoder_jax.data.survey import BadRows, TooManyBadRows, survey

SIZES = [(5, 1), (9, 1), (4, 3), None, (6, 2)]


def measure(size):
    if size is None:
        raise ValueError("it is null")
    return size


def quiet(allowed):
    return BadRows(allowed, lambda message: None)


def test_what_no_bucket_holds_is_counted():
    found = survey(SIZES, measure, longest=6, widest=2, bad=quiet(1))
    assert found.kept.tolist() == [0, 4]
    assert found.counts() == {
        "kept": 2,
        "rows": 5,
        "too_long": 1,
        "too_wide": 1,
        "bad": 1,
        "longest": 9,
    }
    assert found.lengths_for_half == 6


def test_nothing_to_measure():
    found = survey([], measure, 6, 2, quiet(0))
    assert found.counts()["rows"] == len(found.kept) == found.longest == 0
    assert survey([None], measure, 6, 2, quiet(1)).counts()["bad"] == 1


def test_a_bad_row_too_many_is_named():
    with pytest.raises(TooManyBadRows, match=r"^row 3: it is null .bad row 1, .* allows 0"):
        survey(SIZES, measure, 6, 2, quiet(0))


@pytest.mark.parametrize(
    ("limit", "allowed"), [(0, 0), (3.0, 3), (0.5, 5), (0.01, 0), (1, 1), (0.99, 9)]
)
def test_limits_are_numbers_or_shares(limit, allowed):
    assert BadRows.of(limit, 10).allowed == allowed


def test_lengths_are_kept(tmp_path):
    cache = tmp_path / "lengths" / "a.npy"
    sizes = [(n % 7, 1) for n in range(1000)] + [None]
    asked = []

    def count(size):
        asked.append(size)
        return measure(size)

    def look(data, bad):
        asked.clear()
        return survey(data, count, 5, 2, bad, cache)

    first = look(sizes, quiet(1))
    assert len(asked) == 1001
    bad = quiet(1)
    again = look(sizes, bad)
    assert len(asked) <= 17 and bad.count == 1, "bad rows are met again, so that they are counted"
    assert np.array_equal(first.kept, again.kept) and first.counts() == again.counts()
    with pytest.raises(TooManyBadRows):
        look(sizes, quiet(0))
    longer = [(n % 7 + 1, 1) for n in range(1000)] + [None]
    assert look(longer, quiet(1)).too_long > first.too_long and len(asked) > 1000
    assert look(longer[:-5], quiet(0)).rows == 996
    cache.write_bytes(b"cut")
    assert look(longer, quiet(1)).rows == 1001

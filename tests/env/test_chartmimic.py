"""ChartMimic's metrics on records, by hand-computed numbers."""

import time
import tracemalloc

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mmrecoder_jax.env import chartmimic
from mmrecoder_jax.env.chartmimic import ScoreMode, Scores, score
from mmrecoder_jax.env.records import Record

CELL = (1, 1, 0, 0, 0, 0)
CHART = Record(
    texts=("Sales", "year", "year", "a"),
    layout=(CELL, (1, 2, 0, 0, 1, 1)),
    types={"bar": 3, "plot": 1},
    colors=("bar--#1F77B4", "bar--#FF7F0E", "imshow--viridis"),
)


def test_an_identical_pair_scores_exactly_one():
    assert score(CHART, CHART) == Scores(1.0, 1.0, 1.0, 1.0)
    assert score(Record(), Record()) == Scores(1.0, 1.0, 1.0, 1.0)
    assert score(CHART, CHART).overall == 1.0


def test_nothing_against_nothing_earns_nothing():
    """A part that neither side has is the mean of the others."""
    target = Record(texts=("a", "b"), layout=(CELL,))
    scores = score(Record(texts=("a",), layout=()), target)
    assert scores.text == pytest.approx(2 / 3) and scores.layout == 0.0
    assert scores.type == scores.color == scores.overall == pytest.approx(1 / 3)


def test_official_mode_keeps_the_defect_of_two_empty_sides():
    assert score(Record(), Record(), "official") == Scores(0.0, 0.0, 0.0, 0.0)
    assert score(CHART, CHART, "official") == Scores(1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("drawn", [None, Record(), CHART])
def test_without_a_target_there_is_no_score(drawn):
    """Neither a 0 nor a 1: a chart of which the picture alone is known."""
    scores = score(drawn, None)
    assert not scores.known and np.isnan(scores.overall) and np.isnan(scores.text)
    assert score(drawn, CHART).known


def test_no_picture_scores_zero():
    assert score(None, Record()) == Scores(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("mode", ScoreMode)
def test_one_empty_side_scores_zero(mode):
    assert score(Record(), CHART, mode) == Scores()
    assert score(CHART, Record(), mode) == Scores()


def test_counts_are_multisets():
    generated = Record(texts=("year", "b"), layout=(CELL, CELL), types={"bar": 1, "pie": 1})
    scores = score(generated, CHART)
    assert scores.text == pytest.approx(2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4))  # "year" once
    assert scores.layout == pytest.approx(0.5)
    assert scores.type == pytest.approx(2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4))


def test_overall_is_the_mean_of_the_parts():
    assert Scores(0.1, 0.2, 0.3, 0.8).overall == pytest.approx(0.35)


def test_unknown_mode():
    with pytest.raises(ValueError, match="training, official"):
        score(CHART, CHART, "strict")


# Values of colormath 3.0.0.
SIMILARITIES = [
    ("#1F77B4", "#1F77B4", 1.0),
    ("#1F77B4", "#FF7F0E", 0.47566382499613336),
    ("#1F77B4", "#2CA02C", 0.47357982176626134),
    ("#1F77B4", "#D62728", 0.5142408561319267),
    ("#1F77B4", "#7F7F7F", 0.7843499675580607),
]


@pytest.mark.parametrize(("a", "b", "expected"), SIMILARITIES)
def test_similarity_of_colors(a, b, expected):
    assert chartmimic.similarities([a], [b])[0, 0] == pytest.approx(expected, abs=1e-9)
    assert chartmimic.similarities([b], [a + "80"])[0, 0] == pytest.approx(expected, abs=1e-9)


def test_similarity_of_black_and_white_is_almost_zero():
    assert 0 <= chartmimic.similarities(["#000000"], ["#FFFFFF"])[0, 0] < 1e-5


def test_a_colormap_is_its_name():
    expected = [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(
        chartmimic.similarities(["viridis", "jet", "#00FF00"], ["viridis", "#0000ZZ", "#00FF00"]),
        expected,
    )


def test_color_assignment_is_the_best_over_all_permutations():
    import itertools

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = ([f"#{v:06X}" for v in rng.integers(0, 1 << 24, n)] for n in rng.integers(1, 5, 2))
        short, long = sorted((a, b), key=len)
        table = chartmimic.similarities(short, long)
        best = max(
            sum(table[i, j] for i, j in enumerate(order))
            for order in itertools.permutations(range(len(long)), len(short))
        )
        found = chartmimic.matched_similarity([f"bar--{c}" for c in a], [f"bar--{c}" for c in b])
        assert found == pytest.approx(best, abs=1e-12)


def test_colors_match_within_a_function_only():
    target = Record(colors=("bar--#FF0000", "plot--#0000FF"))
    assert score(Record(colors=("bar--#0000FF", "plot--#FF0000")), target).color < 0.6
    assert score(Record(colors=("pie--#FF0000", "hist--#0000FF")), target).color == 0
    near = chartmimic.similarities(["#FF0000"], ["#FE0000"])[0, 0]
    assert score(Record(colors=("bar--#FE0000",)), target).color == pytest.approx(
        2 * near * near / 2 / (near + near / 2)
    )


def test_many_colors_are_thinned_out_in_official_mode_only():
    shades = tuple(f"bar--#{v:02X}0000" for v in range(200, 211))
    assert chartmimic.distinct_colors(shades[:10]) == list(shades[:10])
    assert chartmimic.distinct_colors(shades[::-1]) == [shades[0]]
    other = Record(colors=(*shades[:10], "bar--#0000FF"))
    assert score(other, Record(colors=shades), "official").color == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert score(other, Record(colors=shades)).color > 0.9


def test_many_colors_cost_little_and_keep_their_bounds():
    rng = np.random.default_rng(1)
    a, b = (
        Record(colors=tuple(f"scatter--#{v:06X}" for v in rng.integers(0, 1 << 24, 256)))
        for _ in range(2)
    )
    assert 0.5 < score(a, b).color < 1


def some_colors(rng, count, names=0.0, groups=("bar", "plot")):
    """Entries of which some are colormaps, and some are equal but for what nothing compares."""
    entries = []
    for _ in range(count):
        color = f"#{rng.integers(0, 1 << 24):06X}" + ("80" if rng.random() < 0.1 else "")
        if rng.random() < names:
            color = ("viridis", "jet", "")[rng.integers(3)]
        entries.append(f"{rng.choice(groups)}--{color}" + ("--x" if rng.random() < 0.1 else ""))
    return entries


def assigned_in_one_table(generated, target):
    """The same total from one table of everything with everything."""
    groups, colors = (
        [[e.split("--")[i] for e in side] for side in (generated, target)] for i in (0, 1)
    )
    table = chartmimic.similarities(*colors) * (
        np.array(groups[0])[:, None] == np.array(groups[1])[None]
    )
    return table[linear_sum_assignment(table, maximize=True)].sum()


@pytest.mark.parametrize("names", [0.0, 0.3, 1.0])
def test_the_assignment_is_that_of_one_table(names):
    rng = np.random.default_rng(3)
    for _ in range(20):
        a, b = (some_colors(rng, n, names) for n in rng.integers(1, 60, 2))
        expected = assigned_in_one_table(a, b)
        assert chartmimic.matched_similarity(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("names", [0.0, 0.3, 1.0])
def test_thinning_is_that_of_one_table(names):
    rng = np.random.default_rng(4)
    for count in (11, 50, 300):
        entries = some_colors(rng, count, names)
        colors = [entry.split("--")[1] for entry in sorted(entries)]
        table, kept = chartmimic.similarities(colors, colors), []
        for i in range(count):
            if all(table[i, k] <= 0.7 for k in kept):
                kept.append(i)
        assert chartmimic.distinct_colors(entries) == [sorted(entries)[i] for i in kept]


HOSTILE = {
    "random": lambda i: f"s--#{i * 2654435761 % (1 << 24):06X}",
    "dark": lambda i: f"s--#{(i * 2654435761 % (1 << 24)) & 0x3F3F3F:06X}",
    "bright": lambda i: f"s--#{(i * 2654435761 % (1 << 24)) | 0xC0C0C0:06X}",
    "names": lambda i: f"s--{i}",
}


@pytest.mark.parametrize("mode", ScoreMode)
@pytest.mark.parametrize(
    ("count", "pair"), [(900, ("random", "dark")), (5_000, ("dark", "bright"))]
)
def test_records_at_their_cap_are_scored_in_little_memory_and_time(mode, count, pair):
    """One table of 5,000 x 5,000 has 200 MB; CIEDE2000 over it needs 30 of them."""
    sides = [
        Record(colors=tuple(HOSTILE[name](i + j) for i in range(count)))
        for j, name in enumerate(pair)
    ]
    start = time.monotonic()
    tracemalloc.start()
    try:
        color = score(*sides, mode).color
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0 < color < 1
    assert peak < 48 << 20
    assert time.monotonic() - start < 120  # an assignment in one table takes longer


def test_many_names_are_their_intersection_and_many_groups_are_alone():
    sides = [[HOSTILE["names"](i + j) for i in range(5_000)] for j in (0, 1_000)]
    assert chartmimic.matched_similarity(*sides) == 4_000
    assert chartmimic.distinct_colors(sides[0]) == sorted(sides[0])
    near = chartmimic.similarities(["#000000"], ["#000001"])[0, 0]
    sides = [[f"{i}--#00000{j}" for i in range(2_000)] for j in (0, 1)]
    assert chartmimic.matched_similarity(*sides) == pytest.approx(2_000 * near)


def test_more_colors_than_a_recorder_lists_are_assigned_almost_as_well():
    a, b = ([HOSTILE["random"](i) for i in range(j, 1_100 + j)] for j in (0, 400))
    best = assigned_in_one_table(a, b)
    assert 0.97 * best < chartmimic.matched_similarity(a, b) <= best + 1e-9

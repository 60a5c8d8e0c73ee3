"""Small pictures: where numbers land, and that none is empty or broken."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mmrecoder_jax.reporting import svg
from mmrecoder_jax.reporting.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, Point


def line(y, x=None):
    steps = np.arange(1.0, len(y) + 1) if x is None else np.array(x)
    return Line("a", 0, steps, np.array(y, float))


def path(picture, style):
    """The places of the one path of a class."""
    (places,) = re.findall(rf'<path class="{style}" d="M([^"]*)"', picture)
    return [tuple(map(float, place.split())) for place in places.split("L")]


def texts(picture):
    return [text.text for text in ElementTree.fromstring(picture).iter("text")]


def test_a_line_goes_from_corner_to_corner_less_the_room_above():
    (x0, y0), (x1, y1) = path(svg.lines([line([0.0, 1.0])], "l"), "line c0")
    assert (x0, x1) == (LEFT, WIDTH - RIGHT)
    inside = HEIGHT - TOP - BOTTOM
    assert y0 == HEIGHT - BOTTOM  # no number is below zero
    assert y1 == pytest.approx(TOP + inside * 0.06 / 1.06, abs=0.06)


@pytest.mark.parametrize(
    "y", [[0.5], [0.5, 0.5], [np.nan, 1.0], [np.nan], [1e-7, 2e-7], [1e9, -1e9], [0.0, 0.0], []]
)
def test_any_numbers_make_a_picture(y):
    picture = svg.lines([line(y)], "<l>")
    ElementTree.fromstring(picture)
    assert "nan" not in picture and "inf" not in picture and 'aria-label="&lt;l&gt;"' in picture


def test_axes_have_round_numbers():
    found = texts(svg.lines([line([0.12, 0.55, 0.93])], "l"))
    assert found == ["0.2", "0.4", "0.6", "0.8", "1", "2", "3"]


def test_numbers_of_an_axis_have_room_and_rounding_is_no_curve():
    picture = svg.lines([line([2.474791, 2.474868, 2.474802])], "l")
    assert max(len(text) for text in texts(picture)) <= 6
    heights = [y for _, y in path(picture, "line c0")]
    assert max(heights) - min(heights) < 0.05 * HEIGHT


def test_steps_are_whole_numbers():
    assert {"1", "2"} == set(texts(svg.lines([line([0.0, 0.0])], "l"))[-2:])


def test_the_running_mean_is_over_a_twentieth_on_both_sides():
    values = np.arange(100.0)
    mean = svg.running_mean(values)
    assert mean[50] == 50 and mean[0] == values[:6].mean() and mean[-1] == values[94:].mean()


def test_points_have_their_intervals_and_names():
    series = [[Point(50, 40, 60), Point(70, 65, 75)], [None, None]]
    picture = svg.points(series, ["<a>", "b"], "l", unit="%")
    root = ElementTree.fromstring(picture)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle")]
    assert len(dots) == 2 and dots[0][0] < dots[1][0] and dots[0][1] > dots[1][1]
    assert "<a>" in texts(picture) and "60%" in texts(picture)


def test_the_zero_line_is_seen_where_it_is_asked_for():
    above = [[Point(5, 4, 6)]]
    assert "zero" in svg.points(above, ["a"], "l", zero=True)
    assert "zero" not in svg.points(above, ["a"], "l")


def test_equal_intervals_make_a_picture():
    ElementTree.fromstring(svg.points([[Point(5, 5, 5)]], ["a"], "l"))

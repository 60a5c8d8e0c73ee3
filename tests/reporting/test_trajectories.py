import base64
import re

import numpy as np
import pytest

from mmrecoder_jax.data.sources import png_bytes
from mmrecoder_jax.reporting.trajectories import (
    MAX_LINES,
    TrajectoryView,
    TurnView,
    trajectories_html,
)
from mmrecoder_jax.rl.correction import MARGIN
from tests.reporting.tags import Tags

SMALL = png_bytes(np.full((4, 6, 3), 200, np.uint8))


def turn(code, overall=0.5, status="ok", thought="why", error=""):
    """A turn that wrote this code; without code, one that wrote the thought alone."""
    response = thought if code is None else f"<think>{thought}</think>\n```python\n{code}\n```"
    render = SMALL if status == "ok" else None
    return TurnView(response, status, error, render, {"overall": overall}, overall)


def view(*turns):
    return TrajectoryView("test-1", SMALL, list(turns))


def listings(page):
    """(style, mark, text) of every line, per listing."""
    return [
        re.findall(r'<span class="line ([a-z ]*)" data-mark="(.)">(.*)\n', listing)
        for listing in re.findall(r'<pre class="code">(.*?)</pre>', page, re.S)
    ]


@pytest.mark.parametrize(
    "first, last, labels",
    [
        (turn("a", 0.5), turn("b", 0.6), ["improved"]),
        (turn("a", 0.5), turn("b", 0.4), ["regressed"]),
        (turn("a", 0.5), turn("b", 0.5 + MARGIN / 2), []),  # rounding is no change
        (turn("a", 0.5), turn("b", 0.5 - MARGIN / 2), []),
        (turn("a", 0.5), turn(" a\n", 0.5), ["repeated"]),
        (turn("a", 0.5), turn("b", 0.0, "error"), ["regressed", "failed"]),
        (turn("a", 0.0, "timeout"), turn("b", 0.9), ["repaired", "failed"]),
        (turn(None, 0.0, "no_code"), turn(None, 0.0, "no_code"), ["failed"]),
        (turn("a", 0.5), turn("b", 0.5), []),
    ],
)
def test_labels(first, last, labels):
    assert view(first, last).labels() == labels


def test_a_trajectory_has_images_counts_and_the_diff():
    first = turn("import x\na = 1\nshow()", 0.5)
    second = turn("import x\na = 2\nb = 3\nshow()", 0.6)
    page = trajectories_html([view(first, second)], "Held-out")
    tags = Tags(page).tags
    uri = "data:image/png;base64," + base64.b64encode(SMALL).decode()
    assert [attrs["src"] for tag, attrs in tags if tag == "img"] == [uri] * 3
    assert [attrs["data-labels"] for tag, attrs in tags if tag == "article"] == ["improved"]
    assert "improved 1<" in page and "all 1<" in page and "+0.100" in page
    buttons = [attrs for tag, attrs in tags if tag == "button"]
    dead = [attrs["data-show"] for attrs in buttons if "disabled" in attrs]
    assert dead == ["regressed", "repaired", "repeated", "failed"]
    assert listings(page) == [
        [("", " ", "import x"), ("old", "-", "a = 1"), ("", " ", "show()")],
        [("", " ", "import x"), ("new", "+", "a = 2"), ("new", "+", "b = 3"), ("", " ", "show()")],
    ]
    assert '<pre class="thought">why</pre>' in page


def test_a_middle_turn_is_marked_against_both_neighbours():
    page = trajectories_html([view(turn("a"), turn("b"), turn("c"))], "Held-out")
    assert listings(page) == [
        [("old", "-", "a")],
        [("new old", "±", "b")],
        [("new", "+", "c")],
    ]


def test_a_failed_turn_shows_its_error_and_a_response_without_code_is_shown_whole():
    failed = turn("x(", 0.0, "error", error="line 1: bad <syntax>")
    silent = turn(None, 0.0, "no_code", thought="I cannot.")
    page = trajectories_html([view(failed, silent)], "Held-out")
    assert "line 1: bad &lt;syntax&gt;" in page and "<b>no_code</b>" in page and "I cannot." in page


def test_long_code_and_long_text_are_cut_with_a_note():
    long = turn("\n".join(["a"] * (MAX_LINES + 5)), thought="w" * 100_000)
    page = trajectories_html([view(long)], "Held-out")
    assert "… 5 more lines" in page and "… 80000 more characters" in page and len(page) < 80_000


@pytest.mark.parametrize(
    "target, turns, what", [(b"<svg>", [turn("a")], "no PNG"), (SMALL, [], "no turns")]
)
def test_a_trajectory_that_cannot_be_shown_is_named(target, turns, what):
    with pytest.raises(ValueError, match=f"'test-7'.*{what}"):
        TrajectoryView("test-7", target, turns)

"""The form of a response: written, checked, and taken apart."""

import pytest

from mmrecoder_jax.env.response import (
    extract_code,
    extract_thought,
    has_format,
    response_text,
    think_text,
)

GOOD = "<think>bars</think>\n```python\nx = 1\n```"


def test_what_is_written_has_the_format_and_can_be_read_back():
    response = response_text("bars", "x = 1")
    assert response == GOOD and has_format(response)
    assert extract_thought(response) == "bars" and extract_code(response) == "x = 1\n"


def test_code_is_the_first_python_block():
    assert extract_code(GOOD) == "x = 1\n"
    assert extract_code("a\n```python\nx\n```\nb\n```python\ny\n```") == "x\n"
    assert extract_code("```python\nx = 1") is None
    assert extract_code("```\nx = 1\n```") is None
    assert extract_code("") is None


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, True),
        ("\n " + GOOD + "\n", True),
        (GOOD + " Done.", False),
        ("Sure. " + GOOD, False),
        (GOOD + "\n" + GOOD, False),
        (GOOD + "\n```python\ny\n```", False),
        ("```python\nx = 1\n```", False),
        ("<think>a<think>b</think>\n```python\nx\n```", False),
        ("<think>a ```python\ny\n``` </think>\n```python\nx\n```", False),
        ("<think>bars</think>\n```\nx = 1\n```", False),
        ("<think>bars</think>\n```python\nx = 1", False),
    ],
)
def test_format(response, expected):
    assert has_format(response) is expected


@pytest.mark.parametrize(
    ("response", "thought"),
    [
        ("Sure.\n```python\nx\n```\nDone.", "Sure."),
        ("<think>no end\n```python\nx = 1", "no end"),
        ("no code at all", "no code at all"),
        ("```python\nx\n```", ""),
    ],
)
def test_the_thought_is_what_precedes_the_code(response, thought):
    assert extract_thought(response) == thought


def test_a_first_turn_thinks_of_calls_series_and_points():
    assert think_text("x = ['a','b']\nax.bar(x, [1,2], color='red')") == "bar, 1 series, 2 points"
    assert think_text("ax.plot(t, s)\nax.plot(t, c)\nax2.hist(s)") == "plot, hist, 3 series"
    assert think_text("print('plot')") == "0 series"

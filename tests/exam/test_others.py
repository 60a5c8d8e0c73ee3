"""Predictions of others: every form of a row, what is missing, what is wrong."""

import json

import pytest

from mmrecoder_jax.data.rows import RowError
from mmrecoder_jax.exam.others import read_others


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_form_of_a_row(tmp_path):
    path = write(
        tmp_path / "answers.jsonl",
        {"id": "a", "turns": ["one", "two"]},
        {"id": "b", "text": "one"},
        {"id": 3, "code": "import x"},
        {"id": "d", "turns": [{"text": "one", "status": "ok"}, {"text": None}]},
        {"id": "nobody", "text": "one"},
    )
    found = read_others(path, ["a", "b", "3", "d", "e"])
    assert found.texts == {
        ("a", 0): ("one", "two"),
        ("b", 0): ("one", "one"),  # who stops has decided
        ("3", 0): ("import x", "import x"),
        ("d", 0): ("one", ""),
    }
    assert (found.turns, found.samples, found.carried) == (2, 1, 2)
    assert found.unknown == ("nobody",)


def test_samples_are_told_apart(tmp_path):
    path = write(
        tmp_path / "answers.jsonl",
        {"id": "a", "text": "one"},
        {"id": "a", "sample": 2, "text": "three"},
    )
    found = read_others(path, ["a"])
    assert found.samples == 3 and set(found.texts) == {("a", 0), ("a", 2)}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"id": "a"}, "one of turns, text and code is wanted; it has none"),
        ({"id": "a", "text": "x", "code": "y"}, "it has text, code"),
        ({"id": "a", "turns": []}, "no list with an answer"),
        ({"id": "a", "turns": "x"}, "no list with an answer"),
        ({"id": "a", "turns": [3]}, "an answer is int, not text"),
        ({"id": "a", "text": "\ud83d"}, "half of a surrogate pair"),
        ({"id": True, "text": "x"}, "its id is 'True'"),
        ({"id": "a", "sample": -1, "text": "x"}, "its sample is '-1'"),
        ({"id": "first", "text": "x"}, "id first .* was there before"),
        ({"text": "x"}, "lacks id"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    path = write(tmp_path / "answers.jsonl", {"id": "first", "text": "x"}, row)
    with pytest.raises(RowError, match=f"line 2.*{message}"):
        read_others(path, ["first", "a"])

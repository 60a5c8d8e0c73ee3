"""Rows on disk: torn lines, other runs, order."""

import json

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.exam.journal import PREDICTIONS, RUN, Journal

MADE_OF = {"benchmark": "tiny", "seed": 0, "rules": ("a", "b")}


def row(name, sample=0, text="x"):
    return {"id": name, "sample": sample, "turns": [{"text": text}]}


def test_rows_survive_and_are_sorted_at_the_end(tmp_path):
    with Journal(tmp_path / "out", MADE_OF) as journal:
        for name, sample in (("b", 1), ("a", 0), ("b", 0), ("gone", 0)):
            journal.add(row(name, sample))
    path = tmp_path / "out" / PREDICTIONS
    path.write_bytes(path.read_bytes() + b'{"id": "c", "sam')  # a kill came here
    with Journal(tmp_path / "out", MADE_OF) as journal:
        assert set(journal.rows) == {("b", 1), ("a", 0), ("b", 0), ("gone", 0)}
        journal.add(row("c"))
        rows = journal.finish({"a": 0, "b": 1, "c": 2})
    assert [(r["id"], r["sample"]) for r in rows] == [("a", 0), ("b", 0), ("b", 1), ("c", 0)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_a_row_is_there_before_the_journal_is_closed(tmp_path):
    with Journal(tmp_path, MADE_OF) as journal:
        journal.add(row("a"))
        assert len((tmp_path / PREDICTIONS).read_text().splitlines()) == 1


def test_another_run_is_refused_with_what_differs(tmp_path):
    with Journal(tmp_path, MADE_OF) as journal:
        journal.add(row("a"))
    before = (tmp_path / PREDICTIONS).read_bytes()
    with pytest.raises(ConfigError, match=r"seed was 0 and is 1.*name another directory"):
        Journal(tmp_path, MADE_OF | {"seed": 1})
    assert (tmp_path / PREDICTIONS).read_bytes() == before
    assert json.loads((tmp_path / RUN).read_text())["seed"] == 0


def test_predictions_of_nobody_knows_what_are_refused(tmp_path):
    (tmp_path / PREDICTIONS).write_text("{}\n")
    with pytest.raises(ConfigError, match=r"has no run\.json beside it"):
        Journal(tmp_path, MADE_OF)


def test_a_damaged_row_is_named(tmp_path):
    with Journal(tmp_path, MADE_OF) as journal:
        journal.add(row("a"))
    (tmp_path / PREDICTIONS).write_text("no json\n")
    with pytest.raises(ConfigError, match=r"line 1 is not JSON.*move .* away"):
        Journal(tmp_path, MADE_OF)

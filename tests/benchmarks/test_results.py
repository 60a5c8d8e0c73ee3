"""Output rows that neither a kill nor a later start loses."""

import json

import pytest

from mmrecoder_jax.benchmarks.results import Results
from mmrecoder_jax.config import ConfigError

RULES = {"rule": "training"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("pairs\n")
    return path


def add(path, source, *ids, rules=RULES) -> list:
    with Results(path, source, rules) as results:
        for name in ids:
            results.add({"id": name})
        return [row["id"] for row in results.rows]


def test_a_start_goes_on_after_the_rows_that_are_there(tmp_path, source):
    out = tmp_path / "new" / "folder" / "scores.jsonl"
    add(out, source, "a", 7)
    assert add(out, source, "b") == ["a", 7, "b"]
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", 7, "b"]
    assert Results(out, source, RULES).done == {'"a"', "7", '"b"'}


def test_a_torn_row_is_written_again(tmp_path, source):
    out = tmp_path / "scores.jsonl"
    add(out, source, "a")
    with open(out, "a") as file:
        file.write('{"id": "b"}')
    assert add(out, source, "b") == ["a", "b"]
    assert out.read_text() == '{"id": "a"}\n{"id": "b"}\n'


@pytest.mark.parametrize("change", ["input", "rules", "rows", "no meta"])
def test_rows_of_something_else_are_kept_beside(tmp_path, source, change):
    out = tmp_path / "scores.jsonl"
    add(out, source, "a")
    rules = RULES
    if change == "input":
        source.write_text("other pairs\n")
    elif change == "rules":
        rules = {"rule": "official"}
    elif change == "rows":
        out.write_text("my notes\n")
    else:
        out.with_name("scores.jsonl.meta.json").unlink()
    before = out.read_text()
    assert add(out, source, rules=rules) == []
    assert out.read_text() == before  # as long as there is no row
    assert add(out, source, "b", rules=rules) == ["b"]
    assert out.read_text() == '{"id": "b"}\n'
    assert out.with_name("scores.jsonl.bak").read_text() == before


def test_the_input_is_never_written_to(tmp_path, source):
    (tmp_path / "link").hardlink_to(source)
    for out in (source, tmp_path / "link", tmp_path / "." / "pairs.jsonl"):
        with pytest.raises(ConfigError, match="is the input itself"):
            Results(out, source, RULES)

"""Directories appear whole or not at all, and a killed writer's rows are taken over."""

import dataclasses

import pytest

from mmrecoder_jax.data.sources import ChartDirectory
from mmrecoder_jax.data.writers import ChartWriter
from tests.data.test_sources import make_chart


def test_a_directory_appears_when_it_is_whole(tmp_path):
    writer = ChartWriter(tmp_path / "set", {"name": "one"})
    writer.add(make_chart("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["set.partial"]
    writer.attach("LICENSE.test", "Free.")
    assert writer.finish().meta == {"name": "one", "count": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert (tmp_path / "set" / "LICENSE.test").read_text() == "Free."


def test_a_writer_refuses_bad_and_double_ids_and_existing_directories(tmp_path):
    writer = ChartWriter(tmp_path / "new", {})
    writer.add(make_chart("a"))
    for name in ("a", "x/y", "..", ""):
        with pytest.raises(ValueError, match="id "):
            writer.add(make_chart(name))
    writer.finish()
    with pytest.raises(FileExistsError, match="remove it"):
        ChartWriter(tmp_path / "new", {})


def test_a_chart_without_a_record_is_not_written(tmp_path):
    bare = dataclasses.replace(make_chart("a"), record=None, code="")
    with pytest.raises(ValueError, match="chart a has no record"):
        ChartWriter(tmp_path / "new", {}).add(bare)


def test_a_writer_takes_over_what_a_killed_one_left(tmp_path):
    first = ChartWriter(tmp_path / "set", {"seed": 1})
    first.add(make_chart("a"))
    first.add(make_chart("b"))
    journal = tmp_path / "set.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # torn in the middle of the last row
    second = ChartWriter(tmp_path / "set", {"seed": 1})
    assert second.done == {"a"}
    second.add(make_chart("b", 7))
    assert second.finish()[1] == make_chart("b", 7)


def test_a_writer_starts_anew_for_another_meta(tmp_path):
    ChartWriter(tmp_path / "set", {"seed": 1}).add(make_chart("a"))
    assert ChartWriter(tmp_path / "set", {"seed": 2}).done == set()


def test_charts_left_out_leave_no_image(tmp_path):
    writer = ChartWriter(tmp_path / "set", {})
    for name, shade in (("c", 1), ("a", 1), ("b", 2)):
        chart = make_chart(name, shade)
        writer.add(dataclasses.replace(chart, more_images=(chart.image,)))
    repeated = writer.repeated_images()
    assert repeated == {"c": "a"}  # the first by id stays
    assert [chart.id for chart in writer.finish(without=repeated)] == ["a", "b"]
    for folder in ("images", "more_images"):
        assert len(list((tmp_path / "set" / folder).iterdir())) == 2
    assert ChartDirectory(tmp_path / "set").meta["count"] == 2


def test_a_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"out\.partial is there and no writer left it"):
        ChartWriter(tmp_path / "out", {})
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "precious"

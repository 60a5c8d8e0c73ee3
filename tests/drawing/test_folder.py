"""Drawings on disk: whole folders, made once, replaced only where that is asked for."""

import json
import re

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.drawing.drawing import of_samples
from mmrecoder_jax.drawing.folder import Folder
from mmrecoder_jax.env.wire import Status
from tests.drawing.scripted import CODE, chart, trajectory, turn
from tests.reporting.tags import Tags

SETTINGS = {"author": "a", "turns": 2}


def drawing(*turns, of=None, select="last"):
    return of_samples({0: trajectory(*turns, of=of)}, select)


def files(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.is_file())


def test_what_a_drawing_leaves(tmp_path):
    folder = Folder(str(tmp_path / "out"), SETTINGS)
    name = folder.place(chart())
    page = folder.write(name, drawing(turn(error="NameError: x"), turn(20)))
    assert page == tmp_path / "out" / "chart" / "index.html"
    assert files(page.parent) == [
        "chart.png",
        "drawing.json",
        "final.png",
        "final.py",
        "index.html",
        "turn-1.error.txt",
        "turn-1.py",
        "turn-1.response.txt",
        "turn-2.png",
        "turn-2.py",
        "turn-2.response.txt",
    ]
    assert (page.parent / "final.py").read_text() == CODE.replace("{height}", "20") + "\n"
    assert (page.parent / "turn-1.error.txt").read_text() == "NameError: x\n"
    row = json.loads((page.parent / "drawing.json").read_text())
    assert row["chosen"] == {"sample": 1, "turn": 2}
    assert [one["likeness"] for one in row["samples"][0]] == [None, 1.0]
    kept = folder.kept(name)
    assert kept.code == CODE.replace("{height}", "20") + "\n" and kept.summary == row["summary"]


def test_samples_have_folders_of_their_own(tmp_path):
    folder = Folder(str(tmp_path), SETTINGS)
    both = of_samples({1: trajectory(turn(20)), 0: trajectory(turn(5))}, "visual")
    folder.write(folder.place(chart()), both)
    assert (tmp_path / "chart" / "sample-2" / "turn-1.png").is_file()
    assert json.loads((tmp_path / "chart" / "drawing.json").read_text())["chosen"]["sample"] == 2


def test_nothing_is_handed_over_where_no_turn_runs(tmp_path):
    folder = Folder(str(tmp_path), SETTINGS)
    name = folder.place(chart())
    failed = drawing(turn(error="KeyError: 'y'"), turn(error="NameError: y"))
    folder.write(name, failed)
    assert not (tmp_path / name / "final.py").exists() and folder.kept(name).code is None
    assert failed.summary == "no turn runs; the last: error: NameError: y"
    refused = drawing(turn(error="This chart is not shown: it is odd", status=Status.REFUSED))
    assert refused.refused and "it is odd" in refused.summary


def test_the_same_drawing_is_not_made_again_and_another_one_replaces_nothing(tmp_path):
    first = Folder(str(tmp_path), SETTINGS)
    first.write(first.place(chart()), drawing(turn(20)))
    again = Folder(str(tmp_path), dict(SETTINGS))
    assert again.kept(again.place(chart())).code
    other = {**SETTINGS, "turns": 4}
    with pytest.raises(ConfigError, match=r"turns 2, now 4.*--overwrite"):
        Folder(str(tmp_path), other).place(chart())
    replacing = Folder(str(tmp_path), other, overwrite=True)
    name = replacing.place(chart())
    assert replacing.kept(name) is None
    replacing.write(name, drawing(turn(5)))
    assert json.loads((tmp_path / "chart" / "drawing.json").read_text())["settings"] == other


def test_charts_of_one_name_have_two_folders(tmp_path):
    folder = Folder(str(tmp_path), SETTINGS)
    first, second = folder.place(chart()), folder.place(chart(height=9))
    assert first == "chart" and re.fullmatch(r"chart-[0-9a-f]{8}", second)
    for name, height in ((first, 20), (second, 9)):
        folder.write(name, drawing(turn(3), of=chart(height=height)))
    again = Folder(str(tmp_path), SETTINGS)
    assert [again.place(chart(height=9)), again.place(chart())] == [second, first]


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "chart").mkdir()
    (tmp_path / "chart" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no drawing of ours"):
        Folder(str(tmp_path), SETTINGS, overwrite=True).place(chart())
    with pytest.raises(ConfigError, match="--out="):
        Folder(str(tmp_path / "chart" / "notes.txt"), SETTINGS)


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path):
    begun = tmp_path / ".chart.part"
    begun.mkdir()
    (begun / "turn-1.py").write_text("half")
    folder = Folder(str(tmp_path), SETTINGS)
    name = folder.place(chart())
    assert folder.kept(name) is None
    folder.write(name, drawing(turn(20)))
    assert not begun.exists()


def test_pages_show_text_of_a_model_as_text(tmp_path):
    """Nothing that a model wrote becomes a tag, in a page of the index either."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    folder = Folder(str(tmp_path), SETTINGS)
    name = folder.place(chart())
    folder.write(
        name,
        drawing(turn(error=evil, text=evil), turn(20, text=f"{evil}\n```python\n# {evil}\n```")),
    )
    folder.write_index()
    for page in (tmp_path / name / "index.html", tmp_path / "index.html"):
        tags = Tags(page.read_text()).tags
        assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
        assert "script" not in [name for name, _ in tags]
        assert all(a["src"].startswith("data:image/png;") for name, a in tags if name == "img")


def test_the_index_leads_to_every_drawing(tmp_path):
    folder = Folder(str(tmp_path), SETTINGS)
    for name in ("a", "b c"):
        folder.write(folder.place(chart(name)), drawing(turn(20), of=chart(name)))
    text = folder.write_index().read_text()
    assert 'href="a/index.html"' in text and 'href="b%20c/index.html"' in text
    assert "Charts: 2. Scripts that run: 2." in text
    assert text.count("<img") == 4

"""Chart and dialogue directories: random access, and errors that name the bad row."""

import dataclasses
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.data.sources import (
    Chart,
    ChartDirectory,
    Dialogue,
    DialogueDirectory,
    Questions,
    RandomAccess,
    png_bytes,
)
from mmrecoder_jax.data.writers import ChartWriter, DialogueWriter
from mmrecoder_jax.env import Record

RECORD = Record(("Rain",), ((1, 1, 0, 0, 0, 0),), {"bar": 2}, ("bar--#FF0000",))


def make_chart(name: str, shade: int = 0) -> Chart:
    image = png_bytes(np.full((4, 6, 3), shade, np.uint8))
    return Chart(name, image, f"print({shade})\n", RECORD, "Draw it.", "test", "CC0-1.0")


@pytest.fixture
def charts(tmp_path) -> Path:
    writer = ChartWriter(tmp_path / "charts", {"name": "two"})
    writer.add(make_chart("b", 1))
    writer.add(make_chart("a", 2))
    writer.finish()
    return tmp_path / "charts"


def test_chart_round_trip(charts):
    directory = ChartDirectory(charts)
    assert directory.meta == {"name": "two", "count": 2}
    assert list(directory) == [make_chart("a", 2), make_chart("b", 1)]
    assert len(directory) == 2 and isinstance(directory, RandomAccess)
    assert pickle.loads(pickle.dumps(directory))[1].id == "b"
    assert ChartDirectory(charts, "Copy this.")[0].instruction == "Copy this."
    assert sorted(path.name for path in charts.iterdir()) == ["charts.jsonl", "images", "meta.json"]
    with pytest.raises(IndexError):
        directory[2]


def test_pictures_of_questions(charts):
    assert ChartDirectory(charts).questions() == Questions(1, 1.0)
    path = charts / "charts.jsonl"
    first, second = path.read_text().splitlines()
    words = first.replace('"code": "', '"code": "#  \\"more_images\\"')  # in a script alone
    broken = second.replace('"id"', '"more_images": 3, "id"', 1)
    path.write_text(f"{words}\n{broken}\n")
    assert ChartDirectory(charts).questions() == Questions(1, 1.0)
    assert Questions(2, 1.1) | Questions(3, 1.0) == Questions(3, 1.1)


def test_a_question_of_several_images(tmp_path):
    """Its further images are in files of their own, whatever other charts are called."""
    more = tuple(png_bytes(np.full((4, 6, 3), shade, np.uint8)) for shade in (7, 8))
    charts = [
        dataclasses.replace(make_chart("a"), more_images=more),
        dataclasses.replace(make_chart("a-2"), more_images=more[:1]),
        make_chart("b", 3),
    ]
    writer = ChartWriter(tmp_path / "set", {})
    for chart in charts:
        writer.add(chart)
    assert list(writer.finish()) == charts
    assert charts[0].images == (charts[0].image, *more) and charts[2].images == (charts[2].image,)
    assert ChartDirectory(tmp_path / "set").questions() == Questions(3, 2.0)
    path = tmp_path / "set" / "charts.jsonl"
    path.write_text(path.read_text().replace("more_images/a-3.png", "../secret.png"))
    with pytest.raises(ValueError, match=r"line 1 names an image outside the directory"):
        ChartDirectory(tmp_path / "set")[0]


def test_png_bytes_lays_transparency_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    pixels = np.asarray(Image.open(io.BytesIO(png_bytes(image))))
    assert pixels.tolist() == [[[255, 255, 255], [255, 0, 0]]]


def rewrite_row(directory: Path, file: str, line: int, change):
    lines = (directory / file).read_text().splitlines()
    row = json.loads(lines[line - 1])
    change(row)
    lines[line - 1] = json.dumps(row)
    (directory / file).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("code"), "charts.jsonl line 2 lacks code"),
        (lambda row: row.update(record={"texts": []}), "charts.jsonl line 2 has a bad record"),
        (
            lambda row: row.update(image="images/c.png"),
            "line 2 names an image that is not there: images/c.png",
        ),
        (
            lambda row: row.update(image="../secret.png"),
            "line 2 names an image outside the directory",
        ),
    ],
)
def test_bad_row_is_named(charts, change, message):
    rewrite_row(charts, "charts.jsonl", 2, change)
    directory = ChartDirectory(charts)
    assert directory[0].id == "a"
    with pytest.raises(ValueError, match=message):
        directory[1]


def test_bad_json_is_named(charts):
    with open(charts / "charts.jsonl", "a") as file:
        file.write('{"id": \n[]\n')
    (charts / "meta.json").write_text('{"count": 4}')
    directory = ChartDirectory(charts)
    with pytest.raises(ValueError, match=r"line 3 is not JSON"):
        directory[2]
    with pytest.raises(ValueError, match=r"line 4 is not an object but list"):
        directory[3]


def test_not_a_chart_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a chart directory"):
        ChartDirectory(tmp_path)


def make_dialogue(name: str, chart: Chart, pictures: int = 1) -> Dialogue:
    images = tuple(png_bytes(np.full((4, 6, 3), i, np.uint8)) for i in range(pictures))
    return Dialogue(name, chart, ("first", "second"), ("Improve it.",), (images,), 0.5, "edited")


def test_dialogue_round_trip(tmp_path):
    dialogues = [
        make_dialogue("2", make_chart("a")),
        make_dialogue("1", make_chart("b"), pictures=0),
        make_dialogue("3", make_chart("a")),
        make_dialogue("4", make_chart("b"), pictures=2),
    ]
    writer = DialogueWriter(tmp_path / "set", {"name": "four"})
    for dialogue in dialogues:
        writer.add(dialogue)
    directory = writer.finish()
    assert list(directory) == sorted(dialogues, key=lambda dialogue: dialogue.id)
    assert directory.most_pictures() == 2
    assert len(directory) == 4 and isinstance(directory, RandomAccess)
    assert len(directory.charts) == 2, "a chart is stored once"
    assert DialogueDirectory(tmp_path / "set", "Copy.")[0].chart.instruction == "Copy."


def test_dialogue_row_with_missing_feedback_is_named(tmp_path):
    writer = DialogueWriter(tmp_path / "set", {})
    writer.add(make_dialogue("1", make_chart("a")))
    writer.finish()
    rewrite_row(
        tmp_path / "set", "dialogues.jsonl", 1, lambda row: row["responses"].append("third")
    )
    with pytest.raises(ValueError, match="line 1 has 3 responses, so it needs 2 feedback"):
        DialogueDirectory(tmp_path / "set")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "image is null, not text"),
        ({"image": 5}, "image is int"),
        ({"image": ""}, "image is empty"),
        ({"image": "images"}, "an image that cannot be read: images: Is a directory"),
        ({"image": "a\0b"}, "an image is 'a.*not a name"),
        ({"image": "x" * 300}, "an image that cannot be read: x"),
        ({"code": None}, "code is null"),
        ({"code": ["a"]}, "code is list"),
        ({"code": "\n"}, "code is empty"),
        ({"id": 7}, "id is int"),
        ({"id": "a"}, "has the id 'a' of line 1"),
        ({"instruction": None}, "instruction is null"),
        ({"record": None}, "has a bad record"),
        ({"record": RECORD.to_json() | {"texts": None}}, "has a bad record"),
    ],
)
def test_fields_of_the_wrong_kind(charts, change, message):
    rewrite_row(charts, "charts.jsonl", 2, lambda row: row.update(change))
    directory = ChartDirectory(charts)
    assert directory[0].id == "a"
    with pytest.raises(ValueError, match=rf"charts\.jsonl line 2:? .*{message}"):
        directory[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name"', "is not JSON"),
        ("[]", "is not a JSON object but list"),
        ('{"count": 9}', "says count=9, but there are 2 rows"),
        ('{"count": [2]}', r"says count=\[2\]"),
    ],
)
def test_a_meta_that_does_not_fit(charts, text, message):
    (charts / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=rf"meta\.json {message}"):
        ChartDirectory(charts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chart": 99}, "chart is 99, there are rows 0 to 1"),
        ({"chart": -1}, "chart is -1"),
        ({"chart": "a"}, "chart is str"),
        ({"responses": None}, "responses is null, not a list"),
        ({"responses": "ab"}, "responses is str"),
        ({"responses": ["a", None]}, "an entry of responses is null"),
        ({"responses": [], "feedback_text": [], "feedback_image": []}, "has no response"),
        ({"feedback_text": [None]}, "an entry of feedback_text is null"),
        ({"feedback_text": []}, "has 2 responses, so it needs 1"),
        ({"feedback_image": [5]}, "an image is 5, not a name"),
        ({"feedback_image": [[None]]}, "an image is None, not a name"),
        ({"feedback_image": ["feedback/none.png"]}, "an image that is not there"),
        ({"gain": None}, "gain is null"),
        ({"gain": float("nan")}, "gain is nan"),
        ({"id": None}, "id is null"),
    ],
)
def test_dialogues_of_the_wrong_kind(charts, change, message):
    row = {"id": "d", "chart": 0, "responses": ["a", "b"], "feedback_text": ["f"]}
    row |= {"feedback_image": [None], "gain": 0.1, "origin": "x"}
    (charts / "dialogues.jsonl").write_text(json.dumps(row) + "\n")
    assert DialogueDirectory(charts)[0].responses == ("a", "b")
    (charts / "dialogues.jsonl").write_text(json.dumps(row | change) + "\n")
    with pytest.raises(ValueError, match=rf"dialogues\.jsonl line 1:? .*{message}"):
        DialogueDirectory(charts)[0]

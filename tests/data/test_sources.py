"""Chart and dialogue directories: whole or not at all, resumed after a kill, errors that name the
bad row.
"""

import dataclasses
import io
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.data import sources, synthetic
from mmrecoder_jax.data.sources import (
    Chart,
    ChartDirectory,
    ChartWriter,
    Dialogue,
    DialogueDirectory,
    DialogueWriter,
)
from mmrecoder_jax.env import Record

RECORD = Record(("Rain",), ((1, 1, 0, 0, 0, 0),), {"bar": 2}, ("bar--#FF0000",))


def make_chart(name: str, shade: int = 0) -> Chart:
    image = sources.png_bytes(np.full((4, 6, 3), shade, np.uint8))
    return Chart(name, image, f"print({shade})\n", RECORD, "Draw it.", "test", "CC0-1.0")


@pytest.fixture
def charts(tmp_path) -> Path:
    sources.write_chart_directory(
        tmp_path / "charts", [make_chart("b", 1), make_chart("a", 2)], {"name": "two"}
    )
    return tmp_path / "charts"


def test_chart_round_trip(charts):
    directory = ChartDirectory(charts)
    assert directory.meta == {"name": "two", "count": 2}
    assert [directory[i] for i in range(len(directory))] == [make_chart("a", 2), make_chart("b", 1)]
    assert pickle.loads(pickle.dumps(directory))[1].id == "b"
    assert ChartDirectory(charts, "Copy this.")[0].instruction == "Copy this."
    assert sorted(path.name for path in charts.iterdir()) == ["charts.jsonl", "images", "meta.json"]
    with pytest.raises(IndexError):
        directory[2]


def test_png_bytes_lays_transparency_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    pixels = np.asarray(Image.open(io.BytesIO(sources.png_bytes(image))))
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
    directory = ChartDirectory(charts)
    with pytest.raises(ValueError, match=r"line 3 is not JSON"):
        directory[2]
    with pytest.raises(ValueError, match=r"line 4 is not an object but list"):
        directory[3]


def test_not_a_chart_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a chart directory"):
        ChartDirectory(tmp_path)


def test_writer_refuses_bad_and_double_ids_and_existing_directories(charts, tmp_path):
    writer = ChartWriter(tmp_path / "new", {})
    writer.add(make_chart("a"))
    for name in ("a", "x/y", "..", ""):
        with pytest.raises(ValueError, match="id "):
            writer.add(make_chart(name))
    with pytest.raises(FileExistsError, match="remove it"):
        ChartWriter(charts, {})


def test_writer_takes_over_what_a_killed_one_left(tmp_path):
    first = ChartWriter(tmp_path / "set", {"seed": 1})
    first.add(make_chart("a"))
    first.add(make_chart("b"))
    journal = tmp_path / "set.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # torn in the middle of the last row
    second = ChartWriter(tmp_path / "set", {"seed": 1})
    assert second.done == {"a"}
    second.add(make_chart("b", 7))
    assert second.finish()[1] == make_chart("b", 7)


def test_writer_starts_anew_for_another_meta(tmp_path):
    ChartWriter(tmp_path / "set", {"seed": 1}).add(make_chart("a"))
    assert ChartWriter(tmp_path / "set", {"seed": 2}).done == set()


def make_dialogue(name: str, chart: Chart, render: bool = True) -> Dialogue:
    image = sources.png_bytes(np.zeros((4, 6, 3), np.uint8)) if render else None
    return Dialogue(name, chart, ("first", "second"), ("Improve it.",), (image,), 0.5, "edited")


def test_dialogue_round_trip(tmp_path):
    dialogues = [
        make_dialogue("2", make_chart("a")),
        make_dialogue("1", make_chart("b"), render=False),
        make_dialogue("3", make_chart("a")),
    ]
    writer = DialogueWriter(tmp_path / "set", {"name": "three"})
    for dialogue in dialogues:
        writer.add(dialogue)
    directory = writer.finish()
    assert [directory[i] for i in range(len(directory))] == sorted(
        dialogues, key=lambda dialogue: dialogue.id
    )
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


def test_build_synthetic(tmp_path, pool):
    seen = []
    charts = sources.build_synthetic(
        tmp_path / "val", "val", 12, 3, pool, lambda done, total: seen.append((done, total))
    )
    assert seen == [(i + 1, 12) for i in range(12)]
    for index in range(12):
        spec = synthetic.chart_spec(3, index, "val")
        chart = charts[index]
        assert chart.code == spec.code()
        assert Image.open(io.BytesIO(chart.image)).size == (168, 112)
        texts = {
            spec.title,
            spec.xlabel,
            spec.ylabel,
            *spec.labels,
            *(spec.categories if spec.kind == "pie" else ()),
        } - {""}
        assert set(chart.record.texts) == texts
        assert len(chart.record.colors) == len(spec.colors)
    before = pool.stats()["requests"]
    assert len(sources.build_synthetic(tmp_path / "val", "val", 12, 3, pool)) == 12
    assert pool.stats()["requests"] == before, "built again though it was there"
    with pytest.raises(ValueError, match=r"other charts \(seed, grammar differ\)"):
        sources.build_synthetic(tmp_path / "val", "val", 12, 4, pool)


BUILD = """
import sys
from mmrecoder_jax.data import sources
from mmrecoder_jax.env import ExecutorPool
with ExecutorPool(sources.synthetic_env(workers=1)) as pool:
    sources.build_synthetic(sys.argv[1], "train", 60, 0, pool, lambda done, total: print(done, flush=True))
"""


def test_build_goes_on_after_a_kill(tmp_path, pool):
    target = tmp_path / "train"
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(target)], stdout=subprocess.PIPE, text=True
    )
    while int(process.stdout.readline()) < 10:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    done = []
    charts = sources.build_synthetic(
        target, "train", 60, 0, pool, lambda number, total: done.append(number)
    )
    assert len(charts) == 60
    assert 0 < len(done) <= 50, "what the killed build had made was used"
    whole = sources.build_synthetic(tmp_path / "whole", "train", 60, 0, pool)
    assert [charts[i] for i in range(60)] == [whole[i] for i in range(60)]
    assert (target / "charts.jsonl").read_bytes() == (
        tmp_path / "whole" / "charts.jsonl"
    ).read_bytes()


def test_chart_that_does_not_run_is_an_error(tmp_path, pool, monkeypatch):
    spec = dataclasses.replace(synthetic.chart_spec(0, 0), colors=("nocolor",) * 5)
    monkeypatch.setattr(synthetic, "chart_spec", lambda *_: spec)
    with pytest.raises(RuntimeError, match=r"train-000000 does not run[\s\S]*nocolor"):
        sources.build_synthetic(tmp_path / "bad", "train", 1, 0, pool)

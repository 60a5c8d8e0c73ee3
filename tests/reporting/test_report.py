"""A run's report from the files that a run leaves: evaluation rows, metrics, trajectories."""

import json
import os
import re
import time

import pytest

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.data.writers import ChartWriter
from mmrecoder_jax.env import Record
from mmrecoder_jax.reporting.report import Report, write_one_file, write_report
from tests.reporting.fake_run import HOSTILE, alarm, fake_run
from tests.reporting.tags import Tags
from tests.reporting.test_trajectories import OLD, SMALL

RECORD = Record(("Rain",), ((1, 1, 0, 0, 0, 0),), {"bar": 2}, ("bar--#FF0000",))


def chart(name):
    return Chart(name, SMALL, "plot()", RECORD, "Draw it.", "test", "CC0-1.0")


def evaluation_row(**changes):
    parts = ("overall", "text", "layout", "type", "color")
    row = {
        **{"policy": "last", "set": "test", "decoding": "greedy", "turn": 1, "charts": 9},
        **{"exec_rate": 0.5, "low_level": 0.25, "low_level_ci": [0.125, 0.5]},
        **dict.fromkeys(parts, 0.25),
    }
    return row | changes


@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "runs" / "tiny")


def called(path):
    """What a file of data gives the page: (name, value)."""
    name, _, rest = path.read_text("ascii").removeprefix("mm(").partition(",")
    return json.loads(name), json.loads(rest.removesuffix(");\n"))


def start_of(page):
    return json.loads(re.search(r'data-name="start">(.*?)</script>', page).group(1))


def test_a_report_has_its_parts_and_a_file_for_every_32_trajectories(run):
    path = write_report(run)
    assert path == str(run / "report.html")
    page = (run / "report.html").read_text("utf-8")
    Tags(page)
    for text in (
        "Training improved it",
        "Turn 2 helped",
        "Training took",
        "<b>reward</b>",
        "about one mill",
    ):
        assert text in page, text
    sources = start_of(page)["sources"]
    assert [source["name"] for source in sources] == [
        "stage2/evaluation/test-greedy/0",
        *(f"stage2/trajectories/{step}" for step in (3, 2, 1)),
        "stage1/evaluation/test-greedy/0",
    ]
    for source, count in zip(sources, (12, 16, 16, 16, 12), strict=True):
        name, entries = called(run / "report" / source["key"] / "list.js")
        assert name == f"{source['key']}/list" and len(entries) == count
        name, details = called(run / "report" / source["key"] / "0.js")
        assert len(details) == count and len(details[0]["turns"]) == 2
        picture = run / details[0]["target"]
        assert picture.is_file() and not os.path.isabs(details[0]["target"])


def test_details_are_cut_into_files(tmp_path):
    run = fake_run(tmp_path / "r", steps=1, groups=20, size=4)
    write_report(run)
    key = next(s["key"] for s in Report(run).sources() if "trajectories" in s["name"])
    sizes = [len(called(run / "report" / key / f"{i}.js")[1]) for i in range(3)]
    assert sizes == [32, 32, 16] and not (run / "report" / key / "3.js").exists()


def test_the_newest_trajectories_are_shown_where_there_are_too_many(run):
    files = Report(run, most=30).files()
    assert [(file.name, count) for file, count in files] == [
        ("stage2/evaluation/test-greedy/0", 12),
        ("stage2/trajectories/3", 16),
        ("stage2/trajectories/2", 2),
    ]


def test_alarms_that_ring_are_red_and_past_ones_below_a_fold(run):
    parts = Report(run).parts()
    assert parts["alarms"].count('class="alarm"') == 1
    assert "stage2 step 50: <b>code_repeat</b> rings" in parts["alarms"]
    assert "all 3 beginnings and ends" in parts["alarms"]
    assert parts["curves"].count('<figure class="red">') == 1
    alarm(run / "stage2", "stage2", 58, "code_repeat", "ends", 0.5)
    parts = Report(run).parts()
    assert "None rings now" in parts["alarms"] and 'class="red"' not in parts["curves"]


def test_one_file_brings_everything_along(run, tmp_path):
    path = write_one_file(run, str(tmp_path / "mail.html"), most=9)
    page = (tmp_path / "mail.html").read_text("utf-8")
    assert path == str(tmp_path / "mail.html") and not (run / "report").exists()
    tags = Tags(page).tags
    blocks = [attrs["data-name"] for tag, attrs in tags if "data-name" in attrs]
    sources = start_of(page)["sources"]
    assert {f"{s['key']}/{part}" for s in sources for part in ("list", "0")} <= set(blocks)
    images = json.loads(re.search(r'data-name="images">(.*?)</script>', page).group(1))
    assert len(images) >= 9 and all(x.startswith("data:image/png;base64,") for x in images.values())
    entries = json.loads(re.search(r'/list">(.*?)</script>', page).group(1))
    assert len(entries) == 3 and entries[0][-2] in images  # a third of nine from each file


def test_a_report_made_anew_replaces_the_old_one_and_nothing_else(run):
    write_report(run)
    before = {path.name for path in (run / "report").iterdir()}
    time.sleep(0.01)
    os.utime(run / "stage2" / "trajectories" / "000003.jsonl")
    write_report(run)
    after = {path.name for path in (run / "report").iterdir()}
    assert len(before) == len(after) == 5 and before != after
    (run / "report" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else than a report"):
        write_report(run)
    assert (run / "report" / "notes.txt").read_text() == "mine"


def test_what_a_model_wrote_never_becomes_a_tag(run):
    write_report(run)
    for path in [run / "report.html", *(run / "report").rglob("*.js")]:
        text = path.read_text("utf-8")
        assert "<img src=x" not in text and "\u202e" not in text
    texts = "".join(path.read_text() for path in (run / "report").rglob("0.js"))
    assert json.dumps(HOSTILE)[1:-1].replace("<", "\\u003c") in texts


def test_a_stage_of_an_earlier_version_finds_its_targets_among_its_charts(tmp_path):
    stage = tmp_path / "stage2"
    (stage / "trajectories" / "renders").mkdir(parents=True)
    (stage / "trajectories" / "renders" / "ab12.png").write_bytes(SMALL)
    (stage / "trajectories" / "000004.jsonl").write_text(json.dumps(OLD) + "\n")
    row = {"stage": "stage2", "step": 1, "reward": 0.5}
    (stage / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (stage / "config.json").write_text(json.dumps({"stage": "stage2", "data": {"dir": ""}}))
    (tmp_path / "data").mkdir()
    charts = ChartWriter(tmp_path / "data" / "train", {})
    charts.add(chart("a"))
    charts.finish()
    report = Report(stage)
    ((written, count),) = report.files()
    (view,) = report.views(written, count)
    assert view.target == tmp_path / "data" / "train" / "images" / "a.png"
    assert report.address(view.target) == "../data/train/images/a.png"
    assert report.details(written, [view], 0)[0]["turns"][0]["render"]


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no run has written there"):
        write_report(tmp_path)

"""ChartMimic's rows in each published layout, and what is wrong with one."""

import csv
import json

import pytest

from mmrecoder_jax.data.chartmimic_rows import read_chartmimic_rows
from mmrecoder_jax.data.synthetic import INSTRUCTION
from tests.data.test_benchmarks import CODE, write_image


@pytest.fixture
def folder(tmp_path):
    """A data set of two charts, with its rows in three layouts."""
    for name in ("bar_1", "line_2"):
        for task in ("direct_600", "customized_600"):
            write_image(tmp_path / task / f"{name}.png")
            (tmp_path / task / f"{name}.py").write_text(CODE + f"\nplt.savefig('{name}.pdf')\n")
    rows = [
        {
            "ExampleID": f"{name}-{task}",
            "Task": f"{task} Mimic",
            "Instruction": f"{task}: draw {name}",
            "InputFigure": f"direct_600/{name}.pdf",
            "GroundTruthFigureCode": f"{task.lower()}_600/{name}.py",
            "Difficulty": "easy",
        }
        for task in ("Direct", "Customized")
        for name in ("bar_1", "line_2")
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(tmp_path / "ChartMimic.tsv", "w", newline="") as file:
        names = ("index", "task", "question", "input_figure", "ground_truth_figure_code")
        table = csv.writer(file, delimiter="\t")
        table.writerow(names)
        for number, row in enumerate(rows):
            table.writerow([number, *list(row.values())[1:5]])
    legacy = [
        {"idx": i, "file": f"direct_600/{name}.pdf", "code": CODE, "width": 6, "height": 4}
        for i, name in enumerate(("bar_1", "line_2"))
    ]
    (tmp_path / "legacy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in legacy))
    return tmp_path


@pytest.mark.parametrize("file", ["test.jsonl", "ChartMimic.tsv"])
@pytest.mark.parametrize("customized", [False, True])
def test_rows_of_a_task(folder, file, customized):
    first, second = read_chartmimic_rows(folder / file, customized, {})
    task = "Customized" if customized else "Direct"
    assert (first.id, second.id) == ("bar_1", "line_2")
    assert first.instruction == f"{task}: draw bar_1"
    assert first.image == folder / "direct_600/bar_1.png"
    assert "savefig('bar_1.pdf')" in first.codes[0]
    assert first.facts == {"kind": "bar"} | ({"task": "customized"} if customized else {})


def test_legacy_rows_hold_the_code_and_no_task(folder):
    first, _ = read_chartmimic_rows(folder / "legacy.jsonl", False, {})
    assert (first.id, first.codes, first.instruction) == ("bar_1", (CODE,), INSTRUCTION)
    bad: list[str] = []
    assert not list(read_chartmimic_rows(folder / "legacy.jsonl", True, {}, bad=bad))
    assert len(bad) == 2 and "it has no instruction" in bad[0]


def test_other_names_of_columns(folder):
    text = (folder / "test.jsonl").read_text().replace("InputFigure", "Picture")
    (folder / "test.jsonl").write_text(text)
    bad: list[str] = []
    assert not list(read_chartmimic_rows(folder / "test.jsonl", False, {}, bad=bad))
    assert "it has no image: looked for InputFigure, input_figure, file; it has" in bad[0]
    found = list(read_chartmimic_rows(folder / "test.jsonl", False, {"image": "Picture"}))
    assert len(found) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"GroundTruthFigureCode": "../secret.py"}, "its code ../secret.py is outside"),
        ({"GroundTruthFigureCode": "none.py"}, "none.py is not there"),
        ({"GroundTruthFigureCode": " "}, "its code is empty"),
        ({"InputFigure": "direct_600/none.pdf"}, "none.png is not there"),
        ({"InputFigure": 3}, "its image is int, not text"),
        ({"ExampleID": None}, "it has no id"),
    ],
)
def test_bad_rows(folder, change, message):
    lines = (folder / "test.jsonl").read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | change)
    (folder / "test.jsonl").write_text("\n".join([*lines, "{no json"]))
    bad: list[str] = []
    found = list(read_chartmimic_rows(folder / "test.jsonl", False, {}, bad=bad))
    assert [raw.id for raw in found] == ["line_2"]
    assert "test.jsonl line 1: " in bad[0] and message in bad[0]
    assert "line 5 is not JSON" in bad[1]

"""Chart2Code's five task lists as they are published, and what is wrong with a row."""

import json

import pytest

from mmrecoder_jax.data.chart2code_tasks import Level, read_chart2code_level
from mmrecoder_jax.data.rows import RowError
from mmrecoder_jax.data.synthetic import INSTRUCTION
from tests.data.test_benchmarks import CODE, write_image


def task(level: Level) -> dict:
    """A row with the published keys, blanks around them included."""
    folder = level.published
    row = {"task_id": "t1", "input image": f"{folder}/in.png", "GT code": f"{folder}/bar_1.py"}
    if level is not Level.DIRECT:
        row |= {" instruction ": f"{folder}/ask.txt", "GT image": f"{folder}/bar_1.png"}
    if level is Level.CUSTOMIZE:
        row["input data"] = f"{folder}/data.txt"
    if level is Level.FIGURE:
        row["input image_2"] = f"{folder}/in_2.png"
    if level is Level.TABLE:
        row[" input excel"] = f"{folder}/table.csv"
    return row


def write(root, level: Level, *changes: dict):
    """The folder of a level and its list, with a row per change."""
    folder = root / level.published
    for name in ("in.png", "in_2.png", "bar_1.png"):
        write_image(folder / name)
    (folder / "bar_1.py").write_text(CODE)
    (folder / "ask.txt").write_text("\ufeffDraw it in red.\n", encoding="utf-8")
    (folder / "data.txt").write_text("Jan 3\n")
    (folder / "table.csv").write_text("month,mm\nJan,3\n")
    path = root / f"{level.published}.json"
    path.write_text(json.dumps([task(level) | change for change in changes or ({},)]))
    return path


@pytest.mark.parametrize("level", Level)
def test_a_list_of_each_level(tmp_path, level):
    (raw,) = read_chart2code_level(write(tmp_path, level), level, {}, tmp_path / "unpacked")
    assert raw.id == "bar_1" and raw.codes == (CODE,)
    assert raw.image == tmp_path / level.published / "in.png"
    assert raw.facts == {"kind": level.published, "task": str(level)}
    more = (tmp_path / level.published / "in_2.png",) if level is Level.FIGURE else ()
    assert raw.more_images == more
    if level is Level.DIRECT:
        assert raw.instruction == INSTRUCTION
    else:
        assert "Request:\nDraw it in red." in raw.instruction
    assert ("Data:\nJan 3" in raw.instruction) == (level is Level.CUSTOMIZE)
    assert ("Table:\nmonth,mm\nJan,3" in raw.instruction) == (level is Level.TABLE)


def test_tasks_of_one_reference_name_stay_apart(tmp_path):
    level = Level.EDIT
    path = write(tmp_path, level, {}, {"task_id": "t2"})
    first, second = read_chart2code_level(path, level, {}, tmp_path)
    assert first.id == "bar_1" and "bar_1_t2_-" in second.id


@pytest.mark.parametrize(
    "level, change, message",
    [
        (Level.DIRECT, {"GT code": "/etc/passwd.py"}, "is outside"),
        (Level.DIRECT, {"GT code": None}, "it has no 'GT code'; it has 'task_id'"),
        (Level.EDIT, {" instruction ": "none.txt"}, "none.txt is not there"),
        (Level.FIGURE, {"input image_2": ""}, "it has no 'input image_2'"),
        (Level.TABLE, {" input excel": None}, "it has no table: looked for 'input excel' and"),
        (Level.TABLE, {" input excel": "level3/bar_1.py"}, None),
    ],
)
def test_bad_rows(tmp_path, level, change, message):
    bad: list[str] = []
    path = write(tmp_path, level, change, {"task_id": "good"})
    raws = list(read_chart2code_level(path, level, {}, tmp_path, bad=bad))
    if message is None:
        assert len(raws) == 2 and not bad
        return
    assert len(raws) == 1
    assert f"{path} row 0: " in bad[0] and message in bad[0]


def test_rows_that_are_no_objects(tmp_path):
    path = tmp_path / "level2.json"
    path.write_text("[3]")
    with pytest.raises(ValueError, match="row 0: it is int, not an object"):
        list(read_chart2code_level(path, Level.EDIT, {}, tmp_path))


def test_parquet_of_direct(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_image(tmp_path / "in.png", 7)
    picture = {"bytes": (tmp_path / "in.png").read_bytes(), "path": "in.png"}
    table = {
        "task_id": ["t1"],
        "input_chart_image": [picture],
        "chart_type": ["bar"],
        "python_code": [CODE],
    }
    path = tmp_path / "level1_direct.parquet"
    parquet.write_table(pyarrow.table(table), path)
    (raw,) = read_chart2code_level(path, Level.DIRECT, {}, tmp_path / "unpacked")
    assert raw.id == "t1" and raw.codes == (CODE,)
    assert raw.image is not None and raw.image.read_bytes() == picture["bytes"]


def test_unknown_parquet_columns_are_asked_for(tmp_path):
    with pytest.raises(RowError, match=r"columns of level2 are not known.*--columns="):
        list(read_chart2code_level(tmp_path / "level2.parquet", Level.EDIT, {}, tmp_path))

"""Published data: readers on small files of the published schemas, and the way into a directory."""

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.data.benchmarks import (
    RawChart,
    Skipped,
    import_charts,
    read_chart2code,
    read_chartmimic,
    read_chartx,
    read_plot2code,
)
from mmrecoder_jax.data.synthetic import INSTRUCTION

CODE = (
    "import matplotlib.pyplot as plt\nplt.bar([1, 2], [3, 4], color='red')\nplt.title('Rain')\n"
    "plt.show()"
)


def write_image(path: Path, shade: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(path)


def llava(name, answer=f"```python\n{CODE}\n```", **changes) -> dict:
    turns = [
        {"from": "human", "value": "<image>\nRedraw the chart."},
        {"from": "gpt", "value": answer},
    ]
    return {"id": name, "image": f"images/{name}.png", "conversations": turns} | changes


def chartx(name, **changes) -> dict:
    row = {
        "chart_type": "bar_chart",
        "imgname": name,
        "img": f"./bar_chart/png/{name}.png",
        "topic": "t",
        "title": "Rain",
    }
    row |= {
        "csv": "a \\t b \\n 1 \\t 2",
        "redrawing": {"input": "Redraw.", "output": CODE},
        "QA": {"input": "", "output": ""},
    }
    return row | changes


def test_chart2code(tmp_path):
    more = llava(2)
    more["conversations"] += [
        {"from": "human", "value": "And now?"},
        {"from": "gpt", "value": "Nothing."},
    ]
    (tmp_path / "chart2code.json").write_text(json.dumps([llava("a/b"), more]))
    write_image(tmp_path / "images/a/b.png")
    write_image(tmp_path / "images/2.png")
    first, second = read_chart2code(tmp_path / "chart2code.json")
    assert re.fullmatch(r"a_b-[0-9a-f]{10}", first.id)
    assert first.codes == (CODE,)
    assert first.instruction == "Redraw the chart."
    assert first.image == tmp_path / "images/a/b.png"
    assert second.id == "2"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "chart2code.json").rename(tmp_path / "elsewhere/chart2code.json")
    assert len(list(read_chart2code(tmp_path / "elsewhere/chart2code.json", images=tmp_path))) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "image": "images/a.png"}, "no field conversations"),
        (
            llava("x", conversations=[{"from": "gpt", "value": "hi"}]),
            "does not start with human, gpt but with \\['gpt'\\]",
        ),
        (llava("x", conversations="hi"), "does not start with human, gpt"),
        (
            llava("x", conversations=[{"from": "human"}, {"from": "gpt", "value": "hi"}]),
            "no field value",
        ),
        (llava("x", "```bash\nls\n```"), "its code is empty"),
        (llava("x", ""), "its code is empty"),
        (llava("x", 3), "its code is int, not text"),
        (llava("x"), "images/x.png is not there"),
        (llava("x", image="../../etc/passwd"), "is outside"),
        (llava("x", image=None), "image is None, not a relative path"),
        (llava("a"), "its id a was there before"),
        ("text", "no field conversations"),
    ],
)
def test_bad_chart2code_rows(tmp_path, row, message):
    write_image(tmp_path / "images/a.png")
    path = tmp_path / "chart2code.json"
    path.write_text(json.dumps([llava("a"), row, llava("a", id="last")]))
    with pytest.raises(ValueError, match=rf"chart2code.json row 1: .*{message}"):
        list(read_chart2code(path))
    bad = []
    assert [raw.id for raw in read_chart2code(path, bad=bad)] == ["a", "last"]
    assert len(bad) == 1


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("{}", "is not a JSON list but dict")]
)
def test_file_that_is_no_list(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_chartx(tmp_path / "rows.json"))


def test_chartmimic(tmp_path):
    for name in ("bar_2", "bar_10", "3d_1"):
        (tmp_path / f"{name}.py").write_text(
            CODE + f"\nplt.savefig('{name}.pdf', bbox_inches='tight')\n"
        )
        write_image(tmp_path / f"{name}.png")
    raws = list(read_chartmimic(tmp_path))
    assert [raw.id for raw in raws] == ["3d_1", "bar_10", "bar_2"]
    assert raws[0].image == tmp_path / "3d_1.png"
    assert [raw.facts["kind"] for raw in raws] == ["3d", "bar", "bar"]
    (tmp_path / "bar_2.png").unlink()
    with pytest.raises(ValueError, match=r"bar_2.py: its image .*bar_2.png is not there"):
        list(read_chartmimic(tmp_path))
    with pytest.raises(FileNotFoundError, match="direct_600"):
        list(read_chartmimic(tmp_path / "none"))


def test_plot2code(tmp_path):
    rows = [
        {"file_name": f"ground_truth_image_{i}.png", "code": CODE, "instruction": "a bar chart"}
        for i in range(2)
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(2):
        write_image(tmp_path / f"ground_truth_image_{i}.png")
    raws = list(read_plot2code(tmp_path))
    assert [raw.id for raw in raws] == ["ground_truth_image_0", "ground_truth_image_1"]
    assert raws[0].instruction == INSTRUCTION
    conditional = next(read_plot2code(tmp_path, conditional=True))
    assert conditional.instruction == f"a bar chart\n\n{INSTRUCTION}"
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "ground_truth_image_0.png"}\n{not json\n')
    bad = []
    assert len(list(read_plot2code(tmp_path, bad))) == 2
    assert "metadata.jsonl line 3: it has no field code" in bad[0]
    assert "line 4 is not JSON" in bad[1]


def test_chartx(tmp_path):
    write_image(tmp_path / "bar_chart/png/bar_87.png")
    (tmp_path / "ChartX_annotation.json").write_text(
        json.dumps([chartx("bar_87"), chartx("bar_88", redrawing={"input": ""})])
    )
    bad = []
    (raw,) = read_chartx(tmp_path / "ChartX_annotation.json", bad=bad)
    assert raw.id == "bar_chart-bar_87"
    assert raw.codes == (CODE,)
    assert raw.facts == {"kind": "bar_chart", "title": "Rain", "csv": "a \\t b \\n 1 \\t 2"}
    assert bad == [f"{tmp_path / 'ChartX_annotation.json'} row 1: it has no field redrawing.output"]


def raw_chart(name: str, *codes: str, image: Path | None = None) -> RawChart:
    return RawChart(name, codes, image, f"test/{name}", "CC0-1.0")


def test_import(tmp_path, pool):
    write_image(tmp_path / "gray.png", 128)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    raws = [
        raw_chart("drawn", CODE),
        raw_chart("given", CODE, image=tmp_path / "gray.png"),
        raw_chart("second", "1 / 0", CODE.replace("red", "blue")),
        raw_chart("same", CODE + "\n"),
        raw_chart("crash", "1 / 0", "import nothing_of_that_name"),
        raw_chart("nothing", "x = 1"),
        raw_chart("empty", "import matplotlib.pyplot as plt\nplt.figure()"),
        raw_chart("words", "import matplotlib.pyplot as plt\nplt.title('Rain')"),
        raw_chart("unread", CODE, image=tmp_path / "broken.png"),
        dataclasses.replace(
            raw_chart("two", CODE.replace("red", "green")), more_images=(tmp_path / "gray.png",)
        ),
    ]
    calls = []
    earlier = [Skipped("test/animated", "is an animation")]
    attachments = {"LICENSE.test": "Free."}
    charts = import_charts(
        tmp_path / "out",
        raws,
        pool,
        {"name": "x"},
        earlier,
        attachments,
        curate=True,
        progress=lambda *call: calls.append(call),
    )
    got = {chart.id: chart for chart in charts}
    assert list(got) == ["drawn", "given", "second", "two"]
    assert Image.open(io.BytesIO(got["two"].more_images[0])).size == (6, 4)
    assert got["drawn"].record.texts == ("Rain",)
    assert got["drawn"].record.types == {"bar": 1}
    assert Image.open(io.BytesIO(got["given"].image)).size == (6, 4), (
        "the published image stays, only the record comes from the code"
    )
    assert got["second"].code == raws[2].codes[1]
    assert calls == [(i + 1, len(raws)) for i in range(len(raws))]
    skipped = {
        row["source"]: row["reason"]
        for row in map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    }
    assert skipped["test/animated"] == "is an animation"
    assert skipped["test/same"] == "same image as test/drawn"
    assert skipped["test/crash"].startswith(
        "error: ModuleNotFoundError: No module named 'nothing_of_that_name'"
    )
    assert skipped["test/nothing"].startswith("no_figure:")
    assert skipped["test/words"] == "no chart type in it"
    assert skipped["test/unread"].startswith(
        f"its image is bad: {tmp_path / 'broken.png'} cannot be read: it begins as no image"
    )
    assert len(skipped) == 7
    assert (tmp_path / "out/LICENSE.test").read_text() == "Free."
    assert len(list((tmp_path / "out/images").iterdir())) == 4


def test_a_benchmark_is_taken_as_it_is(tmp_path, pool):
    codes = [CODE, CODE + "\n", "import matplotlib.pyplot as plt\nplt.title('Rain')"]
    charts = import_charts(
        tmp_path / "out",
        [raw_chart(str(i), code) for i, code in enumerate(codes)],
        pool,
        {"name": "x"},
    )
    assert [chart.code for chart in charts] == codes


def test_ids_keep_their_identity(tmp_path, pool):
    ids = ["图表_1", "柱状图_1", "图", "a b", "a_b", "a/b", "", "..", 7, "7", 1.5, "A", "a"]
    ids += ["x" * 200 + "1", "x" * 200 + "2"]
    write_image(tmp_path / "a.png")
    rows = [llava(name, image="a.png") for name in ids]
    wrong = [llava(name, image="a.png") for name in (None, {"k": 1}, True, "A", 7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows + wrong))
    bad: list[str] = []
    raws = list(read_chart2code(tmp_path / "rows.json", bad=bad))
    assert len({raw.id.lower() for raw in raws}) == len(ids)
    assert [raw.source for raw in raws] == [f"Chart2Code-160k/{name}" for name in ids]
    assert [re.sub(r".* row \d+: its id (is )?", "", said) for said in bad] == [
        "null, neither text nor a number",
        '{"k": 1}, neither text nor a number',
        "true, neither text nor a number",
        "A was there before",
        "7 was there before",
    ]
    raws += [raws[0], raw_chart(raws[1].id, CODE)]
    charts = import_charts(tmp_path / "out", raws, pool, {"name": "x"})
    assert len(charts) == len(ids)
    assert (tmp_path / "out/skipped.jsonl").read_text().count("is that of") == 1


def test_scripts_of_other_encodings(tmp_path):
    cafe = "\nplt.title('Café')\n"
    scripts = {"a": b"\xef\xbb\xbf" + CODE.encode(), "b": CODE.replace("\n", "\r\n").encode()}
    scripts["c"] = b"# coding: latin-1\n" + (CODE + cafe).encode("latin-1")
    scripts["d"] = (CODE + cafe).encode("latin-1")
    for name, data in scripts.items():
        (tmp_path / f"{name}.py").write_bytes(data)
        write_image(tmp_path / f"{name}.png")
    bad: list[str] = []
    raws = list(read_chartmimic(tmp_path, bad))
    assert [raw.codes[0] for raw in raws] == [CODE, CODE, f"# coding: utf-8\n{CODE}{cafe.rstrip()}"]
    assert len(bad) == 1 and "d.py cannot be read" in bad[0]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_marks_and_lines_where_a_list_is_wanted(tmp_path, mark):
    write_image(tmp_path / "a.png")
    row = json.dumps(llava("a", image="a.png")).encode()
    (tmp_path / "rows.json").write_bytes(mark + b"[" + row + b"]")
    assert [raw.id for raw in read_chart2code(tmp_path / "rows.json")] == ["a"]
    (tmp_path / "rows.json").write_bytes(mark + row + b"\n" + row + b"\n")
    with pytest.raises(ValueError, match=r"rows\.json is not JSON: .*line 2 begins.*jq -s"):
        list(read_chart2code(tmp_path / "rows.json"))
    (tmp_path / "metadata.jsonl").write_bytes(
        mark + json.dumps({"file_name": "a.png", "code": CODE}).encode() + b"\r\n\r\n"
    )
    assert [raw.id for raw in read_plot2code(tmp_path)] == ["a"]


def test_a_killed_import_of_other_rows_is_no_beginning(tmp_path, pool):
    class Killed(Exception):
        pass

    def kill(done, total):
        raise Killed

    def raw(name, code):
        return RawChart(name, (code,), None, "s", "l")

    out, other = tmp_path / "out", CODE.replace("Rain", "Snow")
    with pytest.raises(Killed):
        import_charts(out, [raw("a", CODE), raw("b", CODE)], pool, {"name": "x"}, progress=kill)
    assert (tmp_path / "out.partial").is_dir()
    charts = import_charts(out, [raw("a", other), raw("b", other)], pool, {"name": "x"})
    assert [chart.code for chart in charts] == [other, other]

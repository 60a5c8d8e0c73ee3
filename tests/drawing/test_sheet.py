from mmrecoder_jax.drawing.sheet import Section, write_sheet
from tests.reporting.tags import Tags

HOSTILE = "</title><script>alert(1)</script><img src=x onerror='f()'> \u202e \x00 \ud800"


def test_hostile_text_stays_text(tmp_path):
    path = tmp_path / "index.html"
    write_sheet(
        path,
        title=HOSTILE,
        banner=HOSTILE,
        facts={HOSTILE: HOSTILE},
        sections=[Section(HOSTILE, "")],
    )
    page = path.read_text("utf-8")
    tags = Tags(page).tags
    assert not {"script", "img"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert not set(page) & set("\u202e\x00\ud800")


def test_a_page_is_one_file_that_loads_and_runs_nothing(tmp_path):
    sections = [Section("Drawing", "<p>one</p>"), Section("Code", "")]
    write_sheet(
        tmp_path / "index.html", title="bar", banner="b", facts={"turns": 4}, sections=sections
    )
    page = (tmp_path / "index.html").read_text("utf-8")
    tags = Tags(page).tags
    assert [attrs["href"] for _, attrs in tags if "href" in attrs] == ["#part0", "#part1"]
    policy = next(attrs["content"] for _, attrs in tags if "http-equiv" in attrs)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "<dt>turns</dt><dd>4</dd>" in page and "<dt>written</dt>" in page
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]

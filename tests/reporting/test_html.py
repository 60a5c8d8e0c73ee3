from mmrecoder_jax.reporting.html import Section, figure_html, write_report
from mmrecoder_jax.reporting.tables import table_html
from mmrecoder_jax.reporting.trajectories import TrajectoryView, TurnView, trajectories_html
from tests.reporting.tags import Tags
from tests.reporting.test_trajectories import SMALL

HOSTILE = (
    "</pre></details><script>alert(1)</script><img src=http://x onerror='alert(2)'> "
    "\u202e\u2066 \x00\x1b \ud800"
)


def test_hostile_text_stays_text(tmp_path):
    code = f"```python\n{HOSTILE}\n```"
    turns = [
        TurnView(code, HOSTILE, HOSTILE, None, {"overall": 0.5, HOSTILE: 0.5}, 0.5),
        TurnView(HOSTILE, HOSTILE, HOSTILE, None, {"overall": 0.0}, None),
    ]
    views = trajectories_html([TrajectoryView(HOSTILE, SMALL, turns)], HOSTILE)
    table = table_html([{HOSTILE: HOSTILE}])
    write_report(
        tmp_path / "report.html",
        title=HOSTILE,
        banner=HOSTILE,
        facts={HOSTILE: HOSTILE},
        sections=[Section(HOSTILE, figure_html(SMALL, HOSTILE) + views + table)],
    )
    page = (tmp_path / "report.html").read_text("utf-8")
    tags = Tags(page).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert all(attrs["src"].startswith("data:image/png;") for tag, attrs in tags if tag == "img")
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert not set(page) & set("\u202e\u2066\x00\x1b\ud800")
    assert "\\u202e" in page and "\\ud800" in page


def test_a_report_is_one_file_that_loads_nothing(tmp_path):
    write_report(
        tmp_path / "report.html",
        title="tiny",
        banner="not the paper's numbers",
        facts={"seed": 0},
        sections=[Section("Curves", figure_html(b"<svg/>", "stage1")), Section("Rest", "")],
    )
    page = (tmp_path / "report.html").read_text("utf-8")
    tags = Tags(page).tags
    sources = [attrs["src"] for tag, attrs in tags if tag == "img"]
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")
    assert [attrs["href"] for _, attrs in tags if "href" in attrs] == ["#part0", "#part1"]
    policy = next(attrs["content"] for _, attrs in tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "not the paper&#x27;s numbers" in page
    assert "<dt>seed</dt><dd>0</dd>" in page and "<dt>written</dt>" in page
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]

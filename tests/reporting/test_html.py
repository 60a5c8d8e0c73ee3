import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmrecoder_jax.reporting.curves import metrics_curves
from mmrecoder_jax.reporting.html import (
    MAX_LINES,
    Section,
    TrajectoryView,
    TurnView,
    figure_html,
    format_table,
    png_bytes,
    summary_table_html,
    trajectory_gallery_html,
    write_report,
)
from tests.reporting.test_curves import curve_rows

SMALL = png_bytes(np.full((4, 6, 3), 200, np.uint8))


def turn(code, overall=0.5, status="ok", response=None, error=""):
    response = f"<think>why</think>\n```python\n{code}\n```" if response is None else response
    return TurnView(
        response,
        code,
        status,
        error,
        SMALL if status == "ok" else None,
        {"overall": overall},
        overall,
    )


def view(*turns):
    return TrajectoryView("test-1", SMALL, list(turns))


class Tags(HTMLParser):
    """Every tag with its attributes, and whether open and close tags match."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def marks(listing):
    return re.findall(r'<span class="line ([a-z ]*)" data-mark="(.)">(.*)\n', listing)


def test_png_bytes_keeps_pixels_and_shrinks_long_sides():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(pixels)))), pixels)
    assert Image.open(io.BytesIO(png_bytes(pixels, max_side=20))).size == (20, 15)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_png_bytes_refuses_what_is_no_picture(image):
    with pytest.raises(ValueError, match="uint8 \\[height, width, 3\\]"):
        png_bytes(image)


def test_format_table_aligns_groups_numbers_and_intervals():
    rows = [
        {
            "after": "cold start",
            "turn 1/exec": 0.97,
            "turn 1/low": (0.5, 0.4, 0.6),
            "repeat %": 21.62,
            "n": np.int64(8),
        },
        {"after": "stage 1", "turn 1/exec": 1.0, "repeat %": math.nan, "n": 16},
    ]
    assert format_table(rows).splitlines() == [
        "            turn 1",
        "after        exec                   low  repeat %   n",
        "cold start  0.970  0.500 [0.400, 0.600]      21.6   8",
        "stage 1     1.000                     -         -  16",
    ]
    assert format_table(rows, ["n", "after"]).splitlines() == [
        " n  after",
        " 8  cold start",
        "16  stage 1",
    ]


def test_format_table_widens_a_column_under_a_longer_group():
    assert format_table([{"a": "x", "self-correction/n": 1, "z": "y"}]).splitlines() == [
        "   self-correction",
        "a                n  z",
        "x                1  y",
    ]


def test_summary_table_spans_groups_and_escapes():
    table = summary_table_html(
        [{"after": "<b>", "turn 1/exec": 0.97, "turn 1/low": (0.5, 0.4, 0.6), "turn 2/exec": None}]
    )
    spans = [(attrs["colspan"]) for tag, attrs in Tags(table).tags if "colspan" in attrs]
    assert spans == ["1", "2", "1"]
    assert "&lt;b&gt;" in table and "<b>" not in table
    assert "0.500<small>0.400 … 0.600</small>" in table and ">-</td>" in table


@pytest.mark.parametrize(
    "first, last, labels",
    [
        (turn("a", 0.5), turn("b", 0.6), ["improved"]),
        (turn("a", 0.5), turn("b", 0.4), ["regressed"]),
        (turn("a", 0.5), turn(" a\n", 0.5), ["repeated"]),
        (turn("a", 0.5), turn("b", 0.0, "error"), ["regressed", "failed"]),
        (turn("a", 0.0, "timeout"), turn("b", 0.9), ["repaired", "failed"]),
        (turn(None, 0.0, "no_code", "hm"), turn(None, 0.0, "no_code", "hm"), ["failed"]),
        (turn("a", 0.5), turn("b", 0.5), []),
    ],
)
def test_labels(first, last, labels):
    assert view(first, last).labels() == labels


def test_overall_is_the_mean_of_the_parts_where_it_is_not_given():
    assert TurnView("", "", "ok", "", None, {"text": 1.0, "color": 0.5}, None).overall == 0.75
    assert TurnView("", "", "ok", "", None, {}, None).overall == 0.0


def test_gallery_has_images_counts_and_the_diff():
    page = trajectory_gallery_html(
        [view(turn("import x\na = 1\nshow()", 0.5), turn("import x\na = 2\nb = 3\nshow()", 0.6))],
        "Held-out",
    )
    tags = Tags(page).tags
    assert [attrs["src"] for tag, attrs in tags if tag == "img"] == [
        "data:image/png;base64," + base64.b64encode(SMALL).decode()
    ] * 3
    assert [attrs["data-labels"] for tag, attrs in tags if tag == "article"] == ["improved"]
    assert "improved 1<" in page and "all 1<" in page and "+0.100" in page
    assert [
        attrs["data-show"] for tag, attrs in tags if tag == "button" and "disabled" in attrs
    ] == [
        "regressed",
        "repaired",
        "repeated",
        "failed",
    ]
    first, second = re.findall(r'<pre class="code">(.*?)</pre>', page, re.S)
    assert marks(first) == [("", " ", "import x"), ("old", "-", "a = 1"), ("", " ", "show()")]
    assert marks(second) == [
        ("", " ", "import x"),
        ("new", "+", "a = 2"),
        ("new", "+", "b = 3"),
        ("", " ", "show()"),
    ]
    assert '<pre class="thought">why</pre>' in page


def test_a_middle_turn_is_marked_against_both_neighbours():
    page = trajectory_gallery_html([view(turn("a"), turn("b"), turn("c"))], "Held-out")
    listings = re.findall(r'<pre class="code">(.*?)</pre>', page, re.S)
    assert [marks(listing) for listing in listings] == [
        [("old", "-", "a")],
        [("new old", "±", "b")],
        [("new", "+", "c")],
    ]


def test_a_failed_turn_shows_its_error_and_a_response_without_code_is_shown_whole():
    failed = turn("x(", 0.0, "error", error="line 1: bad <syntax>")
    silent = turn(None, 0.0, "no_code", response="I cannot.")
    page = trajectory_gallery_html([view(failed, silent)], "Held-out")
    assert "line 1: bad &lt;syntax&gt;" in page and "<b>no_code</b>" in page and "I cannot." in page


HOSTILE = "</pre></details><script>alert(1)</script><img src=http://x onerror='alert(2)'> \u202e\u2066 \x00\x1b \ud800"


def test_hostile_text_stays_text(tmp_path):
    bad = TurnView(HOSTILE, HOSTILE, HOSTILE, HOSTILE, None, {HOSTILE: 0.5}, 0.5)
    views = [
        TrajectoryView(
            HOSTILE, SMALL, [bad, TurnView(HOSTILE, None, HOSTILE, HOSTILE, None, {}, None)]
        )
    ]
    sections = [
        Section(
            HOSTILE,
            trajectory_gallery_html(views, HOSTILE) + summary_table_html([{HOSTILE: HOSTILE}]),
        )
    ]
    page = write_report(
        tmp_path / "report.html",
        title=HOSTILE,
        banner=HOSTILE,
        facts={HOSTILE: HOSTILE},
        sections=sections,
    ).read_text("utf-8")
    tags = Tags(page).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert all(attrs["src"].startswith("data:image/png;") for tag, attrs in tags if tag == "img")
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    assert (
        not set(page) & set("\u202e\u2066\x00\x1b\ud800")
        and "\\u202e" in page
        and "\\ud800" in page
    )


def test_long_code_and_long_text_are_cut_with_a_note():
    page = trajectory_gallery_html(
        [view(turn("\n".join(["a"] * (MAX_LINES + 5)), response="w" * 100_000))], "Held-out"
    )
    assert "… 5 more lines" in page and "… 80000 more characters" in page and len(page) < 80_000


@pytest.mark.parametrize(
    "target, turns, what", [(b"<svg>", [turn("a")], "no PNG"), (SMALL, [], "no turns")]
)
def test_a_trajectory_that_cannot_be_shown_is_named(target, turns, what):
    with pytest.raises(ValueError, match=f"'test-7'.*{what}"):
        TrajectoryView("test-7", target, turns)


def test_report_is_one_file_that_loads_nothing(tmp_path):
    curves = figure_html(metrics_curves(curve_rows("stage1", 3), "stage1"), "stage1")
    path = write_report(
        tmp_path / "report.html",
        title="tiny",
        banner="not the paper's numbers",
        facts={"seed": 0},
        sections=[Section("Curves", curves)],
    )
    page = path.read_text("utf-8")
    tags = Tags(page).tags
    assert [attrs["src"][:26] for tag, attrs in tags if tag == "img"] == [
        "data:image/svg+xml;base64,"
    ]
    assert not any("href" in attrs and not attrs["href"].startswith("#") for _, attrs in tags)
    policy = next(
        attrs["content"]
        for tag, attrs in tags
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert (
        "not the paper&#x27;s numbers" in page
        and "<dt>seed</dt><dd>0</dd>" in page
        and "<dt>written</dt>" in page
    )
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]

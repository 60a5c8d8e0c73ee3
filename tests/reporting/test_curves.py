import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from mmrecoder_jax.reporting.curves import curves_html


def curve_rows(steps, **more):
    values = {"reward": 0.55, "turn1/reward": 0.5, "turn2/reward": 0.6, "seconds/step": 1.0}
    return [
        {"stage": "stage1", "step": step, "time": 0.0, "loss": 1 / step, **values, **more}
        for step in range(1, steps + 1)
    ]


def panels(html):
    """(title, keys, whether it is red, picture) of every panel, in order."""
    root = ElementTree.fromstring(f"<div>{html}</div>")
    return [
        (
            figure.find("figcaption/b").text,
            [key.text.strip() for key in figure.findall("figcaption/span")],
            figure.get("class") == "red",
            figure.find("svg"),
        )
        for figure in root.iter("figure")
    ]


@pytest.mark.parametrize("steps", [1, 30, 200])
def test_curves_have_a_panel_for_all_turns_and_a_line_per_metric(steps):
    found = panels(curves_html(curve_rows(steps), {}, "stage1"))
    assert [(title, keys) for title, keys, *_ in found] == [
        ("reward", ["0.55", "turn1 0.5", "turn2 0.6"]),
        ("loss", ["1" if steps == 1 else f"{1 / steps:.3g}"]),
        ("seconds", ["step 1"]),
    ]


def test_an_evaluation_has_a_panel_for_each_number():
    names = [f"eval/greedy/turn{t}/{name}" for t in (1, 2) for name in ("low_level", "text")]
    more = dict.fromkeys((*names, "eval/sampled/improvement"), 0.25)
    found = [
        (title, keys) for title, keys, *_ in panels(curves_html(curve_rows(2, **more), {}, "s"))
    ]
    assert found[1] == ("eval low level", ["greedy turn1 0.25", "greedy turn2 0.25"])
    assert ("eval improvement", ["sampled 0.25"]) in found
    assert ("eval text", ["greedy turn1 0.25", "greedy turn2 0.25"]) in found


def test_what_the_machine_did_is_below_a_fold():
    first, _, fold = curves_html(curve_rows(3), {}, "stage1").partition("<details")
    assert "<b>loss</b>" in first and "<b>seconds</b>" not in first and "<b>seconds</b>" in fold


def test_gaps_are_borne_and_the_newest_number_is_the_last_that_is_one():
    rows = curve_rows(50)
    rows[3]["loss"] = rows[-1]["loss"] = None
    rows[4]["loss"] = math.nan
    del rows[5]["turn2/reward"]
    html = curves_html(rows, {}, "stage1")
    assert "nan" not in html and "0.0204" in html  # 1 / 49


def test_the_panel_of_an_alarm_that_rings_is_red_and_has_its_threshold():
    rows = curve_rows(20, **{"turn1/forged": 0.01, "turn1/thought": 50.0, "code_repeat": 0.1})
    ringing = {"forged": 0.0, "thought_length": 2.0}
    found = {
        title: (red, "limit" in ElementTree.tostring(svg, "unicode"))
        for title, _, red, svg in panels(curves_html(rows, ringing, "stage1"))
    }
    assert found["forged"] == (True, True)
    assert found["thought"] == (True, False)  # a factor is on no axis of thoughts
    assert found["code repeat"] == found["reward"] == (False, False)


def test_a_turn_has_one_colour_in_all_panels():
    html = curves_html(curve_rows(3, **{"turn2/text": 0.5, "turn1/text": 0.25}), {}, "s")
    root = ElementTree.fromstring(f"<div>{html}</div>")
    colors = {
        (figure.find("figcaption/b").text, key.text.split()[0]): key.get("class")
        for figure in root.iter("figure")
        for key in figure.findall("figcaption/span")
    }
    for panel in ("reward", "text"):
        assert (colors[panel, "turn1"], colors[panel, "turn2"]) == ("key c0", "key c1")
    assert (colors["reward", "0.55"], colors["loss", "0.333"]) == ("key c2", "key c0")


def test_what_was_0_at_every_step_is_one_sentence_unless_an_alarm_rings():
    more = {"turn1/forged": 0.0, "turn2/forged": 0.0, "turn1/blank": 0.0, "<x>": 0.0}
    rows = curve_rows(3, **more)
    rows[0]["turn2/blank"] = 0.5
    html = curves_html(rows, {}, "s")
    titles = [title for title, *_ in panels(html)]
    assert "blank" in titles and "forged" not in titles
    assert "0 at every step: &lt;x&gt;, forged." in html
    rung = curves_html(rows, {"forged": 0.0}, "s")
    assert "forged" in [title for title, *_ in panels(rung)] and "step: &lt;x&gt;." in rung


def test_a_metric_of_any_name_is_escaped():
    html = curves_html(curve_rows(3, **{"<b>/<i>": 1.0}), {}, "<s>")
    assert "<i>" not in html and "&lt;i&gt;" in html and "<s>" not in html


@pytest.mark.parametrize("module", ["tables", "page", "curves", "trajectories", "workdir", "svg"])
def test_the_room_starts_neither_pyplot_nor_jax(module):
    code = (
        f"import sys, mmrecoder_jax.reporting.{module}\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_long_curves_are_pale_below_their_mean_and_bounded():
    short, long = (curves_html(curve_rows(steps), {}, "s") for steps in (30, 20_000))
    assert "pale" not in short and long.count("pale") == 5
    places = [len(re.findall(r"L", path)) for path in re.findall(r' d="(M[^"]*)"', long)]
    assert max(places) < 240

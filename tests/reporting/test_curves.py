import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from mmrecoder_jax.reporting.curves import metrics_curves


def curve_rows(stage, steps):
    values = {"reward": 0.55, "turn1/reward": 0.5, "turn2/reward": 0.6, "seconds/step": 1.0}
    return [
        {"stage": stage, "step": step, "time": 0.0, "loss": 1 / step, **values}
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("steps", [1, 30, 200])
def test_curves_have_a_panel_for_all_turns_and_a_line_per_metric(steps):
    svg = metrics_curves(
        [*curve_rows("stage1", steps), {"stage": "stage2", "step": 1, "time": 0.0, "kl": 1.0}],
        "stage1",
    )
    ElementTree.fromstring(svg)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg.decode())
    titles = [text for text in texts if text in ("reward", "loss", "kl", "seconds")]
    assert titles == ["reward", "loss", "seconds"]  # and nothing of the other stage
    lines = [text for text in texts if text in ("all", "turn1", "turn2", "step")]
    assert lines == ["all", "turn1", "turn2", "step"]


def test_curves_take_their_ink_from_the_reader_and_bear_gaps():
    rows = curve_rows("stage1", 50)
    rows[3]["loss"] = math.nan
    del rows[5]["turn2/reward"]
    svg = metrics_curves(rows, "stage1").decode()
    assert "prefers-color-scheme:dark" in svg and "currentColor" in svg and "#0a0b0c" not in svg
    assert svg == metrics_curves(rows, "stage1").decode()


def test_curves_of_an_unknown_stage_are_refused():
    with pytest.raises(ValueError, match="'stage3'"):
        metrics_curves(curve_rows("stage1", 3), "stage3")


@pytest.mark.parametrize("module", ["tables", "html", "curves", "trajectories"])
def test_the_room_starts_neither_pyplot_nor_jax(module):
    code = (
        f"import sys, mmrecoder_jax.reporting.{module}\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_drawing_starts_no_pyplot():
    code = (
        "import sys\nfrom mmrecoder_jax.reporting.curves import metrics_curves\n"
        "metrics_curves([{'stage': 's', 'step': 1, 'loss': 1.0}], 's')\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

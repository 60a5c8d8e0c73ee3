"""Alarms: when they begin and end, what is said and written, and that a kill changes none of it."""

import json
import math
import re
from pathlib import Path

import pytest

from mmrecoder_jax.config import load
from mmrecoder_jax.monitoring.alarms import MONITORS, Alarms
from mmrecoder_jax.monitoring.rows import RowFile

ROOT = Path(__file__).parents[2]


class Run:
    """Alarms of a stage whose metrics a test makes up; `said` is what was printed."""

    def __init__(self, path, **thresholds):
        self.said: list[str] = []
        self.path, self.step = path, 0
        self.file = RowFile(path)
        self.alarms = Alarms("stage1", thresholds, self.file, self.said.append)

    def observe(self, **metrics):
        """Texts of what rings after one more step; `turn1__forged` is turn1/forged."""
        self.step += 1
        named = {name.replace("__", "/"): value for name, value in metrics.items()}
        return [str(alarm) for alarm in self.alarms.observe(self.step, named)]

    def rows(self):
        found = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [(row["step"], row["alarm"], row["state"], row["value"]) for row in found]


@pytest.fixture
def run(tmp_path):
    return lambda **thresholds: Run(tmp_path / "alarms.jsonl", **thresholds)


def test_an_alarm_begins_rings_and_ends_with_the_mean_of_its_steps(run):
    run = run(code_repeat=0.5)
    rang = [run.observe(code_repeat=x) for x in [1.0] * 9 + [0.8] + [0.0] * 5]
    assert rang[:9] == [[]] * 9  # silent before its ten steps are there
    assert rang[9] == ["code_repeat 0.98 > 0.5"]
    assert [bool(texts) for texts in rang[9:]] == [True, True, True, True, True, False]
    assert run.rows() == [
        (10, "code_repeat", "begins", pytest.approx(0.98)),
        (15, "code_repeat", "ends", pytest.approx(0.58)),
    ]
    assert run.said == [
        "alarm: code_repeat 0.98 > 0.5: second turns repeat the code of the first "
        "(docs/monitors.md)",
        "alarm ends: code_repeat, after 5 steps",
    ]


def test_a_single_forged_record_is_enough_on_any_turn(run):
    run = run(forged=0.0)
    assert run.observe(turn1__forged=0.0, turn2__forged=0.0) == []
    assert run.observe(turn1__forged=0.0, turn2__forged=0.02) == ["forged 0.02 > 0"]
    assert run.observe(turn1__forged=0.0, turn2__forged=0.0) == []
    assert run.said[-1] == "alarm ends: forged, after 1 step"


def test_what_should_rise_rings_below_its_threshold(run):
    run = run(improved=0.1)
    for _ in range(10):
        found = run.observe(improved=0.05)
    assert found == ["improved 0.05 < 0.1"]


def test_scripts_of_one_turn_that_stop_running_ring_though_nothing_else_can_be_counted(run):
    run = run(exec_rate=0.2, regressed=0.3)
    for rate in (0.9, 0.1, 0.0, 0.0):
        assert run.observe(turn1__exec_rate=0.9, turn2__exec_rate=rate, regressed=0.1) == []
    assert run.observe(turn1__exec_rate=0.0, turn2__exec_rate=0.0) == []  # 0.2 is not below
    assert run.observe(turn1__exec_rate=0.0, turn2__exec_rate=0.0) == ["exec_rate 0.02 < 0.2"]


def test_scores_that_fall_ring_though_second_turns_gain(run):
    """First turns that are spoilt on purpose: all that compares two turns looks better then."""
    run = run(fallen=0.03, improved=0.02, code_repeat=0.95)
    for _ in range(10):
        assert run.observe(turn1__low_level=0.92, turn2__low_level=0.95, improved=0.3) == []
    for _ in range(9):
        found = run.observe(turn1__low_level=0.88, turn2__low_level=0.95, improved=0.7)
    assert found == ["fallen 0.036 > 0.03"]
    for _ in range(10):  # a rise is none, and the turns do not make up for each other
        found = run.observe(turn1__low_level=0.99, turn2__low_level=0.9, improved=0.0)
    assert found == ["fallen 0.05 > 0.03", "improved 0 < 0.02"]


def test_thoughts_are_measured_against_the_first_step_alone(run):
    """A policy that breaks in its second step is not measured by what it has become."""
    run = run(thought_length=2.0)
    for thought in [30.0] + [90.0] * 9:
        found = run.observe(turn1__thought=thought)
    assert found == ["thought_length 2.8 > 2"]


@pytest.mark.parametrize("later, factor", [(250.0, "2.5"), (40.0, "2.5")])
def test_thoughts_that_grow_or_shrink_are_measured_against_the_first_steps(run, later, factor):
    run = run(thought_length=2.0)
    for _ in range(10):
        assert run.observe(turn1__thought=100.0) == []
    for _ in range(10):
        found = run.observe(turn1__thought=later)
    assert found == [f"thought_length {factor} > 2"]


def test_a_step_without_the_metric_or_with_nan_leaves_an_alarm_as_it_is(run):
    run = run(skipped=0.0, logp_gap=0.05)
    assert run.observe(skipped=1.0) == run.observe() == run.observe(skipped=math.nan)
    assert run.observe(skipped=0.0, logp_gap=math.nan) == []


def test_a_resumed_run_rings_as_one_that_was_never_interrupted(run, tmp_path):
    values = [0.9, 0.2, 0.9, 1.0, 1.0, 0.4, 0.9, 0.9, 0.8, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0]
    whole = run(code_repeat=0.5)
    rang = [whole.observe(code_repeat=x) for x in values]
    for killed in range(1, len(values)):
        rows = [
            {"stage": "stage1", "step": step, "code_repeat": value}
            for step, value in enumerate(values[:killed], 1)
        ]
        again = Run(tmp_path / f"{killed}.jsonl", code_repeat=0.5)
        again.alarms.resume([*rows, {"stage": "stage2", "step": 1, "code_repeat": 0.0}])
        again.step = killed
        assert [again.observe(code_repeat=x) for x in values[killed:]] == rang[killed:]
        assert again.rows() == [row for row in whole.rows() if row[0] > killed]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_monitor_has_a_threshold_and_its_place_on_the_page(stage):
    assert set(load(stage, None).alarms) == set(MONITORS)
    page = (ROOT / "docs" / "monitors.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert explained == list(MONITORS)

"""Three sentences from numbers: an interval alone decides what they say."""

import json
import re

import numpy as np
import pytest

from mmrecoder_jax.reporting.verdict import compared, verdict
from mmrecoder_jax.reporting.workdir import stages_of
from tests.reporting import fake_run as fake


def said(workdir):
    return [re.sub(r"<[^>]*>", "", text) for text in verdict(stages_of(workdir)).sentences]


@pytest.mark.parametrize(
    "interval, text",
    [((0.01, 0.2), "b"), ((-0.2, -0.01), "w"), ((-0.1, 0.2), "n"), ((0.0, 0.0), "n")],
)
def test_an_interval_decides(interval, text):
    assert compared(interval, "b", "w", "n") == text


@pytest.fixture
def run(tmp_path):
    def make(first, last):
        for stage, gain in (("stage1", first), ("stage2", last)):
            (tmp_path / stage).mkdir(parents=True)
            fake.metrics(tmp_path / stage, stage, 60)
            fake.evaluation(tmp_path / stage, stage, 7, 40, gain)
        return tmp_path

    return make


@pytest.mark.parametrize(
    "first, last, learnt, helped",
    [
        (0.0, 0.1, "Training improved it: after RL stage 2, turn 2 scores", "Turn 2 helped: "),
        (0.0, -0.1, "Training made it worse: ", "Turn 2 made it worse: "),
        (0.001, 0.001, "Training made no difference that the charts could show: ", ""),
    ],
)
def test_the_charts_of_two_evaluations_are_compared_in_pairs(run, first, last, learnt, helped):
    sentences = said(run(first, last))
    assert sentences[0].startswith(learnt) and sentences[1].startswith(helped)
    assert "on 40 charts (test, greedy)" in sentences[0] and "against RL stage 1." in sentences[0]
    change = float(re.search(r"greedy\), ([+-][\d.]+) \[", sentences[0]).group(1))
    assert change == pytest.approx(100 * (last - first), abs=6)  # scores end at 0 and 1


def test_sampled_answers_that_say_otherwise_are_told(run):
    workdir = run(0.0, 0.1)
    assert "sampled" not in " ".join(said(workdir))
    for stage, gain in (("stage1", 0.1), ("stage2", -0.1)):
        fake.evaluation(workdir / stage, stage, 8, 40, gain, decoding="sampled")
    learnt, helped, _ = said(workdir)
    change = re.compile(r"\(sampled: ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]\)")
    for sentence, begins, wanted in (
        (learnt, "Training improved it: ", -20),
        (helped, "Turn 2 helped: ", -10),
    ):
        gained, low, high = map(float, change.search(sentence).groups())
        assert sentence.startswith(begins) and low < gained < high < 0
        assert gained == pytest.approx(wanted, abs=6)


def test_what_it_cost_is_the_time_of_steps(run):
    cost = said(run(0.0, 0.0))[2]
    assert cost.startswith("Training took 4:00 of steps (RL stage 1 2:00, RL stage 2 2:00); of RL ")
    assert "30 % decoding, 40 % waiting for scripts, 20 % in updates." in cost


def test_pictures_have_a_point_per_stage_and_turn(run):
    (learnt, first), (helped, second) = verdict(stages_of(run(0.0, 0.1))).pictures
    assert "Did it learn?" in learnt and first.count("<circle") == 4
    assert "Did turn 2 help?" in helped and second.count("<circle") == 2 and "zero" in second


def test_without_an_evaluation_the_steps_of_training_are_compared(tmp_path):
    fake.metrics(tmp_path, tmp_path.name, 60)
    learnt, helped, _ = said(tmp_path)
    assert learnt.startswith("The reward rose: ") and "in the first 12 steps" in learnt
    assert helped.startswith("Turn 2 helps: over the last 12 steps")


@pytest.mark.parametrize("fall, told", [(0.0, False), (0.3, True)])
def test_a_first_turn_that_falls_is_told(tmp_path, fall, told):
    """By the steps of training, and by the charts of two evaluations."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "metrics.jsonl", "w", encoding="utf-8") as f:
        for step in range(60):
            low = 0.9 - fall * step / 60 + rng.normal(0, 0.01)
            row = {"stage": tmp_path.name, "step": step + 1, "reward": 0.9, "improvement": 0.1}
            f.write(json.dumps(row | {"turn1/low_level": low}) + "\n")
    found = said(tmp_path)[1]
    assert found.startswith("Turn 2 helps: ") and ("But turn 1 falls, from 8" in found) == told
    for stage, lost in (("stage1", 0.0), ("stage2", fall)):
        (tmp_path / stage).mkdir()
        fake.evaluation(tmp_path / stage, stage, 7, 40, 0.1, lost)
    found = said(tmp_path)[1]
    assert found.startswith("Turn 2 helped: ") and ("But turn 1 fell, -2" in found) == told
    assert ("against RL stage 1: part of what turn 2 gains" in found) == told
    fake.evaluation(tmp_path / "stage2", "stage2", 7, 40, -0.2, fall)
    found = said(tmp_path)[1]
    assert found.startswith("Turn 2 made it worse: ") and ("But turn 1 fell" in found) == told
    assert found.endswith("against RL stage 1.") == told and "turn 2 gains" not in found


def rows(workdir, values, name="reward"):
    with open(workdir / "metrics.jsonl", "w", encoding="utf-8") as f:
        for step, value in enumerate(values, 1):
            f.write(json.dumps({"stage": workdir.name, "step": step, name: value}) + "\n")


@pytest.mark.parametrize(
    "values, text",
    [
        ([0.9] * 10 + [0.1] * 10, "The reward fell: "),
        ([0.4, 0.6] * 10, "The reward did not move beyond the noise of its steps: "),
        ([0.1] * 10, "Whether it learns is unknown: "),  # parts of two steps say nothing
    ],
)
def test_steps_that_do_not_rise(tmp_path, values, text):
    rows(tmp_path, values)
    learnt, helped, cost = said(tmp_path)
    assert learnt.startswith(text) and "unknown" in helped and "unknown" in cost


def test_a_supervised_stage_has_its_loss(tmp_path):
    rows(tmp_path, [2.0, 1.0, 0.5], "loss")
    learnt, helped, _ = said(tmp_path)
    assert "its loss went from 2.000 to 0.500" in learnt and "no turn has been sampled" in helped


def test_rl_is_compared_with_the_stage_before_it_and_cold_start_1_has_no_second_turn(tmp_path):
    gains = {"sft_chart2code": -0.9, "sft_self_correction": 0.0, "stage1": 0.05, "stage2": 0.1}
    for stage, gain in gains.items():
        (tmp_path / stage).mkdir()
        fake.evaluation(tmp_path / stage, stage, 7, 40, gain)
    assert said(tmp_path)[0].startswith("RL improved it: ")
    assert "against cold start 2." in said(tmp_path)[0]
    (_, first), (_, second) = verdict(stages_of(tmp_path)).pictures
    assert first.count("<circle") == 7 and second.count("<circle") == 3

"""What is watched during RL, by hand: rates over turns, over replays, and over samples whose first
turn executes.
"""

import dataclasses

import numpy as np
import pytest

from mmrecoder_jax.env import Execution, Record, Status
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.env.execution import Replay
from mmrecoder_jax.env.pool import total
from mmrecoder_jax.env.wire import Flag
from mmrecoder_jax.rl.judge.base import Verdict
from mmrecoder_jax.rl.monitors import env_metrics, facts_of, judge_total, rollout_metrics
from mmrecoder_jax.rl.trajectory import Trajectory, Turn
from tests.rl.charts import CHART

FAILED = Execution(Status.ERROR, error="NameError: x")


def turn(code: str, overall: float, execution: Execution, finished: bool = True) -> Turn:
    text = f"```python\n{code}\n```"
    return Turn(
        np.arange(3), np.full(3, -0.5), finished, text, execution, Scores(*[overall] * 4), 1.0
    )


def drawn(replay: str = "", *flags: str) -> Execution:
    return Execution(Status.OK, replay=Replay(replay), flags=tuple(map(Flag, flags)))


def of_pairs(pairs) -> dict[str, float]:
    """The metrics of one group."""
    group = [Trajectory(CHART, i, (), turns) for i, turns in enumerate(pairs)]
    rewards = np.array([[[t.scores.overall for t in turns] for turns in pairs]])
    returns = rewards[..., -1]
    return rollout_metrics(
        facts_of([group]), rewards, returns, np.zeros_like(returns), np.array([False])
    )


def alone(one: Turn) -> dict[str, float]:
    """The metrics of a single turn."""
    return of_pairs([(one,)])


@pytest.fixture
def metrics():
    first = [
        (turn("a", 0.5, drawn("done")), turn("b", 0.7, drawn("done", "hidden_text"))),
        (
            turn("a", 0.5, drawn("", "tamper")),
            turn("a", 0.5, drawn("done", "forged", "hidden_text")),
        ),
        (turn("c", 0.0, FAILED), turn("d", 0.9, drawn("done"))),
        (
            turn("e", 0.8, drawn("undecided")),
            turn("f", 0.2, drawn("undecided", "tamper"), finished=False),
        ),
    ]
    group = [Trajectory(CHART, i, (), turns) for i, turns in enumerate(first)]
    rewards = np.array([[[t.scores.overall for t in pair] for pair in first]])
    return rollout_metrics(
        facts_of([group]),
        rewards,
        rewards[..., -1],
        np.array([[1.0, -1.5, 0.5, 0.0]]),
        np.array([False]),
    )


def test_flags_found_by_replays_are_rates_among_the_replays(metrics):
    assert metrics["turn1/hidden_text"] == 0 and metrics["turn1/forged"] == 0
    assert metrics["turn2/hidden_text"] == pytest.approx(2 / 3) and metrics[
        "turn2/forged"
    ] == pytest.approx(1 / 3)


def test_tampering_is_a_rate_among_all_executions(metrics):
    assert metrics["turn1/tampered"] == 0.25 and metrics["turn2/tampered"] == 0.25


def test_self_correction_counts_samples_whose_first_turn_executes(metrics):
    assert metrics["improvement"] == pytest.approx((0.2 + 0.0 - 0.6) / 3)
    assert (metrics["improved"], metrics["regressed"], metrics["code_repeat"]) == pytest.approx(
        (1 / 3, 1 / 3, 1 / 3)
    )


def test_improved_regressed_and_same_are_all_there_is(metrics):
    assert metrics["same"] == pytest.approx(1 / 3)


def test_drawings_that_cannot_be_replayed_are_a_rate_among_those_that_were_to_be(metrics):
    assert metrics["turn1/undecided"] == 0.5  # one done, one undecided; two not asked
    assert metrics["turn2/undecided"] == 0.25


def test_thoughts_are_measured_in_characters():
    text = "<think>a bar</think>\n```python\nx\n```"
    one = dataclasses.replace(turn("x", 0.5, drawn()), text=text)
    assert alone(one)["turn1/thought"] == 5


PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
BARE, BARS = (Record((), (), types, ()) for types in ({}, {"bar": 1}))


@pytest.mark.parametrize(
    "execution, blank",
    [
        (Execution(Status.OK, PICTURE, record=BARS), False),
        (Execution(Status.OK, PICTURE, record=BARE), True),  # axes alone
        (Execution(Status.OK, np.full((2, 4, 3), 255, np.uint8), record=BARS), True),
        (Execution(Status.OK, PICTURE), False),  # forged: it has no record
        (FAILED, False),
    ],
)
def test_what_draws_nothing_is_blank(execution, blank):
    assert alone(turn("x", 0.5, execution))["turn1/blank"] == blank


def test_renders_are_identical_pixel_for_pixel_among_samples_whose_first_turn_executes():
    pixels = [PICTURE, PICTURE.copy(), PICTURE + 1, PICTURE[:1], None]
    pairs = [
        (turn("a", 0.5, Execution(Status.OK, PICTURE)), turn("b", 0.5, Execution(Status.OK, image)))
        for image in pixels
    ]
    pairs.append((turn("a", 0.0, FAILED), turn("b", 0.5, Execution(Status.OK, PICTURE))))
    assert of_pairs(pairs)["identical_renders"] == pytest.approx(2 / 5)


def test_rule_and_judge_are_compared_where_the_judge_could_score():
    def judged(overall, score):
        return dataclasses.replace(turn("a", overall, drawn()), verdict=Verdict(score))

    pairs = [
        (judged(0.5, 0.9),),
        (judged(1.0, 0.4),),
        (judged(0.0, None),),
        (turn("a", 0, FAILED),),
    ]
    found = of_pairs(pairs)
    assert found["turn1/disagreement"] == pytest.approx((0.4 + 0.6) / 2)
    assert "turn1/disagreement" not in of_pairs([(turn("a", 0, FAILED),)])


def test_means_by_turn(metrics):
    assert (
        metrics["turn1/exec_rate"] == 0.75
        and metrics["turn2/truncated"] == 0.25
        and metrics["turn1/tokens"] == 3
    )
    assert (
        metrics["turn2/low_level"] == pytest.approx((0.7 + 0.5 + 0.9 + 0.2) / 4)
        and metrics["advantage_max"] == 1.5
    )


def test_nothing_was_replayed():
    one = Trajectory(
        CHART, 0, (), (turn("a", 0.5, dataclasses.replace(drawn(), flags=(Flag.TAMPER,))),)
    )
    metrics = rollout_metrics(
        facts_of([[one]]),
        np.array([[[0.5]]]),
        np.array([[0.5]]),
        np.array([[0.0]]),
        np.array([True]),
    )
    assert (
        metrics["turn1/hidden_text"] == 0
        and metrics["silent_groups"] == 1
        and "improvement" not in metrics
    )


def test_counts_of_the_environment_make_a_panel_of_a_kind():
    stats = {
        "executions": 3,
        "status_ok": 2,
        "flag_tamper": 1,
        "rate_tamper": 0.5,
        "cpu_seconds": 1.5,
        "seconds": 2.0,
        "cache_hits": 1,
        "hosts_up": 1,
        "hosts_lost": 2,
        "host_a:1": 3,
    }
    names = {
        "env/executions": 3,
        "env_status/ok": 2,
        "env_flag/tamper": 1,
        "env_rate/tamper": 0.5,
        "env_seconds/cpu": 1.5,
        "env/hosts_up": 1,
        "env/hosts_lost": 2,
        "env_host/a:1": 3,
    }
    assert env_metrics(stats) == names | {"env_seconds/wall": 2.0, "env/cache_hits": 1}


def test_counts_of_several_hosts_are_added_and_rates_made_anew():
    first = {"executions": 4, "replays": 1, "flag_tamper": 2, "rate_tamper": 0.5, "status_ok": 4}
    second = {"executions": 1, "replays": 0, "status_error": 1}
    assert total([first]) == first
    together = total([first, second])
    assert together["executions"] == 5 and together["rate_tamper"] == pytest.approx(0.4)
    assert (together["status_ok"], together["status_error"]) == (4, 1)


def test_latencies_of_several_hosts_judges_weigh_their_answers():
    first = {"scored": 3, "unscorable": 0, "latency_mean": 1.0, "latency_max": 2.0}
    second = {"scored": 0, "unscorable": 1, "latency_mean": 5.0, "latency_max": 5.0}
    assert judge_total([first, second]) == {
        "scored": 3,
        "unscorable": 1,
        "latency_mean": pytest.approx(2.0),
        "latency_max": 5.0,
    }

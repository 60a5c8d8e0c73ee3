"""The judge in a rollout: it works while other rows still decode, and what it could not score gets
advantage 0.
"""

import time
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.env.execution import Replay
from mmrecoder_jax.env.wire import Flag
from mmrecoder_jax.rl import rollout
from mmrecoder_jax.rl.advantages import group_advantages
from mmrecoder_jax.rl.judge.base import JudgeDown, VerdictCache
from mmrecoder_jax.rl.judge.http import HttpJudge, Server
from mmrecoder_jax.rl.monitors import facts_of, rollout_metrics
from mmrecoder_jax.rl.rewards import RewardConfig, reward_parts, trajectory_rewards, turn_rewards
from mmrecoder_jax.rl.trajectory import trajectory_row
from tests.rl.judge.server import GOOD, FakeServer, chat

IMAGE = np.full((112, 168, 3), 90, np.uint8)


class DrawingEnv:
    """Every request draws another picture, but the last of each four fails."""

    asked = 0

    def submit(self, code):
        self.asked += 1
        future = Future()
        image = np.full((112, 168, 3), self.asked, np.uint8)
        future.set_result(
            Execution(Status.OK, image)
            if self.asked % 4
            else Execution(Status.ERROR, error="NameError: x")
        )
        return future

    watch = submit


@pytest.fixture
def engine(policy):
    stage = policy.stage_with({"rl.response_length": 12, "rl.decode_chunk": 5})

    def engine(judge):
        return stage.engine(DrawingEnv(), 1.0, judge)

    return engine


def judge(server, in_flight=8, **changes):
    settings = {
        "key_variable": "",
        "timeout_seconds": 5.0,
        "retries": 0,
        "max_tokens": 512,
        "pause_seconds": 0.01,
    }
    return HttpJudge(
        Server(server.url, "m", in_flight=in_flight, **settings),
        VerdictCache(),
        **{"max_failures": 100, **changes},
    )


def roll(engine, policy, group=4, turns=1):
    return engine.rollout(
        policy.params, policy.charts[:1], [3], jax.random.key(7), group=group, turns=turns
    )


def test_judging_overlaps_decoding(engine, policy):
    """A row that has ended is judged while the others are still decoded."""
    with (
        FakeServer(lambda number: (200, {}, chat(GOOD), 0.0)) as server,
        judge(server, in_flight=1) as asked,
    ):
        judged = engine(asked)
        decode, reached = judged.sampler.decode, []

        def first_alone(weights, state, plan, key, longest):
            """The second chunk begins when the question about the row that ended in the first has
            reached the server.
            """
            deadline = time.monotonic() + 60
            while reached and not server.questions and time.monotonic() < deadline:
                time.sleep(0.01)
            reached.append(len(server.questions))
            state = decode(weights, state, plan, key, longest)
            if len(reached) == 1:  # one row ends, the others go on
                state = state.replace(live=state.live.at[0].set(False))
            return state

        judged.sampler.decode = first_alone
        (group,) = roll(judged, policy)
        assert sum(t.turns[0].verdict is not None for t in group) == 3
        assert reached[:2] == [0, 1] and len(reached) > 1


def test_an_unscorable_sample_leaves_the_baseline(engine, policy):
    """Four samples: 80 points, no answer, 80 points, no render. The second gets advantage 0, the
    fourth a model score of 0.
    """
    answers = [(200, {}, chat(GOOD), 0.0), (500, {}, b"", 0.0), (200, {}, chat(GOOD), 0.0)]
    with FakeServer(lambda number: answers[number]) as server, judge(server, in_flight=1) as asked:
        (group,) = groups = roll(engine(asked), policy)
        stats = asked.stats()
    parts = reward_parts(groups)
    np.testing.assert_allclose(parts[0, :, 0, 2], [0.8, np.nan, 0.8, 0.0])
    config = RewardConfig(alpha=0.5, beta=0.4, gamma=0.0, eta=0.0)
    rewards = turn_rewards(parts, config)
    returns = trajectory_rewards(rewards, config)
    scorable = np.isfinite(returns)
    assert scorable.tolist() == [[True, False, True, True]]
    advantages, silent = (
        np.asarray(x)
        for x in group_advantages(jnp.asarray(returns), jnp.asarray(scorable), 1e-6, 1)
    )
    assert advantages[0, 1] == 0 and not silent[0]
    expected = returns[0, [0, 2, 3]]
    np.testing.assert_allclose(
        advantages[0, [0, 2, 3]],
        (expected - expected.mean()) / (expected.std(ddof=1) + 1e-6),
        rtol=1e-4,
    )
    metrics = rollout_metrics(facts_of(groups), rewards, returns, advantages, silent)
    assert metrics["unscorable"] == 1 and metrics["turn1/judge_unscorable"] == 1
    assert metrics["turn1/judge"] == pytest.approx(0.8)
    assert metrics["reward"] == pytest.approx(expected.mean())
    assert stats["unscorable"] == 1 and stats["scored"] == 2
    rows = [trajectory_row(t, reward, 0.0, {}) for t, reward in zip(group, rewards[0], strict=True)]
    assert [row["turns"][0]["reward"] is None for row in rows] == [False, True, False, False]
    assert (
        rows[0]["turns"][0]["judge"]["points"]["type"] == 18
        and rows[3]["turns"][0]["judge"] is None
    )


def test_a_judge_that_is_down_ends_the_rollout(engine, policy):
    with (
        FakeServer(lambda number: (500, {}, b"", 0.0)) as server,
        judge(server, max_failures=2) as asked,
        pytest.raises(JudgeDown),
    ):
        roll(engine(asked), policy)


class Forgers:
    """Everybody claims the target's record; a replay finds the first two out."""

    def __init__(self, record):
        self.record, self.watched = record, []

    def submit(self, code):
        return self._answer(Execution(Status.OK, IMAGE, record=self.record))

    def watch(self, code):
        self.watched.append(code)
        forged = len(self.watched) <= 2
        return self._answer(
            Execution(
                Status.OK,
                IMAGE,
                record=None if forged else self.record,
                flags=(Flag.FORGED,) if forged else (),
                replay=Replay.DONE,
            )
        )

    def _answer(self, execution):
        future = Future()
        future.set_result(execution)
        return future


def test_the_best_of_a_group_is_replayed_until_one_was_drawn(policy, monkeypatch):
    monkeypatch.setattr(rollout, "extract_code", lambda text: "x = 1")
    forgers = Forgers(policy.charts[0].record)
    stage = policy.stage_with({"rl.response_length": 12, "rl.decode_chunk": 5})
    (group,) = roll(stage.engine(forgers, 1.0, None), policy)
    assert [t.turns[0].scores.overall for t in group] == [0.0, 0.0, 1.0, 1.0]
    assert [t.turns[0].execution.flags for t in group] == [("forged",), ("forged",), (), ()]
    assert len(forgers.watched) == 3


def test_a_sample_alone_is_not_replayed_for_its_group(policy, monkeypatch):
    monkeypatch.setattr(rollout, "extract_code", lambda text: "x = 1")
    forgers = Forgers(policy.charts[0].record)
    stage = policy.stage_with({"rl.response_length": 12, "rl.decode_chunk": 5})
    roll(stage.engine(forgers, 1.0, None), policy, group=1)
    assert forgers.watched == []

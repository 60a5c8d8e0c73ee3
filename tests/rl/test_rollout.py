"""Rollouts with a real (random) tiny policy: token truth across turns, sampler against learner,
bans, replay, number of programs.
"""

import dataclasses

import jax
import numpy as np
import pytest

from mmrecoder_jax.data.batching import BatchShape, Collate, TokenRow
from mmrecoder_jax.data.pipeline import learner_batch
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.judge.base import VerdictCache
from mmrecoder_jax.rl.judge.visual import VisualJudge
from mmrecoder_jax.rl.trajectory import Mode

GROUP = 2


@dataclasses.dataclass
class ScriptedEnv:
    """Answers what it is told instead of running anything: renders for even requests, a long error
    for odd ones.
    """

    asked: int = 0

    def submit(self, code):
        from concurrent.futures import Future

        self.asked += 1
        future = Future()
        if self.asked % 2:
            future.set_result(
                Execution(
                    Status.ERROR,
                    error="line 1, in <module>: " + "boom " * 200 + "\nNameError: the end",
                )
            )
        else:
            future.set_result(
                Execution(Status.OK, image=np.full((112, 168, 3), 40 * (self.asked % 6), np.uint8))
            )
        return future


@pytest.fixture(scope="module")
def engine(policy):
    stage = policy.stage_with({"rl.response_length": 12, "rl.decode_chunk": 5})
    return stage.engine(ScriptedEnv(), 1.0)


def roll(engine, policy, mode, uids=(3, 4), group=GROUP, turns=2, charts=None):
    engine.env.asked = 0
    return engine.rollout(
        policy.params,
        charts or policy.charts[: len(uids)],
        uids,
        jax.random.key(7),
        mode=mode,
        group=group,
        turns=turns,
    )


@pytest.fixture(scope="module")
def full(engine, policy):
    return roll(engine, policy, Mode.FULL_TRAJECTORY)


@pytest.fixture(scope="module")
def shared(engine, policy):
    return roll(engine, policy, Mode.SHARED_FIRST_TURN)


def test_shapes_and_sharing(full, shared):
    assert [len(group) for group in full] == [GROUP, GROUP]
    for group in shared:
        first, second = group
        np.testing.assert_array_equal(first.turns[0].ids, second.turns[0].ids)
        assert not np.array_equal(first.turns[1].ids, second.turns[1].ids)
    assert not np.array_equal(full[0][0].turns[0].ids, full[0][1].turns[0].ids)


def test_pieces_are_prompt_response_feedback_response(full, engine):
    processor = engine.processor
    for group in full:
        for t in group:
            assert [piece.turn for piece in t.pieces] == [0, 1, 0, 2]
            np.testing.assert_array_equal(t.pieces[1].ids, t.turns[0].ids)
            np.testing.assert_array_equal(t.pieces[3].ids, t.turns[1].ids)
            image = processor.image(t.chart.image)
            np.testing.assert_array_equal(
                t.pieces[0].ids, processor.first_prompt(t.chart.instruction, image).ids
            )


def test_sampled_ids_reach_the_learner_untouched_even_where_text_would_not_survive(
    full, engine, policy
):
    """A random policy writes id sequences that no tokenizer would produce; the learner must see
    them as sampled.
    """
    layout = policy.stage.layout
    rows = [TokenRow(t.pieces, (1, 2)) for group in full for t in group]
    batch = learner_batch(rows, Collate(BatchShape(len(rows), (264,), (6, 12), 16), layout))
    changed = 0
    for b, t in enumerate(t for group in full for t in group):
        sampled = np.concatenate([turn.ids for turn in t.turns])
        np.testing.assert_array_equal(batch["tokens"][0, b][batch["weights"][0, b] > 0], sampled)
        for turn in t.turns:
            again = engine.processor.response(engine.processor.decode(turn.ids))
            changed += not np.array_equal(again[: len(turn.ids)], turn.ids)
    assert changed, "every response survived re-tokenising: this test would not notice it"


def test_learner_sees_the_probabilities_the_sampler_had(full, policy):
    """One forward over the whole trajectory, images included, gives the log-probabilities of
    turn-by-turn sampling on a live cache.
    """
    stage = policy.stage
    rows = [TokenRow(t.pieces, (1, 2)) for group in full for t in group]
    batch = learner_batch(rows, Collate(BatchShape(len(rows), (264,), (6, 12), 16), stage.layout))
    with jax.set_mesh(stage.mesh):
        micro = jax.tree.map(lambda x: x[0], distributed.to_global(batch, stage.mesh, axis=1))
        logps = np.asarray(jax.jit(stage.token_logps())(policy.params, micro)[0])
    for b, t in enumerate(t for group in full for t in group):
        sampled = np.concatenate([turn.logps for turn in t.turns])
        np.testing.assert_allclose(logps[b][batch["weights"][0, b] > 0], sampled, atol=2e-4)


def test_both_images_of_a_trajectory_reach_the_loss(full, policy):
    """Swapping the target, or the render that was fed back, changes the probabilities of the second
    turn.
    """
    stage = policy.stage
    trajectory = next(t for group in full for t in group if t.pieces[2].images)
    other = stage.processor.image(policy.charts[5].image)

    def swapped(index):
        pieces = list(trajectory.pieces)
        pieces[index] = dataclasses.replace(pieces[index], images=(other,))
        return TokenRow(tuple(pieces), (2,))

    rows = [TokenRow(trajectory.pieces, (2,)), swapped(0), swapped(2)]
    batch = learner_batch(rows, Collate(BatchShape(3, (264,), (6, 12), 8), stage.layout))
    with jax.set_mesh(stage.mesh):
        logps = np.asarray(
            jax.jit(stage.token_logps())(policy.params, jax.tree.map(lambda x: x[0], batch))[0]
        )
    turn2 = [logps[b][batch["weights"][0, b] > 0] for b in range(3)]
    assert np.abs(turn2[0] - turn2[1]).max() > 1e-4
    assert np.abs(turn2[0] - turn2[2]).max() > 1e-4


def test_vision_ids_and_dead_rows_are_never_sampled(policy):
    """Even a policy that wants nothing else: the bias of the whole vocabulary is pushed towards the
    image placeholder.
    """
    stage = policy.stage
    params = jax.tree.map(lambda x: x, policy.params)
    table = params["model"]["embed_tokens"]["weight"]
    banned = list(stage.forbidden)
    params["model"]["embed_tokens"]["weight"] = table.at[np.array(banned)].multiply(50.0)
    engine = stage.engine(ScriptedEnv(), 1.0)
    groups = engine.rollout(params, policy.charts[:4], range(4), jax.random.key(0), turns=2)
    ids = np.concatenate([turn.ids for group in groups for t in group for turn in t.turns])
    assert stage.tokenizer.image_pad_id in banned
    assert not np.isin(ids, banned).any()


def test_any_trajectory_can_be_replayed_alone(engine, policy, full):
    """Random numbers belong to a row, not to its batch: a chart sampled in another place of another
    batch writes the same tokens.
    """
    swapped = roll(
        engine,
        policy,
        Mode.FULL_TRAJECTORY,
        uids=(4, 3),
        charts=[policy.charts[1], policy.charts[0]],
    )
    for group, again in zip(full, reversed(swapped), strict=True):
        for t, u in zip(group, again, strict=True):
            np.testing.assert_array_equal(t.turns[0].ids, u.turns[0].ids)


def test_long_errors_are_cut_from_the_front(full, engine):
    failed = [t for group in full for t in group if not t.turns[0].execution.ok]
    assert failed
    for t in failed:
        assert len(t.pieces[2].ids) <= engine.spec.feedback_length
        assert "NameError: the end" in engine.processor.decode(t.pieces[2].ids)


def test_programs_are_bounded(engine, policy, full, shared):
    """Other lengths, images, errors and outcomes compile nothing new: prefill, extend, decode and
    repeat, once for each row count.
    """
    before = engine.sampler.compilations()
    for seed in range(3):
        engine.env.asked = seed
        engine.rollout(
            policy.params,
            policy.charts[2:4],
            [seed, 9],
            jax.random.key(seed),
            mode=Mode.SHARED_FIRST_TURN,
            group=GROUP,
        )
        engine.rollout(
            policy.params,
            policy.charts[4:6],
            [seed, 9],
            jax.random.key(seed),
            mode=Mode.FULL_TRAJECTORY,
            group=GROUP,
        )
    assert engine.sampler.compilations() == before
    assert before <= 8


def test_every_render_is_judged_and_a_shared_one_once(engine, policy):
    with VisualJudge(VerdictCache()) as judge:
        engine.judge = judge
        try:
            groups = roll(engine, policy, Mode.SHARED_FIRST_TURN)
        finally:
            engine.judge = None
    for group in groups:
        assert group[0].turns[0].verdict is group[1].turns[0].verdict
        for turn in (turn for t in group for turn in t.turns):
            assert (turn.verdict is None) == (turn.execution.image is None)
            assert turn.verdict is None or 0 <= turn.verdict.score < 1

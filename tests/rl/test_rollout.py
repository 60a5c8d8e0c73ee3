"""Rollouts with a real (random) tiny policy: token truth across turns, sampler against learner,
bans, replay, number of programs.
"""

import dataclasses
import math
import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from mmrecoder_jax.data.batching import BatchShape, Collate, TokenRow
from mmrecoder_jax.data.pipeline import learner_batch
from mmrecoder_jax.data.sources import Questions, png_bytes
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.judge.base import VerdictCache
from mmrecoder_jax.rl.judge.visual import VisualJudge
from mmrecoder_jax.rl.learner_batch import learner_batch as rollout_batch
from mmrecoder_jax.rl.learner_batch import learner_collate, learner_rows
from mmrecoder_jax.rl.monitors import FACTS, facts_of, turn_metrics
from mmrecoder_jax.rl.rollout import answer_all, trajectories, written_on
from mmrecoder_jax.rl.sampler import BOUNDS
from mmrecoder_jax.rl.schedule import Size
from mmrecoder_jax.rl.trajectory import Mode
from tests.rows import first_micro, written

GROUP = 2


@dataclasses.dataclass
class ScriptedEnv:
    """Answers what it is told instead of running anything: renders for even requests, a long error
    for odd ones.
    """

    asked: int = 0

    def submit(self, code):
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

    watch = submit


@pytest.fixture(scope="module")
def engine(policy):
    # Samplers that are alike share programs, which a test counts: no other has this chunk.
    stage = policy.stage_with({"rl.response_length": 12, "rl.decode_chunk": 7})
    return stage.engine(ScriptedEnv(), 1.0)


def roll(engine, policy, mode, uids=(3, 4), group=GROUP, turns=2, charts=None, size=None):
    engine.env.asked = 0
    return engine.rollout(
        policy.params,
        charts or policy.charts[: len(uids)],
        uids,
        jax.random.key(7),
        mode=mode,
        group=group,
        turns=turns,
        size=size,
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
        np.testing.assert_array_equal(written(first_micro(batch), batch["tokens"][0])[b], sampled)
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
        np.testing.assert_allclose(written(first_micro(batch), logps)[b], sampled, atol=2e-4)


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
    turn2 = written(first_micro(batch), logps)
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


def test_words_around_an_error_that_are_too_long_end_nothing(policy):
    stage = policy.stage_with({"feedback.error": "It failed. " * 99 + "{error}"})
    engine = stage.engine(ScriptedEnv(), 1.0)
    (group,) = roll(engine, policy, Mode.FULL_TRAJECTORY, uids=(3,), group=1)
    assert not group[0].turns[0].execution.ok
    assert len(group[0].pieces[2].ids) <= engine.spec.feedback_length


def test_programs_are_bounded(engine, policy, full, shared):
    """Other lengths, images, errors and outcomes compile nothing new but decoding up to other
    bounds; of those there are at most as many as `BOUNDS` says, for each size of a state.
    """
    for seed in range(2):
        engine.env.asked = seed
        for mode, charts in (
            (Mode.SHARED_FIRST_TURN, policy.charts[2:4]),
            (Mode.FULL_TRAJECTORY, policy.charts[4:6]),
        ):
            engine.rollout(
                policy.params, charts, [seed, 9], jax.random.key(seed), mode=mode, group=GROUP
            )
    sizes = 2  # the modes' states
    others = 1 + sizes * 2 + 3  # weights; begin and prefill; extend, promote and extend_prefix
    assert engine.sampler.compilations() <= others + sizes * math.prod(BOUNDS)


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


@pytest.mark.parametrize("when", ["asked", "answered"])
def test_an_environment_that_fails_ends_the_rollout(engine, policy, when):
    """What it says reaches whoever waits, from whatever thread; nobody waits for ever."""

    class Failing:
        def submit(self, code):
            if when == "asked":
                raise OSError("no room is left")
            future = Future()
            future.set_exception(OSError("no room is left"))
            return future

        watch = submit

    before, engine.env = engine.env, Failing()
    try:
        with pytest.raises(OSError, match="no room is left"):
            engine.rollout(policy.params, policy.charts[:2], [3, 4], jax.random.key(7), group=GROUP)
    finally:
        engine.env = before


@pytest.fixture(scope="module")
def drawing(policy):
    """An engine of three turns, all of whose scripts draw."""
    stage = policy.stage_with({"rl.response_length": 12, "rl.decode_chunk": 5, "rl.turns": 3})
    return stage.engine(Draws((112, 168)), 1.0)


@pytest.fixture(scope="module", params=Mode)
def whole(drawing, policy, request):
    """A mode and a rollout in it."""
    return request.param, roll(drawing, policy, request.param, turns=3)


def test_three_turns_share_all_but_the_last(whole):
    """In stage 1 a group parts before its last turn, in stage 2 before the first."""
    mode, groups = whole
    for first, second in groups:
        assert [piece.turn for piece in first.pieces] == [0, 1, 0, 2, 0, 3]
        for turn in range(3):
            alike = np.array_equal(first.turns[turn].ids, second.turns[turn].ids)
            assert alike == (mode == Mode.SHARED_FIRST_TURN and turn < 2)


def test_rows_that_are_given_away_change_no_token(drawing, policy, whole):
    """Two rows for four conversations, or one prompt and one row at a time: conversations leave
    their rows while scripts run, and what they held is read again.
    """
    mode, expected = whole
    size = Size(rows=2) if mode == Mode.FULL_TRAJECTORY else Size(prompts=1, rows=1)
    same(expected, roll(drawing, policy, mode, turns=3, size=size))
    metrics = drawing.stats.metrics()
    assert 0 < metrics["rollout/idle"] < 1 and 0 < metrics["rollout/cache_use"] < 1
    assert 0 < metrics["rollout/padding"] < 1 and 0 < metrics["rollout/use"] <= 1


def test_responses_are_finished_in_later_rollouts(drawing, policy, whole):
    """With the policy and the key of the first one they are what they would have been at once."""
    mode, expected = whole
    groups = drawing.begun(policy.charts[:2], (3, 4), mode=mode, group=GROUP, turns=3)
    waiting, rollouts = groups, 0
    while waiting:
        drawing.run(policy.params, waiting, jax.random.key(7), turns=3, budget=5)
        waiting = [group for group in waiting if group.rests]
        rollouts += 1
    assert 3 < rollouts <= 7
    same(expected, [trajectories(group) for group in groups])


def same(groups, others):
    for group, other in zip(groups, others, strict=True):
        for t, u in zip(group, other, strict=True):
            assert t.uid == u.uid
            for piece, its in zip(t.pieces, u.pieces, strict=True):
                np.testing.assert_array_equal(piece.ids, its.ids)
            for turn, its in zip(t.turns, u.turns, strict=True):
                np.testing.assert_allclose(turn.logps, its.logps, atol=1e-5)


def test_other_work_is_done_while_scripts_run(drawing, policy, monkeypatch):
    late = LateEnv()
    monkeypatch.setattr(drawing, "env", late)
    engine = drawing
    waited = []

    def work():
        deadline = time.monotonic() + 60
        while len(late.futures) < 4 and time.monotonic() < deadline:  # threads hand them over
            time.sleep(0.01)
        waited.append(len(late.futures))
        for future in late.futures:
            future.set_result(Draws((112, 168)).execution)
        late.futures = None

    groups = engine.begun(
        policy.charts[:2], (3, 4), mode=Mode.FULL_TRAJECTORY, group=GROUP, turns=3
    )
    engine.run(policy.params, groups, jax.random.key(7), turns=3, meanwhile=work)
    assert waited == [4] and all(len(talk.turns) == 3 for g in groups for talk in g.talks)


class LateEnv:
    """No script ends before it is told to."""

    def __init__(self):
        self.futures = []

    def submit(self, code):
        future = Future()
        if self.futures is None:
            future.set_result(Draws((112, 168)).execution)
        else:
            self.futures.append(future)
        return future

    watch = submit


class Drawing:
    """Every script draws another figure, smaller than its chart; every fifth one fails."""

    asked = 0

    def submit(self, code):
        self.asked += 1
        future = Future()
        if self.asked % 5 == 0:
            future.set_result(Execution(Status.ERROR, error="NameError: the end"))
        else:
            pixels = np.full((84, 112, 3), 9 * self.asked % 256, np.uint8)
            future.set_result(Execution(Status.OK, image=pixels))
        return future

    watch = submit


@pytest.mark.parametrize("mode, turns", [(Mode.SHARED_FIRST_TURN, 4), (Mode.FULL_TRAJECTORY, 3)])
def test_any_number_of_turns_with_two_pictures_each_reaches_the_learner(policy, mode, turns):
    """The learner has room for all pictures of its rows, and computes the log-probabilities that
    the sampler had at every turn. A group that shares turns parts before the last one.
    """
    stage = policy.stage_with(
        {
            "rl.response_length": 6,
            "rl.decode_chunk": 3,
            "rl.turns": turns,
            "rl.group": GROUP,
            "train.micro_batch_size": 2 * GROUP,
            "data.lengths": (360,),
            "feedback.image": "both",
        }
    )
    engine = stage.engine(Drawing(), 1.0)
    groups = roll(engine, policy, mode, turns=turns)
    for first, second in groups:
        alike = [
            np.array_equal(a.ids, b.ids) for a, b in zip(first.turns, second.turns, strict=True)
        ]
        shares = mode == Mode.SHARED_FIRST_TURN
        assert alike == [shares] * (turns - 1) + [False]
    for t in (t for group in groups for t in group):
        assert [piece.turn for piece in t.pieces[1::2]] == list(range(1, turns + 1))
        drew = [turn.execution.ok for turn in t.turns[:-1]]
        assert [len(piece.images) for piece in t.pieces[2::2]] == [2 * ok for ok in drew]
    collate = learner_collate(stage.config, stage.layout, mode, engine.image_arrays)
    full = Mode.FULL_TRAJECTORY  # so that every turn is compared
    rows = learner_rows(groups, np.ones((2, GROUP, turns)), full, False)
    batch = rollout_batch(rows, len(rows), collate)
    with jax.set_mesh(stage.mesh):
        micro = jax.tree.map(lambda x: x[0], distributed.to_global(batch, stage.mesh, axis=1))
        logps = np.asarray(jax.jit(stage.token_logps())(policy.params, micro)[0])
    micro = first_micro(batch)
    for t, ours, theirs in zip(
        (t for group in groups for t in group),
        written(micro, logps),
        written(micro, micro["sampler_logps"]),
        strict=True,
    ):
        assert len(ours) == sum(len(turn.ids) for turn in t.turns)
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_a_question_of_two_charts_shows_both(policy):
    """Log-probabilities of sampling are those of one forward over prompt, feedback and all images;
    with the second chart exchanged they are others.
    """
    stage = policy.stage_with(
        {
            "rl.prompt_length": 72,
            "rl.response_length": 6,
            "rl.decode_chunk": 3,
            "rl.group": GROUP,
            "train.micro_batch_size": 2 * GROUP,
            "data.lengths": (320,),
        }
    )
    engine = stage.engine(ScriptedEnv(), 1.0)
    charts = [
        dataclasses.replace(chart, more_images=(other.image,))
        for chart, other in zip(policy.charts[:2], policy.charts[2:4], strict=True)
    ]
    groups = roll(engine, policy, Mode.FULL_TRAJECTORY, charts=charts)
    assert all(len(t.pieces[0].images) == 2 for group in groups for t in group)

    def logps_of(pieces):
        rows = [TokenRow(one, (1, 2)) for one in pieces]
        full, shown = Mode.FULL_TRAJECTORY, Questions(2, 2.0)
        collate = learner_collate(stage.config, stage.layout, full, engine.image_arrays, shown)
        batch = learner_batch(rows, collate)
        with jax.set_mesh(stage.mesh):
            micro = jax.tree.map(lambda x: x[0], distributed.to_global(batch, stage.mesh, axis=1))
            logps = np.asarray(jax.jit(stage.token_logps())(policy.params, micro)[0])
        return written(first_micro(batch), logps)

    talks = [t for group in groups for t in group]
    sampled = [np.concatenate([turn.logps for turn in t.turns]) for t in talks]
    for own, whole in zip(sampled, logps_of([t.pieces for t in talks]), strict=True):
        np.testing.assert_allclose(whole, own, atol=2e-4)
    exchanged = []
    for group, other in zip(groups, groups[::-1], strict=True):
        prompt = group[0].pieces[0]
        images = prompt.images[0], other[0].pieces[0].images[1]
        asked = dataclasses.replace(prompt, images=images)  # once, as a group's rows share it
        exchanged += [(asked, *t.pieces[1:]) for t in group]
    for own, whole in zip(sampled, logps_of(exchanged), strict=True):
        assert np.abs(whole - own).max() > 1e-4
    assert engine.refusal(charts[0], 2) == ""
    narrow = policy.stage.engine(ScriptedEnv(), 1.0)
    assert "its prompt has" in narrow.refusal(charts[0], 2)


SIZES = {
    "a long strip": (28, 672),
    "a pole": (672, 28),
    "a hair": (1, 20_000),
    "the largest figure": (1000, 1000),
    "one pixel": (1, 1),
    "ordinary": (112, 168),
}


class Draws:
    """Every script draws a figure of one size."""

    def __init__(self, size):
        self.execution = Execution(Status.OK, image=np.full((*size, 3), 90, np.uint8))

    def submit(self, code):
        future = Future()
        future.set_result(self.execution)
        return future

    watch = submit


@pytest.fixture(scope="module")
def narrow(policy):
    """A stage whose largest bucket of an image holds no strip."""
    return policy.stage_with(
        {
            "rl.response_length": 12,
            "rl.decode_chunk": 5,
            "data.windows": (6,),
            "feedback.image": "render",
        }
    )


@pytest.fixture(scope="module")
def narrow_engine(narrow):
    return narrow.engine(ScriptedEnv(), 1.0)


@pytest.mark.parametrize("what", SIZES)
def test_a_figure_of_any_size_is_shown_or_is_a_failure(what, narrow_engine, policy, monkeypatch):
    engine = narrow_engine
    monkeypatch.setattr(engine, "env", Draws(SIZES[what]))
    groups = roll(engine, policy, Mode.FULL_TRAJECTORY, group=1)
    shown = what in ("ordinary", "one pixel", "the largest figure")
    for turn in (turn for group in groups for t in group for turn in t.turns):
        assert turn.execution.status == (Status.OK if shown else Status.OVERSIZED)
        assert (turn.execution.image is not None) == shown
        assert turn.scores.overall == 0 or shown
    for piece in (t.pieces[2] for group in groups for t in group):
        assert len(piece.images) == shown
        assert shown or "too large or too thin" in engine.processor.decode(piece.ids)
    metrics = turn_metrics(
        {name: facts_of(groups)[:, :, 0, i].ravel() for i, name in enumerate(FACTS)}
    )
    assert metrics["oversized"] == 1 - shown


def test_a_figure_whose_feedback_is_too_long_is_a_failure(policy):
    """24 visual tokens and the words around them; a bucket of 30 holds the words alone."""
    stage = policy.stage_with({"rl.feedback_length": 30})
    engine = stage.engine(ScriptedEnv(), 1.0)
    drawn = Draws((112, 168)).execution
    assert engine.shown(drawn, policy.charts[0]).status == Status.OVERSIZED
    assert policy.stage.engine(ScriptedEnv(), 1.0).shown(drawn, policy.charts[0]) is drawn
    assert engine.refusal(policy.charts[0], 1) == ""
    assert "rl.feedback_length=30" in engine.refusal(policy.charts[0], 2)


def test_two_pictures_in_a_feedback_need_room_for_both(policy):
    """A small figure of 12 tokens beside the chart's 24, and words; 60 hold one picture alone."""
    small = Draws((84, 112)).execution
    for shown, length, status in (
        ("both", 60, Status.OK),
        ("both", 40, Status.OVERSIZED),
        ("render", 40, Status.OK),
    ):
        stage = policy.stage_with({"rl.feedback_length": length, "feedback.image": shown})
        engine = stage.engine(ScriptedEnv(), 1.0)
        assert engine.shown(small, policy.charts[0]).status == status
    stage = policy.stage_with({"rl.feedback_length": 60, "feedback.image": "both"})
    engine = stage.engine(ScriptedEnv(), 1.0)
    assert "rl.feedback_length=60" in engine.refusal(policy.charts[0], 2)


def test_a_chart_that_cannot_be_shown_is_refused_with_the_reason(narrow, policy):
    engine, chart = narrow.engine(ScriptedEnv(), 1.0), policy.charts[0]
    strip = dataclasses.replace(chart, image=png_bytes(np.zeros((28, 672, 3), np.uint8)))
    wordy = dataclasses.replace(chart, instruction="Redraw " * 99)
    cut = dataclasses.replace(chart, image=chart.image[:200])
    assert engine.refusal(chart, 2) == ""
    assert "its image has 12 windows, data.windows end at 6" in engine.refusal(strip, 2)
    assert "rl.prompt_length is 40" in engine.refusal(wordy, 2)
    assert "cannot be read" in engine.refusal(cut, 2)


def test_all_charts_are_answered_but_those_that_are_refused(narrow, policy):
    engine = narrow.engine(ScriptedEnv(), 1.0)
    charts = list(policy.charts[:5])
    charts[1] = dataclasses.replace(charts[1], image=b"<html>")
    key = jax.random.key(3)
    answers = answer_all(engine, policy.params, charts, key, turns=1, batch_size=2)
    assert [number for number, _ in answers.own] == [0, 2, 3, 4]
    assert list(answers.refused) == [1] and "cannot be read" in answers.refused[1]
    assert not any(piece.images for _, t in answers.own for piece in t.pieces)
    (alone,) = engine.rollout(policy.params, [charts[3]] * 2, [3, 9], key, turns=1)[0]
    np.testing.assert_array_equal(dict(answers.own)[3].turns[0].ids, alone.turns[0].ids)


def test_a_policy_sees_as_many_of_its_turns_as_it_remembers(policy):
    charts, key, how = policy.charts[:2], jax.random.key(3), {"turns": 3, "batch_size": 2}
    whole, latest, enough = (
        dict(answer_all(greedy(policy), policy.params, charts, key, remembered=n, **how).own)
        for n in (0, 1, 2)
    )
    for number, seen in whole.items():
        one = latest[number]
        for mine, theirs in zip(enough[number].turns, seen.turns, strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
        for mine, theirs in zip(one.turns[:2], seen.turns[:2], strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
        assert [piece.turn for piece in one.pieces] == [0, 1, 0, 2, 0, 3]
        np.testing.assert_array_equal(one.pieces[5].ids, one.turns[2].ids)


def test_what_a_policy_writes_on_follows_from_what_it_remembers(policy):
    charts, key = policy.charts[:2], jax.random.key(3)
    long, short = (
        greedy(policy).rollout(policy.params, charts, [0, 1], key, turns=n) for n in (2, 1)
    )
    longer = written_on(greedy(policy), policy.params, short, key, 1, Size())
    for (mine,), (theirs,) in zip(longer, long, strict=True):
        for one, other in zip(mine.pieces, theirs.pieces, strict=True):
            assert one.turn == other.turn
            np.testing.assert_array_equal(one.ids, other.ids)
    # a conversation's third turn is the second one of one that began with its second
    third = written_on(greedy(policy), policy.params, long, key, 1, Size())
    begun = [
        [dataclasses.replace(one, pieces=one.pieces[:1], turns=one.turns[1:])] for (one,) in long
    ]
    again = written_on(greedy(policy), policy.params, begun, key, 1, Size())
    for (mine,), (theirs,) in zip(again, third, strict=True):
        np.testing.assert_array_equal(mine.turns[1].ids, theirs.turns[2].ids)


def greedy(policy):
    """An engine whose environment answers from the beginning again."""
    return policy.stage.engine(ScriptedEnv(), 0.0)

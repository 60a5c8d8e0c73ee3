"""What a step is trained on: which policy wrote it, in which order, and what checkpoints hold."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env import Record
from mmrecoder_jax.rl.conversations import Group
from mmrecoder_jax.rl.schedule import Stats
from mmrecoder_jax.rl.step_rollouts import Rollouts, is_off_policy
from mmrecoder_jax.rl.trajectory import Mode

PROMPTS = 3


def chart(number):
    return Chart(str(number), b"", "", Record((), (), {}, ()), "", "", "")


class Course:
    """A loop whose policy is the number of its last update."""

    def __init__(self, every, total=100, first=1):
        self.every, self.total, self.pending = every, total, False
        self.params = {"w": np.array(first - 1)}

    progress = SimpleNamespace(phase=lambda name: contextlib.nullcontext())

    def phase(self, name):
        return contextlib.nullcontext()

    def key(self, step):
        return jax.random.key(step)

    def next_save(self, step):
        return step if self.pending else min(-(-step // self.every) * self.every, self.total)


class Engine:
    """Every group is done in one run, but for charts in `slow`: those rest so many times."""

    def __init__(self, slow=None):
        self.slow, self.stats, self.events = dict(slow or {}), Stats(tokens=1), []

    def begun(self, charts, uids, *, mode, group, turns):
        prompt = Piece(np.zeros(1, np.int32), 0)
        return [Group(c, uid, group, 1, prompt) for c, uid in zip(charts, uids, strict=True)]

    def run(self, params, groups, key, *, turns, size, progress, budget, meanwhile):
        self.events.append(
            ("draw", int(params["w"]), [int(g.chart.id) for g in groups], budget > 0)
        )
        if meanwhile is not None:
            meanwhile()
        for group in groups:
            if not group.talks:
                group.begin()
            left = self.slow.get(int(group.chart.id), 0) if budget else 0
            self.slow[int(group.chart.id)] = left - 1
            for talk in group.talks:
                talk.resting = left > 0


def course_of(ahead=0, partial=0, every=100, steps=6, first=1, slow=None, pending=(), start=0):
    """(events, rollouts by step) of a stage of so many steps."""
    rl = ConfigDict(
        {
            "ahead": ahead,
            "partial": partial,
            "group": 2,
            "turns": 2,
            "rollout_prompts": 0,
            "rows": 0,
        }
    )
    course, engine = Course(every, steps, first), Engine(slow)
    numbers = iter(range(start, 1000))

    def charts(count):
        return [chart(next(numbers)) for _ in range(count)]

    rollouts = Rollouts(
        engine, rl, Mode.FULL_TRAJECTORY, PROMPTS, charts, course, lambda name: True, (1, 2, 1)
    )
    found = {}
    for step in range(first, steps + 1):
        found[step] = rollouts.of(step)

        def update(step=step):
            engine.events.append(("update", step))
            course.params = {"w": np.array(step)}
            course.pending = step in pending

        rollouts.beside(step, update)
    return engine.events, found


def drawn_by(found):
    return [r.metrics["rollout/staleness"] for r in found.values()]


def charts_of(found):
    return {step: [int(group[0].chart.id) for group in r.groups] for step, r in found.items()}


def test_by_default_every_step_is_drawn_with_the_policy_that_it_changes():
    events, found = course_of(steps=3)
    assert events == [
        ("draw", 0, [0, 1, 2], False),
        ("update", 1),
        ("draw", 1, [3, 4, 5], False),
        ("update", 2),
        ("draw", 2, [6, 7, 8], False),
        ("update", 3),
    ]
    assert drawn_by(found) == [0, 0, 0]


@pytest.mark.parametrize(
    ("ahead", "partial", "kind", "expected"),
    [
        (0, 0, "sampler", False),
        (1, 0, "sampler", True),
        (0, 9, "sampler", True),
        (0, 0, "vllm", True),
    ],
)
def test_who_wrote_decides_whether_tokens_are_weighed(ahead, partial, kind, expected):
    fields = {"rl": {"ahead": ahead, "partial": partial}, "engine": {"kind": kind}}
    assert is_off_policy(ConfigDict(fields)) == expected


def test_one_step_ahead():
    events, found = course_of(ahead=1, steps=4)
    assert events == [
        ("draw", 0, [0, 1, 2], False),
        ("draw", 0, [3, 4, 5], False),
        ("update", 1),
        ("draw", 1, [6, 7, 8], False),
        ("update", 2),
        ("draw", 2, [9, 10, 11], False),
        ("update", 3),
        ("update", 4),
    ]
    assert drawn_by(found) == [0, 1, 1, 1]


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_rollouts_are_at_most_so_many_updates_old(ahead):
    _, found = course_of(ahead=ahead, steps=9)
    assert drawn_by(found) == [min(step, ahead) for step in range(9)]
    assert charts_of(found) == charts_of(course_of(steps=9)[1])


@pytest.mark.parametrize(("ahead", "partial"), [(1, 0), (2, 0), (0, 7), (2, 7)])
def test_a_resumed_stage_draws_what_an_uninterrupted_one_does(ahead, partial):
    """Nothing is drawn beyond a step that a checkpoint follows, and nothing rests there."""
    slow = {3: 1, 7: 5, 10: 1, 11: 2}
    _, whole = course_of(ahead, partial, every=3, steps=9, slow=slow)
    start = sum(len(charts_of(whole)[step]) for step in (1, 2, 3))
    _, rest = course_of(ahead, partial, every=3, steps=9, first=4, slow=slow, start=start)
    assert {s: charts_of(whole)[s] for s in rest} == charts_of(rest)
    assert drawn_by(whole)[3:] == drawn_by(rest)
    trained = [number for numbers in charts_of(whole).values() for number in numbers]
    assert sorted(trained) == list(range(len(trained)))


def test_a_checkpoint_that_waits_for_an_update_is_waited_for():
    """A skipped update puts its checkpoint off to the next step: nothing is drawn beyond it."""
    _, found = course_of(ahead=2, every=3, steps=9, pending=(3,))
    assert drawn_by(found) == [0, 1, 2, 0, 0, 1, 0, 1, 2]


def test_groups_that_rest_go_on_in_the_next_step_in_their_places():
    events, found = course_of(partial=7, steps=4, slow={1: 2, 4: 1})
    assert charts_of(found) == {1: [0, 2], 2: [3], 3: [5, 1, 4], 4: [6, 7, 8]}
    assert [e for e in events if e[0] == "draw"] == [
        ("draw", 0, [0, 1, 2], True),
        ("draw", 1, [3, 1, 4], True),
        ("draw", 2, [5, 1, 4], True),
        ("draw", 3, [6, 7, 8], False),
    ]
    assert [r.numbers.tolist() for r in found.values()][:3] == [[0, 2], [0], [0, 1, 2]]
    ages = drawn_by(found)
    assert ages[:2] == [0, 0] and ages[2] == pytest.approx((2 + 1 + 0) / 3)
    assert [r.metrics["rollout/resting"] for r in found.values()] == [1, 2, 0, 0]


def test_a_step_has_something_to_train_on():
    """Where all groups would rest they are finished at once."""
    events, found = course_of(partial=7, steps=2, slow={0: 9, 1: 9, 2: 9})
    assert charts_of(found)[1] == [0, 1, 2]
    assert events[:2] == [("draw", 0, [0, 1, 2], True), ("draw", 0, [0, 1, 2], False)]
    assert found[1].metrics["rollout/tokens"] == 2  # both runs are counted


def test_stats_add_up():
    total = Stats(tokens=1, seconds=2.0)
    total.add(Stats(tokens=3, row_steps=8, seconds=1.0, busy_seconds=1.5))
    assert dataclasses.astuple(total)[:2] == (4, 8)
    assert total.metrics()["rollout/idle"] == pytest.approx(0.5)


def test_a_group_says_which_policies_and_which_key_its_tokens_are_of():
    _, found = course_of(ahead=1, steps=4)
    for step, rollouts in found.items():
        behind = 1 if step > 1 else 0  # the rollouts of step 2 are drawn beside the first update
        policy = step - 1 - behind
        assert [o.policies for o in rollouts.origins] == [(policy, policy)] * PROMPTS
        assert {o.key for o in rollouts.origins} == {(0, step)}
        assert [o.uid for o in rollouts.origins] == [0, 1, 2]


def test_a_group_that_rested_has_the_first_and_the_last_policy():
    _, found = course_of(partial=5, steps=3, slow={1: 1})
    assert [o.policies for o in found[1].origins] == [(0, 0), (0, 0)]
    assert [o.policies for o in found[2].origins if o.uid == 1] == [(0, 1)]


def stage_of(slow=None):
    """(rollouts, its engine, charts that were given so far)."""
    rl = ConfigDict(
        {"ahead": 0, "partial": 0, "group": 2, "turns": 2, "rollout_prompts": 0, "rows": 0}
    )
    engine, given = Engine(slow), []

    def charts(count):
        given.extend(range(len(given), len(given) + count))
        return [chart(number) for number in given[len(given) - count :]]

    course = Course(100, 6)
    rollouts = Rollouts(
        engine, rl, Mode.FULL_TRAJECTORY, PROMPTS, charts, course, lambda name: True, (1, 2, 1)
    )
    return rollouts, engine, given


def test_groups_are_drawn_again_about_the_next_charts_in_their_places():
    rollouts, engine, _ = stage_of()
    first = rollouts.of(1)
    more = rollouts.again(1, 1, [0, 2])
    assert [int(group[0].chart.id) for group in more.groups] == [3, 4]
    assert engine.events[-1] == ("draw", 0, [3, 4], False)
    both = first.with_others([0, 2], more)
    assert [int(group[0].chart.id) for group in both.groups] == [3, 1, 4]
    assert both.metrics["rollout/resampled"] == 2.0
    keys = [origin.key for origin in both.origins]
    assert keys[0] == keys[2] != keys[1] and keys[1] == first.origins[1].key
    assert [origin.uid for origin in both.origins] == [origin.uid for origin in first.origins]
    third = rollouts.again(1, 2, [1])
    assert third.origins[0].key not in keys
    assert both.with_others([1], third).metrics["rollout/resampled"] == 3.0
    assert [int(group[0].chart.id) for group in first.groups] == [0, 1, 2]


def test_where_no_group_is_silent_nothing_is_drawn_again():
    rollouts, engine, given = stage_of()
    rollouts.of(1)
    before = len(engine.events), len(given)
    assert rollouts.again(1, 1, []) is None
    assert (len(engine.events), len(given)) == before

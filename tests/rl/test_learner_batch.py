"""Rows, loss masks and static shapes of an RL batch; every check of its sizes."""

import math

import numpy as np
import pytest

from mmrecoder_jax.config import ConfigError, load, set_fields
from mmrecoder_jax.data.batching import Piece, TokenRow, VisionLayout, advantages, loss_mask
from mmrecoder_jax.data.sources import Questions
from mmrecoder_jax.env import Execution, Status
from mmrecoder_jax.env.chartmimic import Scores
from mmrecoder_jax.rl.learner_batch import check_rl, learner_rows, learner_shape
from mmrecoder_jax.rl.trajectory import Mode, Trajectory, Turn
from tests.rl.charts import CHART


def config_with(**fields):
    config = load("stage2", "smoke")
    set_fields(config, {name.replace("__", "."): value for name, value in fields.items()})
    return config


def turn(finished: bool) -> Turn:
    ids, logps = np.arange(3, dtype=np.int32), np.zeros(3, np.float32)
    scores = Scores(0.0, 0.0, 0.0, 0.0)
    return Turn(ids, logps, finished, "", Execution(Status.NO_CODE), scores, 0.0)


def trajectory(*finished: bool) -> Trajectory:
    turns = tuple(turn(done) for done in finished)
    pieces = [Piece(np.arange(2, dtype=np.int32), 0)]
    pieces += [Piece(t.ids, number) for number, t in enumerate(turns, 1)]
    return Trajectory(CHART, 0, tuple(pieces), turns)


@pytest.mark.parametrize(
    "mode, finished, mask, trained",
    [
        (Mode.FULL_TRAJECTORY, (True, True), True, (1, 2)),
        (Mode.FULL_TRAJECTORY, (False, True), True, (2,)),
        (Mode.FULL_TRAJECTORY, (False, True), False, (1, 2)),
        (Mode.SHARED_FIRST_TURN, (True, True), True, (2,)),
        (Mode.SHARED_FIRST_TURN, (True, False), True, ()),
        (Mode.SHARED_FIRST_TURN, (True, False), False, (2,)),
        (Mode.SHARED_FIRST_TURN, (True, True, True), False, (3,)),
    ],
)
def test_turns_that_carry_loss(mode, finished, mask, trained):
    groups = [[trajectory(*finished)]]
    (row,) = learner_rows(groups, np.full((1, 1, len(finished)), 0.5), mode, mask)
    assert row.loss_turns == trained and row.advantage == 0.5


def test_groups_are_adjacent():
    groups = [[trajectory(True), trajectory(True)], [trajectory(True), trajectory(True)]]
    advantages = np.array([[[1.0, 1.5], [2.0, 2.5]], [[3.0, 3.5], [4.0, 4.5]]])
    rows = learner_rows(groups, advantages, Mode.FULL_TRAJECTORY, False)
    assert [row.turn_advantages for row in rows] == [(1.0, 1.5), (2.0, 2.5), (3.0, 3.5), (4.0, 4.5)]


def test_a_tokens_advantage_is_its_turns():
    groups = [[trajectory(True, True)]]
    (row,) = learner_rows(groups, np.array([[[0.5, -2.0]]]), Mode.FULL_TRAJECTORY, False)
    by_turn = advantages(row)[loss_mask(row)]
    assert by_turn.tolist() == [0.5] * 3 + [-2.0] * 3
    one = TokenRow(row.pieces, (1, 2), 0.25)
    assert advantages(one).tolist() == [0.25] * row.length


@pytest.mark.parametrize(
    "mode, rows, group, turns, ways, shown, images",
    [
        (Mode.SHARED_FIRST_TURN, 8, 4, 2, 1, "render", 4),  # 2 targets, 2 first renders
        (Mode.SHARED_FIRST_TURN, 8, 4, 2, 1, "both", 6),
        (Mode.FULL_TRAJECTORY, 8, 4, 2, 1, "difference", 10),  # 2 targets, 8 first renders
        (Mode.FULL_TRAJECTORY, 8, 4, 2, 1, "both", 18),
        (Mode.SHARED_FIRST_TURN, 8, 4, 3, 1, "render", 6),  # rows part before the last turn
        (Mode.FULL_TRAJECTORY, 8, 4, 3, 1, "both", 34),  # 2 targets, 8 x 2 x 2 pictures
        (Mode.FULL_TRAJECTORY, 8, 4, 1, 1, "both", 2),
        (Mode.FULL_TRAJECTORY, 8, 4, 2, 4, "render", 12),  # 4 parts: 1 target, 2 renders each
        (Mode.FULL_TRAJECTORY, 6, 4, 1, 1, "render", 3),  # 6 rows can touch 3 groups of 4
    ],
)
def test_images_of_a_part(mode, rows, group, turns, ways, shown, images):
    config = config_with(
        train__micro_batch_size=rows, rl__group=group, rl__turns=turns, feedback__image=shown
    )
    layout = VisionLayout(1, 0, 4, 12, ways=ways)
    shape = learner_shape(config, layout, mode, hosts=1)
    assert (shape.rows, shape.images) == (rows, images)
    assert shape.lengths == (112, 264) and shape.windows == (6, 12)
    rl = config.rl
    prompts = images if turns == 1 else rows // math.gcd(rows // ways, group)
    fed_back, answer = rl.feedback_length, rl.response_length
    if mode == Mode.SHARED_FIRST_TURN:
        in_common = rl.prompt_length + (turns - 1) * (answer + fed_back)
        own = answer
    else:
        in_common, own = rl.prompt_length, turns * answer + (turns - 1) * fed_back
    assert shape.tokens == (prompts * in_common + rows * own) // ways


@pytest.mark.parametrize(
    "questions, rows, group, ways, images",
    [
        (Questions(2, 2.0), 8, 4, 1, 12),  # 2 questions of two pictures, 8 renders
        (Questions(2, 1.25), 8, 4, 1, 11),  # 2.5 pictures, on average
        (Questions(3, 1.01), 8, 4, 4, 20),  # any question has room in each of 4 parts
    ],
)
def test_images_of_a_part_where_questions_show_several(questions, rows, group, ways, images):
    config = config_with(train__micro_batch_size=rows, rl__group=group)
    layout = VisionLayout(1, 0, 4, 12, ways=ways)
    shape = learner_shape(config, layout, Mode.FULL_TRAJECTORY, 1, questions)
    assert (shape.rows, shape.images) == (rows, images)


def test_a_host_has_its_part_of_the_rows():
    layout = VisionLayout(1, 0, 4, 12)
    config = config_with(train__micro_batch_size=8)
    assert learner_shape(config, layout, Mode.FULL_TRAJECTORY, hosts=2).rows == 4


def test_prompts_of_a_host():
    assert check_rl(config_with(train__batch_size=4, train__micro_batch_size=8), 2, 1) == 2


@pytest.mark.parametrize(
    "fields, hosts, ways, message",
    [
        # prompts do not split over hosts
        ({"train__batch_size": 5, "train__micro_batch_size": 4}, 2, 1, "train.batch_size=5"),
        # rows of a micro-batch do not split over hosts
        ({"train__batch_size": 6, "train__micro_batch_size": 3, "rl__group": 2}, 2, 1, "=3 rows"),
        # the batch is no whole number of micro-batches
        ({"train__batch_size": 4, "train__micro_batch_size": 12, "rl__group": 4}, 1, 1, "=12 rows"),
        # no row is left for a host
        ({"train__micro_batch_size": 0}, 1, 1, "=0 rows"),
        # neither whole groups nor equal parts of one
        ({"train__batch_size": 3, "train__micro_batch_size": 6, "rl__group": 4}, 1, 1, "=6 rows"),
        # rows cannot be cut over the devices
        ({"train__micro_batch_size": 4}, 1, 8, "data\\*fsdp=8"),
        ({"rl__rollout_prompts": 1}, 2, 1, "rl.rollout_prompts=1"),
        ({"rl__rows": 3}, 2, 1, "rl.rows=3"),
        ({"rl__truncated": "drop"}, 1, 1, "rl.truncated='drop'.*train, mask"),
    ],
)
def test_sizes_and_options_that_are_refused(fields, hosts, ways, message):
    with pytest.raises(ConfigError, match=message):
        check_rl(config_with(**fields), hosts, ways)

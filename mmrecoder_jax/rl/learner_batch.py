"""From trajectories to the learner's batch: rows, loss masks by turn, static shapes.

groups [P][G] of trajectories, advantages [P, G]
  -> token rows, groups adjacent (`learner_rows`)
  -> micro-batches [M, ...] of one static shape (`learner_collate`, `data.batching`)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from mmrecoder_jax.config import ConfigError, check_choice
from mmrecoder_jax.data import pipeline
from mmrecoder_jax.data.batching import (
    BatchShape,
    Collate,
    ImageArrays,
    Piece,
    TokenRow,
    VisionLayout,
)
from mmrecoder_jax.data.sources import Questions
from mmrecoder_jax.env.chart_env import FeedbackImage
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.losses import PenaltyIn
from mmrecoder_jax.rl.schedule import conversation_slots
from mmrecoder_jax.rl.trajectory import Mode, Trajectory

TRUNCATED = ("train", "mask")  # what rl.truncated does with responses that the limit cut


def learner_rows(
    groups: Sequence[Sequence[Trajectory]],
    advantages: Float[np.ndarray, "P G T"],
    mode: Mode,
    mask_truncated: bool,
) -> list[TokenRow]:
    """Token rows of all trajectories, groups adjacent.

    Args:
      advantages: of turns; alike where a trajectory has one.


    Stage 1 (shared first turn) trains the last turn, stage 2 every turn. With `mask_truncated` a
    turn that the length limit cut carries no loss; its advantage still counts in the group.
    """
    rows = []
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            turns = range(1, len(trajectory.turns) + 1)
            chosen = [turns[-1]] if mode == Mode.SHARED_FIRST_TURN else list(turns)
            if mask_truncated:
                chosen = [turn for turn in chosen if trajectory.turns[turn - 1].finished]
            by_turn = tuple(advantages[p, g].tolist())
            rows.append(
                TokenRow(trajectory.pieces, tuple(chosen), by_turn[-1], turn_advantages=by_turn)
            )
    return rows


def learner_batch(rows: Sequence[TokenRow], count: int, collate: Collate) -> dict[str, np.ndarray]:
    """The arrays `[M, ...]` of one update on this host.

    Args:
      count: rows of the arrays; where groups rest there are fewer, and what is missing has no loss.
    """
    empty = TokenRow((Piece(np.array([collate.layout.pad_id], np.int32), 0),), ())
    return pipeline.learner_batch([*rows, *[empty] * (count - len(rows))], collate)


def updates_per_step(rl: ConfigDict) -> int:
    """Optimizer steps of one step of a stage: every mini-batch, so many times."""
    return rl.updates_per_batch * rl.mini_batches


def learner_collate(
    config: ConfigDict,
    layout: VisionLayout,
    mode: Mode,
    image_arrays: ImageArrays,
    questions: Questions = Questions(),  # noqa: B008 - it is frozen
) -> Collate:
    """What makes this host's batches of an RL stage; denominators and buckets are global."""
    return Collate(
        learner_shape(config, layout, mode, jax.process_count(), questions),
        layout,
        aggregation=config.rl.aggregation,
        max_tokens=config.rl.response_length,
        totals=distributed.global_sum,
        largest=distributed.global_max,
        image_arrays=image_arrays,
    )


def learner_shape(
    config: ConfigDict,
    layout: VisionLayout,
    mode: Mode,
    hosts: int,
    questions: Questions = Questions(),  # noqa: B008 - it is frozen
) -> BatchShape:
    """One host's part of a micro-batch.

    A device's part holds the pictures of a question once per group, and what is fed back (one
    picture after each turn but the last, or two: `feedback.image`) once per row; in stage 1, where
    rows part before the last turn, that too once per group:

        G = 4, two turns, 8 rows on a device     stage 1: 2 targets + 2 renders = 4 images
                                                 stage 2: 2 targets + 8 renders = 10 images

    Args:
      questions: of the stage's charts.
    """
    rows, group, turns = config.train.micro_batch_size // hosts, config.rl.group, config.rl.turns
    own = rows // layout.ways
    groups = own // math.gcd(own, group)  # of which a part has rows, at most
    fed_back = (turns - 1) * FeedbackImage(config.feedback.image).pictures
    shared = mode == Mode.SHARED_FIRST_TURN
    images = questions.places(groups) + fed_back * (groups if shared else own)
    lengths, windows = tuple(config.data.lengths), tuple(config.data.windows)
    in_common, alone = slots_of(config, mode)
    tokens = groups * in_common + own * alone
    return BatchShape(
        rows,
        lengths,
        windows,
        images * layout.ways,
        sampled=True,
        tokens=tokens,
        budget=config.train.micro_tokens,
        numbered=PenaltyIn(config.rl.kl_in) is PenaltyIn.REWARD,
    )


def slots_of(config: ConfigDict, mode: Mode) -> tuple[int, int]:
    """Tokens that a conversation can have: (with its group, alone)."""
    rl = config.rl
    parts_at = rl.turns if mode == Mode.SHARED_FIRST_TURN else 1
    return conversation_slots(
        rl.prompt_length, rl.feedback_length, rl.response_length, rl.turns, parts_at
    )


def longest_row(config: ConfigDict) -> int:
    """Tokens that a conversation can have."""
    return sum(slots_of(config, Mode.FULL_TRAJECTORY))


def check_rl(config: Any, hosts: int, ways: int) -> int:
    """Checks the sizes and options of an RL stage before anything heavy starts.

    Args:
      hosts: processes that share the batch.
      ways: devices of one host that its rows are cut over.

    Returns:
      Prompts per host and step.

    Raises:
      ConfigError: sizes that do not fit together, or an option that does not exist.
    """
    cfg, rl = config.train, config.rl
    rows = cfg.micro_batch_size // hosts  # per host and micro-batch
    fits = (
        rows > 0
        and cfg.batch_size % hosts == 0
        and cfg.micro_batch_size % hosts == 0
        and cfg.batch_size % (rl.mini_batches * hosts) == 0
        and cfg.batch_size // rl.mini_batches * rl.group % cfg.micro_batch_size == 0
        and (rows % rl.group == 0 or rl.group % rows == 0)
    )
    if not fits:
        raise ConfigError(
            f"train.batch_size={cfg.batch_size} prompts x rl.group={rl.group} on {hosts} hosts "
            f"must split into rl.mini_batches={rl.mini_batches} mini-batches, and these into "
            "micro-batches of "
            f"train.micro_batch_size={cfg.micro_batch_size} rows, each host's of whole groups or "
            "equal parts of one"
        )
    if rows % ways:
        raise ConfigError(
            f"train.micro_batch_size={cfg.micro_batch_size} rows on {hosts} hosts cannot be cut "
            f"over data*fsdp={ways * hosts} devices: choose a multiple"
        )
    for field, count in (("rl.rollout_prompts", rl.rollout_prompts), ("rl.rows", rl.rows)):
        if count % hosts:
            raise ConfigError(f"{field}={count} must split over {hosts} hosts: choose a multiple")
    check_choice("rl.truncated", rl.truncated, TRUNCATED)
    return cfg.batch_size // hosts

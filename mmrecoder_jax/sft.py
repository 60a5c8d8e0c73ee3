"""The supervised loop: cold start 1 (single turn) and cold start 2 (two turns, the second learnt).

Both are one loop over a grain stream of token rows; what differs is the stream. Cold start 2 reads
correction dialogues (`data.self_correction`), mixed with `train.single_turn_share` plain pairs so
that the first turn is not forgotten.

    cold start 1    prompt [image]   response                                loss on the response
    cold start 2    prompt [image]   response 1   feedback   response 2      loss on response 2
"""

import os
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from mmrecoder_jax import accounts
from mmrecoder_jax.config import ConfigError, data_dir, derived_seed
from mmrecoder_jax.data import pipeline
from mmrecoder_jax.data.batching import BatchShape, Collate, TokenRow, VisionLayout
from mmrecoder_jax.data.sources import DialogueDirectory, Questions
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.update import LossFn
from mmrecoder_jax.loop import Loop, padding
from mmrecoder_jax.rl.losses import sft_loss, weighted_sum
from mmrecoder_jax.rl.policy import TokenLogps
from mmrecoder_jax.stage import Stage

SHOWN = ("loss", "held_out_loss", "probability", "lr")


def train(stage: Stage, dialogues: str | None = None) -> Any:
    """Runs cold start 1, or cold start 2 where `dialogues` names a dialogue directory.

    Resumes from the newest checkpoint of `stage.workdir`.

    Returns:
      The final parameters.

    Raises:
      ConfigError: batch sizes that do not fit together, or no dialogue to learn from.
    """
    config, cfg = stage.config, stage.config.train
    host, hosts = jax.process_index(), jax.process_count()
    _check_sizes(config, hosts * stage.layout.ways)
    source = None if dialogues is None else _dialogues(dialogues, config)
    fed_back = 0 if source is None else source.most_pictures()
    shape = sft_shape(config, stage.layout, fed_back, hosts, _questions(stage, source))
    collate = Collate(
        shape, stage.layout, totals=distributed.global_sum, largest=distributed.global_max
    )
    datasets, shares, size, digests = _datasets(stage, source)
    steps = cfg.steps or max(1, round(cfg.epochs * size / cfg.batch_size))
    stream = pipeline.supervised(
        datasets,
        shares,
        cfg.batch_size // hosts,
        seed=derived_seed(config, "data"),
        host=host,
        hosts=hosts,
    )
    iterator = iter(stream)
    held_out = _HeldOut(stage, collate) if source is None else None
    with Loop(stage, make_loss(stage.token_logps()), iterator, steps, data=digests) as loop:
        for step in loop.steps():
            with loop.phase("data"):
                batch = collate(accounts.next_of(iterator))
            with loop.phase("update"):
                metrics = loop.update(batch) | padding(batch)
            if held_out and held_out.is_due(step, steps):
                with loop.phase("held-out"):
                    metrics["held_out_loss"] = held_out.loss(loop.usable)
            loop.finish(step, metrics, SHOWN)
        return loop.usable


def make_loss(token_logps: TokenLogps) -> LossFn:
    """`loss(params, micro_batch) -> (loss, metrics)`: cross-entropy, and the mean probability of
    the right token.
    """

    def loss_fn(params: Any, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        logps, entropy = token_logps(params, batch)
        weights = batch["weights"]
        metrics = {
            "probability": weighted_sum(weights, jnp.exp(logps)),
            "entropy": weighted_sum(weights, entropy),
        }
        return sft_loss(logps, weights), metrics

    return loss_fn


def sft_shape(
    config: ConfigDict,
    layout: VisionLayout,
    fed_back: int,
    hosts: int,
    questions: Questions = Questions(),  # noqa: B008 - it is frozen
) -> BatchShape:
    """One host's part of a micro-batch: each row brings the pictures of its question, a dialogue
    also what is fed back in it.

    Args:
      fed_back: pictures in the feedbacks of a dialogue, at most.
      questions: of all rows.
    """
    rows = config.train.micro_batch_size // hosts
    own = rows // layout.ways
    images = (questions.places(own) + own * fed_back) * layout.ways
    lengths, windows = tuple(config.data.lengths), tuple(config.data.windows)
    return BatchShape(rows, lengths, windows, images, budget=config.train.micro_tokens)


def _questions(stage: Stage, dialogues: DialogueDirectory | None) -> Questions:
    """Pictures of the questions that are learnt from, and of those of the held-out loss."""
    config = stage.config
    found = stage.charts("train").questions()
    if dialogues is not None:
        return found | dialogues.questions()
    if config.train.eval_every and os.path.isdir(_split(stage, "val")):
        found |= stage.charts("val").questions()
    return found


def _split(stage: Stage, name: str) -> str:
    return os.path.join(data_dir(stage.config, stage.workdir), name)


def _check_sizes(config: ConfigDict, ways: int) -> None:
    """Raises ConfigError where batches cannot be cut into micro-batches over `ways` devices."""
    batch, rows = config.train.batch_size, config.train.micro_batch_size
    if batch % rows or rows % ways:
        raise ConfigError(
            f"train.batch_size={batch} must be a multiple of train.micro_batch_size={rows}, and "
            f"that of data*fsdp={ways} devices"
        )


def _datasets(
    stage: Stage, dialogues: DialogueDirectory | None
) -> tuple[list[grain.MapDataset], list[float], int, dict[str, str]]:
    """Row data sets, their shares, how many examples one epoch has, and digests of the data.

    They have the rows that a bucket holds, so shares and epochs speak of those.
    """
    config = stage.config

    charts = stage.charts("train")
    digests = {"data.dir": charts.digest()}

    def pairs() -> tuple[grain.MapDataset, int]:
        return _rows(stage, "charts", charts, pipeline.single_turn_row)

    if dialogues is None:
        rows, count = pairs()
        return [rows], [1.0], count, digests
    digests["data.dialogues"] = dialogues.digest()
    two_turns, count = _rows(stage, "dialogues", dialogues, pipeline.dialogue_row)
    share = config.train.single_turn_share
    if not share:
        return [two_turns], [1.0], count, digests
    size = round(count / (1.0 - share))
    return [two_turns, pairs()[0]], [1.0 - share, share], size, digests


def _dialogues(directory: str, config: ConfigDict) -> DialogueDirectory:
    try:
        source = DialogueDirectory(directory, config.data.instruction)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.dialogues={directory!r}: {error}") from error
    if not len(source):
        raise ConfigError(
            f"no dialogue in {directory}: none gained "
            f"dialogues.min_gain={config.dialogues.min_gain}"
        )
    return source


def _rows(
    stage: Stage, name: str, source: Any, to_row: Callable[..., TokenRow]
) -> tuple[grain.MapDataset, int]:
    """(row data set, how many rows it has) of a source, without what no bucket holds."""
    bad = accounts.bad_rows(stage.config, source)
    processor = stage.processor
    found = accounts.survey_rows(
        stage.config,
        stage.workdir,
        name,
        source,
        lambda item: to_row(item, processor, outline=True),
        bad,
    )
    rows = pipeline.rows_of(
        source,
        lambda item: to_row(item, processor),
        max(stage.config.data.lengths),
        max(stage.config.data.windows),
        bad,
        found.kept,
    )
    return rows, len(found.kept)


class _HeldOut:
    """The held-out loss of cold start 1: the first batches of the val split, where there is one."""

    def __init__(self, stage: Stage, collate: Collate):
        config = stage.config
        self._every, self._mesh = config.train.eval_every, stage.mesh
        self._batch: dict[str, np.ndarray] = {}
        if self._every and os.path.isdir(_split(stage, "val")):
            charts = stage.charts("val")
            rows = pipeline.rows_of(
                charts,
                lambda chart: pipeline.single_turn_row(chart, stage.processor),
                max(config.data.lengths),
                max(config.data.windows),
                accounts.bad_rows(config, charts),
            )
            with distributed.together(), accounts.bad_rows_named():
                # All hosts read the same rows, so they agree on how many batches there are.
                batches = pipeline.held_out(
                    rows, config.train.micro_batch_size, config.train.eval_batches
                )
            if batches:
                self._batch = collate(
                    [row for batch in batches for row in distributed.own_share(batch)]
                )
            elif distributed.is_main():
                print(
                    f"no held-out loss: of {len(charts)} charts in {charts.directory} fewer than "
                    f"train.micro_batch_size={config.train.micro_batch_size} fit data.lengths and "
                    "data.windows",
                    flush=True,
                )
        loss = make_loss(stage.token_logps())
        self._loss = jax.jit(lambda params, micro: loss(params, micro)[0])

    def is_due(self, step: int, last: int) -> bool:
        """Whether this step ends with an evaluation."""
        return bool(self._batch) and (step % self._every == 0 or step == last)

    def loss(self, params: Any) -> float:
        """The mean over the tokens."""
        count = len(self._batch["tokens"])
        micros = ({name: x[i] for name, x in self._batch.items()} for i in range(count))
        with jax.set_mesh(self._mesh):
            return sum(
                float(self._loss(params, distributed.to_global(micro, self._mesh)))
                for micro in micros
            )

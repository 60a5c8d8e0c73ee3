"""The supervised loop: cold start 1 (single turn) and cold start 2 (two turns, the second is
learnt).

Both are one loop over a grain stream of token rows; what differs is the stream. Cold start 2 reads
correction dialogues (`data.self_correction`), mixed with `train.single_turn_share` plain pairs so
that the first turn is not forgotten.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrecoder_jax.data import pipeline
from mmrecoder_jax.data.batching import BatchShape, Collate
from mmrecoder_jax.data.sources import DialogueDirectory
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.checkpoint import Checkpoints
from mmrecoder_jax.learner.update import Update, from_params, make_optimizer
from mmrecoder_jax.monitoring.metrics import MetricsWriter
from mmrecoder_jax.monitoring.progress import Progress
from mmrecoder_jax.rl.losses import sft_loss
from mmrecoder_jax.runtime import ConfigError, Runtime, prepare_workdir


def make_loss(runtime: Runtime):
    """`loss(params, micro_batch) -> (loss, metrics)`: cross-entropy and the mean probability of the
    right token.
    """

    def loss_fn(params, batch):
        logps, entropy = runtime.token_logps(params, batch)
        weights = batch["weights"]
        metrics = {
            "probability": (weights * jnp.exp(logps)).sum(),
            "entropy": (weights * entropy).sum(),
        }
        return sft_loss(logps, weights), metrics

    return loss_fn


def batch_shape(runtime: Runtime, dialogues: bool, hosts: int) -> BatchShape:
    """A host's part of a micro-batch: each row brings its target, a dialogue also what its first
    turn drew.
    """
    config = runtime.config
    rows = config.train.micro_batch_size // hosts
    return BatchShape(
        rows, tuple(config.data.lengths), tuple(config.data.windows), rows * (2 if dialogues else 1)
    )


def train(runtime: Runtime, dialogues: str | None = None) -> Any:
    """Runs cold start 1, or cold start 2 where `dialogues` names a dialogue directory. Returns the
    final parameters.

    Goes on from the newest checkpoint of `runtime.workdir`. Raises ConfigError for batch sizes that
    do not fit together.
    """
    config = runtime.config
    cfg, host, hosts = config.train, jax.process_index(), jax.process_count()
    rows = cfg.micro_batch_size
    ways = hosts * runtime.layout.ways
    if cfg.batch_size % rows or rows % ways:
        raise ConfigError(
            f"train.batch_size={cfg.batch_size} must be a multiple of train.micro_batch_size={rows}, and that of data*fsdp={ways} devices"
        )
    collate = Collate(
        batch_shape(runtime, dialogues is not None, hosts),
        runtime.layout,
        totals=distributed.global_sum,
        largest=distributed.global_max,
    )
    datasets, shares, size = _datasets(runtime, dialogues)
    steps = cfg.steps or max(1, round(cfg.epochs * size / cfg.batch_size))
    stream = pipeline.supervised(
        datasets, shares, cfg.batch_size // hosts, collate, seed=config.seed, host=host, hosts=hosts
    )
    iterator = iter(stream)
    held_out = _held_out(runtime, collate, dialogues is None)

    tx, schedule = make_optimizer(config.optim, steps)
    loss_fn = make_loss(runtime)
    update = Update(loss_fn, tx, schedule, runtime.mesh, runtime.trained)
    evaluate = jax.jit(
        lambda params, batch: loss_fn(params, jax.tree.map(lambda x: x[0], batch))[0]
    )
    prepare_workdir(runtime)
    with (
        Checkpoints(runtime.workdir, config.checkpoint.keep, runtime.saved) as checkpoints,
        MetricsWriter(
            runtime.workdir, config.log.tensorboard, config.log.wandb, config.to_dict()
        ) as writer,
    ):
        state = from_params(
            runtime.initial_params(), tx, runtime.mesh, config.seed, runtime.trained
        )
        state = checkpoints.restore(state, iterator) or state
        start = int(state.step)
        writer.rewind(config.stage, start)
        with Progress(config.stage, steps, cfg.log_every, start_step=start) as progress:
            for step in range(start + 1, steps + 1):
                with progress.phase("data"):
                    batch = next(iterator)
                with progress.phase("update"):
                    state, metrics = update(state, batch)
                    metrics = {name: float(value) for name, value in metrics.items()}
                if held_out and cfg.eval_every and (step % cfg.eval_every == 0 or step == steps):
                    with progress.phase("held-out"), jax.set_mesh(runtime.mesh):
                        losses = [
                            float(
                                evaluate(
                                    state.params, distributed.to_global(b, runtime.mesh, axis=1)
                                )
                            )
                            for b in held_out
                        ]
                    metrics["held_out_loss"] = float(np.mean(losses))
                if step % config.checkpoint.every == 0 or step == steps:
                    with progress.phase("save"):
                        checkpoints.save(state, iterator, {"stage": config.stage, "step": step})
                shown = {
                    name: metrics[name]
                    for name in ("loss", "held_out_loss", "probability", "lr")
                    if name in metrics
                }
                timing = progress.step(step, shown)
                if distributed.is_main():
                    writer.write(step, config.stage, metrics | timing)
        return state.params


def _datasets(runtime: Runtime, dialogues: str | None) -> tuple[list, list[float], int]:
    """Row data sets, their shares, and how many examples one epoch has."""
    config, processor = runtime.config, runtime.processor
    longest = max(config.data.lengths)
    charts = runtime.charts("train")

    def pairs():
        return pipeline.rows_of(
            charts, lambda chart: pipeline.single_turn_row(chart, processor), longest
        )

    if dialogues is None:
        return [pairs()], [1.0], len(charts)
    source = DialogueDirectory(dialogues, config.data.instruction)
    if not len(source):
        raise ConfigError(
            f"no dialogue in {dialogues}: none gained dialogues.min_gain={config.dialogues.min_gain}"
        )
    two_turns = pipeline.rows_of(
        source, lambda dialogue: pipeline.dialogue_row(dialogue, processor), longest
    )
    share = config.train.single_turn_share
    if not share:
        return [two_turns], [1.0], len(source)
    return [two_turns, pairs()], [1.0 - share, share], round(len(source) / (1.0 - share))


def _held_out(
    runtime: Runtime, collate: Collate, single_turn: bool
) -> Sequence[dict[str, np.ndarray]]:
    """Batches of the val split for the held-out loss of cold start 1."""
    config = runtime.config
    path = os.path.join(config.data.dir or os.path.join(runtime.workdir, "data"), "val")
    if not (single_turn and config.train.eval_every and os.path.isdir(path)):
        return []
    rows = pipeline.rows_of(
        runtime.charts("val"),
        lambda chart: pipeline.single_turn_row(chart, runtime.processor),
        max(config.data.lengths),
    )
    return pipeline.held_out(
        rows,
        config.train.micro_batch_size // jax.process_count(),
        config.train.eval_batches,
        collate,
    )

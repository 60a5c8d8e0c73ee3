"""GRPO with self-correction, both stages (arXiv 2604.01600, section on reinforcement learning).

    for each batch of P prompts q:
      stage 1 (shared first turn)                      stage 2 (full trajectory)
        o1 ~ pi(. | q)            one per prompt         o1_i ~ pi(. | q)              i = 1..G
        f1 = execute(o1)                                 f1_i = execute(o1_i)
        o2_i ~ pi(. | q, o1, f1)  i = 1..G               o2_i ~ pi(. | q, o1_i, f1_i)
      R_i   = R(o2_i) + gamma R(o1_i) + eta B            rl.rewards      (reward.gamma, reward.eta; the paper ends at 0, 0)
      A_i   = (R_i - mean_G R) / (std_G R + eps)         rl.advantages   (rl.std_ddof, rl.std_eps)
      loss  = - mean( pi / stop_gradient(pi) * A_i )     rl.losses       over turn-2 tokens | over the tokens of both turns
      one optimizer step                                 train_state     (rl.updates_per_batch = 1: on-policy)

Feedback and prompt tokens carry no loss. Nothing is prefetched below the rollout: every batch is
sampled with the parameters that the update then changes.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrecoder_jax.data import pipeline
from mmrecoder_jax.data.batching import BatchShape, Collate, ImageArrays, TokenRow
from mmrecoder_jax.env import ChartEnv
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.checkpoint import Checkpoints
from mmrecoder_jax.learner.update import Update, from_params, make_optimizer
from mmrecoder_jax.models.sharding import batch_sharding
from mmrecoder_jax.models.trees import Chosen, join, split
from mmrecoder_jax.monitoring.metrics import MetricsWriter
from mmrecoder_jax.monitoring.progress import Progress
from mmrecoder_jax.rl.advantages import group_advantages
from mmrecoder_jax.rl.losses import grpo_loss
from mmrecoder_jax.rl.monitors import rollout_metrics
from mmrecoder_jax.rl.rewards import RewardConfig, trajectory_rewards, turn_rewards
from mmrecoder_jax.rl.rollout import FULL_TRAJECTORY, SHARED_FIRST_TURN, Trajectory, judge_score
from mmrecoder_jax.rl.trajectory import write_trajectories
from mmrecoder_jax.runtime import ConfigError, Runtime, prepare_workdir

FixedLogps = Callable[[Any, dict[str, np.ndarray]], np.ndarray]

MODES = {"stage1": SHARED_FIRST_TURN, "stage2": FULL_TRAJECTORY}


def train(runtime: Runtime, env: ChartEnv) -> Any:
    """Runs stage 1 or stage 2 (`config.stage`) from the newest checkpoint of the work directory;
    returns the parameters.
    """
    config = runtime.config
    mode, cfg, rl = MODES[config.stage], config.train, config.rl
    host, hosts = jax.process_index(), jax.process_count()
    prompts_per_host = _check(config, hosts, runtime.layout.ways)
    charts = runtime.charts("train")
    steps = cfg.steps or max(1, round(cfg.epochs * len(charts) / cfg.batch_size))
    iterator = iter(
        pipeline.prompts(charts, prompts_per_host, seed=config.seed, host=host, hosts=hosts)
    )
    reward = RewardConfig(
        config.reward.alpha, config.reward.beta, config.reward.gamma, config.reward.eta
    )

    tx, schedule = make_optimizer(config.optim, steps * rl.updates_per_batch)
    update = Update(make_loss(runtime), tx, schedule, runtime.mesh, runtime.trained)
    prepare_workdir(runtime)
    with (
        runtime.judge() as judge,
        Checkpoints(runtime.workdir, config.checkpoint.keep, runtime.saved) as checkpoints,
        MetricsWriter(
            runtime.workdir, config.log.tensorboard, config.log.wandb, config.to_dict()
        ) as writer,
    ):
        engine = runtime.engine(env, rl.temperature, judge)
        collate = _collate(runtime, mode, engine.image_arrays)
        initial = runtime.initial_params()
        fixed_logps = make_fixed_logps(runtime)
        reference = copy_of_trained(initial, runtime.trained) if rl.kl_coef else None
        state = from_params(initial, tx, runtime.mesh, config.seed, runtime.trained)
        del initial
        state = checkpoints.restore(state, iterator) or state
        start = int(state.step) // rl.updates_per_batch
        writer.rewind(config.stage, start)
        with Progress(config.stage, steps, cfg.log_every, start_step=start) as progress:
            for step in range(start + 1, steps + 1):
                with progress.phase("data"):
                    batch_charts = next(iterator)
                    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), step)
                    uids = [host * prompts_per_host + i for i in range(prompts_per_host)]

                groups = []
                at_once = rl.rollout_prompts // hosts or prompts_per_host
                for first in range(0, prompts_per_host, at_once):
                    part = slice(first, first + at_once)
                    groups += engine.rollout(
                        state.params,
                        batch_charts[part],
                        uids[part],
                        key,
                        mode=mode,
                        group=rl.group,
                        turns=rl.turns,
                        progress=progress,
                    )
                with progress.phase("score"):
                    rewards = turn_rewards(reward_parts(groups), reward)
                    returns = trajectory_rewards(rewards, reward)
                    # NaN where the judge could not score a turn that counts
                    scorable = np.isfinite(returns)
                    advantages, silent = group_advantages(
                        jnp.asarray(returns), jnp.asarray(scorable), rl.std_eps, rl.std_ddof
                    )
                    advantages = np.asarray(advantages)

                with progress.phase("data"):
                    rows = learner_rows(
                        groups, advantages, mode, mask_truncated=rl.truncated == "mask"
                    )
                    batch = pipeline.learner_batch(rows, collate)
                with progress.phase("update"):
                    batch = add_fixed_logps(runtime, fixed_logps, state.params, reference, batch)
                    for _ in range(rl.updates_per_batch):
                        state, metrics = update(state, batch)
                    metrics = {name: float(value) for name, value in metrics.items()}

                metrics |= rollout_metrics(groups, rewards, returns, advantages, np.asarray(silent))
                metrics |= {f"judge/{k}": v for k, v in judge.stats().items()} if judge else {}
                if (
                    rl.trajectories_every
                    and step % rl.trajectories_every == 0
                    and distributed.is_main()
                ):
                    flat = [
                        (t, rewards[p, g], advantages[p, g])
                        for p, group in enumerate(groups)
                        for g, t in enumerate(group)
                    ]
                    write_trajectories(os.path.join(runtime.workdir, "trajectories"), step, flat)
                if step % config.checkpoint.every == 0 or step == steps:
                    with progress.phase("save"):
                        checkpoints.save(state, iterator, {"stage": config.stage, "step": step})
                shown = (
                    "reward",
                    "turn1/low_level",
                    "turn2/low_level",
                    "turn2/exec_rate",
                    "entropy",
                    "grad_norm",
                )
                timing = progress.step(
                    step, {name: metrics[name] for name in shown if name in metrics}
                )
                if distributed.is_main():
                    writer.write(step, config.stage, metrics | timing | env_metrics(env.stats()))
        return state.params


def make_loss(runtime: Runtime):
    """`loss(params, micro_batch) -> (loss, metrics)` of GRPO for the configured options."""
    rl = runtime.config.rl

    def loss_fn(params, batch):
        logps, entropy = runtime.token_logps(params, batch, rl.temperature)
        weights = batch["weights"]
        loss, metrics = grpo_loss(
            logps,
            batch["advantages"],
            weights,
            old_logps=batch.get("old_logps"),
            ref_logps=batch.get("ref_logps"),
            clip_low=rl.clip_low,
            clip_high=rl.clip_high,
            kl_coef=rl.kl_coef,
        )
        return loss, metrics | {
            "entropy": (weights * entropy).sum(),
            "logp": (weights * logps).sum(),
        }

    return loss_fn


def learner_rows(
    groups: list[list[Trajectory]], advantages: np.ndarray, mode: str, mask_truncated: bool
) -> list[TokenRow]:
    """Trajectories -> token rows, groups adjacent. Stage 1 trains the last turn, stage 2 every
    turn.

    With `mask_truncated` a turn that the length limit cut carries no loss (its advantage still
    counts in the group).
    """
    rows = []
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            turns = range(1, len(trajectory.turns) + 1)
            chosen = [turns[-1]] if mode == SHARED_FIRST_TURN else list(turns)
            if mask_truncated:
                chosen = [turn for turn in chosen if trajectory.turns[turn - 1].finished]
            rows.append(TokenRow(trajectory.pieces, tuple(chosen), float(advantages[p, g])))
    return rows


def reward_parts(groups: list[list[Trajectory]]) -> np.ndarray:
    """(format, rule, model) of every turn `[P, G, T, 3]`; model is 0 where there was nothing to
    judge, NaN where judging failed.
    """
    return np.array(
        [
            [
                [(turn.format, turn.scores.overall, judge_score(turn)) for turn in t.turns]
                for t in group
            ]
            for group in groups
        ]
    )


def env_metrics(stats: dict[str, float]) -> dict[str, float]:
    """The environment's counts under names that make a panel of each kind: `env_status/ok`,
    `env_rate/tamper`, `env_seconds/cpu`.
    """

    def name(key: str) -> str:
        if "seconds" in key:
            return "env_seconds/" + (key.removesuffix("_seconds") if key != "seconds" else "wall")
        kind, _, rest = key.partition("_")
        return f"env_{kind}/{rest}" if kind in ("status", "flag", "rate") else f"env/{key}"

    return {name(key): value for key, value in stats.items()}


def copy_of_trained(params: Any, trained: Chosen) -> Any:
    """A policy that stays as it is while `params` are updated: what is trained is copied, the rest
    is shared.
    """
    moving, fixed = split(params, trained)
    return join(jax.tree.map(jnp.copy, moving), fixed)


def add_fixed_logps(
    runtime: Runtime, logps: FixedLogps, params: Any, reference: Any, batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Adds the log-probabilities that stay fixed during the updates of a batch: before the first
    update, and of the reference policy.
    """
    if runtime.config.rl.updates_per_batch > 1:
        batch = batch | {"old_logps": logps(params, batch)}
    if reference is not None:
        batch = batch | {"ref_logps": logps(reference, batch)}
    return batch


def make_fixed_logps(runtime: Runtime) -> FixedLogps:
    """`logps(params, batch)`: log-probabilities `[M, B, L]` of this host's rows without gradient,
    one micro-batch after the other.
    """
    temperature = runtime.config.rl.temperature
    by_row = batch_sharding(runtime.mesh)
    one = jax.jit(
        lambda params, micro: runtime.token_logps(params, micro, temperature)[0],
        out_shardings=by_row,
    )

    def logps(params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
        parts = ({name: x[i] for name, x in batch.items()} for i in range(len(batch["tokens"])))
        with jax.set_mesh(runtime.mesh):
            return np.stack(
                [
                    distributed.to_host(one(params, distributed.to_global(part, runtime.mesh)))
                    for part in parts
                ]
            )

    return logps


def _collate(runtime: Runtime, mode: str, image_arrays: ImageArrays) -> Collate:
    config = runtime.config
    return Collate(
        batch_shape(runtime, mode, jax.process_count()),
        runtime.layout,
        aggregation=config.rl.aggregation,
        max_tokens=config.rl.response_length,
        totals=distributed.global_sum,
        largest=distributed.global_max,
        image_arrays=image_arrays,
    )


def batch_shape(runtime: Runtime, mode: str, hosts: int) -> BatchShape:
    """A host's part of a micro-batch. In a device's part each target image stands once a group,
    each first render once a row (stage 1: once a group).
    """
    config, ways = runtime.config, runtime.layout.ways
    rows, group, turns = config.train.micro_batch_size // hosts, config.rl.group, config.rl.turns
    own = rows // ways
    # that a part can show
    groups = (
        own // group if own % group == 0 else 1 if group % own == 0 else 1 + -(-(own - 1) // group)
    )
    images = (
        groups * turns if mode == SHARED_FIRST_TURN and turns == 2 else groups + own * (turns - 1)
    )
    return BatchShape(rows, tuple(config.data.lengths), tuple(config.data.windows), images * ways)


def _check(config: Any, hosts: int, ways: int) -> int:
    """Prompts of one host and step; `ways` devices of the batch axes are a host's. Raises
    ConfigError for sizes that do not fit together or options that are not there.
    """
    cfg, rl = config.train, config.rl
    rows = cfg.micro_batch_size // hosts  # of a host and micro-batch
    uneven = (
        cfg.batch_size % hosts
        or cfg.micro_batch_size % hosts
        or cfg.batch_size * rl.group % cfg.micro_batch_size
    )
    if uneven or rows == 0 or (rows % rl.group and rl.group % rows):
        raise ConfigError(
            f"train.batch_size={cfg.batch_size} prompts x rl.group={rl.group} on {hosts} hosts must split into micro-batches of "
            f"train.micro_batch_size={cfg.micro_batch_size} rows, each host's of whole groups or equal parts of one"
        )
    if rows % ways:
        raise ConfigError(
            f"train.micro_batch_size={cfg.micro_batch_size} rows on {hosts} hosts cannot be cut over data*fsdp={ways * hosts} devices: "
            "choose a multiple"
        )
    if rl.rollout_prompts and (rl.rollout_prompts % hosts or cfg.batch_size % rl.rollout_prompts):
        raise ConfigError(
            f"rl.rollout_prompts={rl.rollout_prompts} must divide train.batch_size={cfg.batch_size} and split over {hosts} hosts"
        )
    if rl.truncated not in ("train", "mask"):
        raise ConfigError(f"rl.truncated={rl.truncated!r}: use 'train' or 'mask'")
    if config.reward.judge == "none" and config.reward.beta:
        raise ConfigError(
            f"reward.beta={config.reward.beta} needs a judge, but reward.judge is 'none': set --config.reward.beta=0"
        )
    return cfg.batch_size // hosts

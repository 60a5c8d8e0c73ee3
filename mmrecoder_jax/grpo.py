"""GRPO with self-correction, both stages (arXiv 2604.01600, section on reinforcement learning).

    for each batch of P prompts q:
      stage 1 (shared first turn)                      stage 2 (full trajectory)
        o1 ~ pi(. | q)            one per prompt         o1_i ~ pi(. | q)              i = 1..G
        f1 = execute(o1)                                 f1_i = execute(o1_i)
        o2_i ~ pi(. | q, o1, f1)  i = 1..G               o2_i ~ pi(. | q, o1_i, f1_i)
      R_i   = R(o2_i) + gamma R(o1_i) + eta B            reward.gamma, reward.eta (end at 0, 0)
      A_i   = (R_i - mean_G R) / (std_G R + eps)         rl.advantage, rl.std_ddof, rl.std_eps
      loss  = - mean( pi / stop_gradient(pi) * A_i )     over turn-2 tokens | tokens of both turns
      one optimizer step                                 rl.updates_per_batch = 1: on-policy

Feedback and prompt tokens carry no loss. Nothing is prefetched below the rollout: every batch is
sampled with the parameters that the update then changes (or, with `rl.ahead` and `rl.partial`, with
older ones: `rl/step_rollouts.py`).

To follow one step, read this file and `rl/rollout.py` (prompts to executed and scored turns),
`rl/rewards.py`, `rl/advantages.py` and `rl/losses.py`. `Loop.update` adds up the gradients of
micro-batches and takes one optax step; rows and static shapes are made in `rl/learner_batch.py`.

Left out of GRPO, and why:
  KL to a reference      off (rl.kl_coef = 0) as in the paper; else in the loss, or taken off R_i
                         (rl.kl_in), by one of three estimates (rl.kl), of the policy of init_from
                         or one that follows (rl.reference_every)
  clipped ratio          off, because one update per batch makes the ratio 1; clipping is used with
                         rl.updates_per_batch > 1 or rl.mini_batches > 1
  old-policy snapshot    not needed on-policy: the sampler reads the learner's own parameters
  older rollouts         off (rl.ahead = rl.partial = 0); else truncated importance weights
  advantage per turn     off (rl.credit = trajectory): one advantage per trajectory, as in the paper
  resampled groups       off (rl.resample = 0): a group without signal (equal rewards) weighs 0 and
                         is counted; DAPO draws it again
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from mmrecoder_jax import accounts
from mmrecoder_jax.config import derived_seed
from mmrecoder_jax.data import pipeline
from mmrecoder_jax.data.batching import Arrays, Collate, TokenRow, with_advantages
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.held_out import HeldOutCharts
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.update import LossFn
from mmrecoder_jax.loop import Loop, padding
from mmrecoder_jax.rl.advantages import Baseline, Credit, group_advantages
from mmrecoder_jax.rl.divergence import OfTurns, divergence_of_turns
from mmrecoder_jax.rl.learner_batch import (
    check_rl,
    learner_batch,
    learner_collate,
    learner_rows,
    longest_row,
    updates_per_step,
)
from mmrecoder_jax.rl.losses import (
    Divergence,
    Objective,
    PenaltyIn,
    Ratio,
    Tokens,
    grpo_loss,
    logp_gap,
    truncated_importance,
    weighted_sum,
)
from mmrecoder_jax.rl.monitors import RolloutLog
from mmrecoder_jax.rl.policy import FixedLogps, TokenLogps
from mmrecoder_jax.rl.rewards import RewardConfig, rewards_of, trajectory_rewards
from mmrecoder_jax.rl.step_rollouts import Rollouts, is_off_policy
from mmrecoder_jax.rl.trajectory import MODES, Mode, Trajectory
from mmrecoder_jax.stage import Stage

SHOWN = (
    *("reward", "turn1/low_level", "turn2/low_level"),
    *("turn2/exec_rate", "entropy", "grad_norm"),
    *("eval/greedy/turn2/low_level", "eval/greedy/improvement"),
)


def train(stage: Stage, env: ChartEnv) -> Any:
    """Runs stage 1 or stage 2 (`config.stage`) from the newest checkpoint of the work directory.

    Returns:
      The final parameters.

    Raises:
      ConfigError: sizes that do not fit together, or an option that does not exist.
    """
    config, rl = stage.config, stage.config.rl
    mode = MODES[config.stage]
    host, hosts = jax.process_index(), jax.process_count()
    prompts = check_rl(config, hosts, stage.layout.ways)  # per host
    charts = stage.charts("train")
    bad = accounts.bad_rows(config, charts)
    found = accounts.survey_prompts(
        config, stage.workdir, charts, stage.processor, bad, config.rl.turns
    )
    steps = config.train.steps or max(
        1, round(config.train.epochs * len(found.kept) / config.train.batch_size)
    )
    # Where responses rest, a step takes fewer new prompts than it has.
    at_once = 1 if rl.partial else prompts
    iterator = iter(
        pipeline.prompts(
            charts,
            at_once,
            stage.processor,
            bad,
            found.kept,
            seed=derived_seed(config, "data"),
            host=host,
            hosts=hosts,
        )
    )

    def next_charts(count: int) -> list[Chart]:
        most = int(distributed.global_max(np.array([count]))[0])  # one exchange for all hosts
        found: list[Chart] = []
        for _ in range(-(-most // at_once)):
            with distributed.together(), accounts.bad_rows_named():
                if len(found) < count:
                    found += next(iterator)
        return found

    reward = RewardConfig.of(config)
    in_reward = PenaltyIn(rl.kl_in) is PenaltyIn.REWARD
    logps = stage.token_logps(rl.temperature, learns_entropy=bool(rl.entropy_coef))
    with (
        stage.judge() as judge,
        Loop(
            stage,
            make_loss(config, logps),
            iterator,
            steps,
            limits=limits(rl),
            updates_per_step=updates_per_step(rl),
            keep_reference=bool(rl.kl_coef),
            reference_every=rl.reference_every,
            data={"data.dir": charts.digest()},
        ) as loop,
    ):
        engine = stage.engine(env, rl.temperature, judge)
        mesh = stage.mesh.devices.shape
        rollouts = Rollouts(engine, rl, mode, prompts, next_charts, loop, stage.trained, mesh)
        held_out = HeldOutCharts(stage, engine, mode)
        shown = charts.questions()
        collate = learner_collate(config, stage.layout, mode, engine.image_arrays, shown)
        written = os.path.join(stage.workdir, "trajectories")
        log = RolloutLog(
            *(written, rl.trajectories_every, env, judge),
            saved_every=config.checkpoint.every,
            most_bytes=rl.trajectories_gb * 1e9,
            show=loop.show,
        )
        penalised = bool(rl.kl_coef) and not in_reward
        fixed_logps = FixedLogps(logps, stage.mesh, updates_per_step(rl), penalised)
        if config.train.micro_tokens:  # else nobody knows yet how many tokens there will be
            outline = collate.outline(longest_row(config), found.widest)
            micro_batches = prompts * rl.group // rl.mini_batches // collate.shape.rows
            loop.compile_ahead(fixed_logps.outline(outline), micro_batches)
        for step in loop.steps():
            # Rollouts: G trajectories per prompt, executed, scored and judged.
            drawn = rollouts.of(step)

            # Rewards [P, G, T] of turns, returns [P, G] of trajectories, advantages [P, G, T].
            with loop.phase("score"):
                worth = valued(drawn.groups, reward, prompts, rl)
            for attempt in range(1, 1 + rl.resample):
                places = np.flatnonzero(worth.silent).tolist()
                more = rollouts.again(step, attempt, places)
                if more is None:
                    break
                with loop.phase("score"):
                    drawn = drawn.with_others(places, more)
                    worth = valued(drawn.groups, reward, prompts, rl)

            # Loss and update: one step on the batch (or clipped ones, several times or in parts).
            with loop.phase("data"):
                rows = learner_rows(drawn.groups, worth.advantages, mode, rl.truncated == "mask")
                batches = mini_batches(rows, prompts * rl.group, rl.mini_batches, collate)

            metrics: dict[str, float] = {}
            advantages = worth.advantages
            if in_reward:  # log-probabilities by both policies come first, then advantages
                with loop.phase("reference"):
                    advantages, batches, metrics = less_divergence(
                        *(drawn.groups, rows, batches, reward, (loop.params, loop.reference)),
                        *(fixed_logps, prompts, mode, rl),
                    )

            def update(batches: Any = batches, metrics: dict[str, float] = metrics) -> None:
                with loop.phase("update"):
                    both = loop.params, loop.reference
                    metrics |= loop.update(*(fixed_logps.add_to(*both, x) for x in batches))

            rollouts.beside(step, update)
            last = advantages[..., -1]
            metrics |= log.record(step, drawn, worth.rewards, worth.returns, last, worth.silent)
            metrics |= drawn.metrics | padding(*batches)
            if held_out.is_due(step, steps):
                with loop.phase("held-out"):
                    metrics |= held_out.metrics(loop.usable)
            loop.finish(step, metrics, SHOWN)
        return loop.usable


@dataclasses.dataclass(frozen=True)
class Worth:
    """What this host's trajectories are worth.

    Attributes:
      rewards: of turns; returns: of trajectories. NaN where the judge could not score.
      advantages: of turns; all the same in a trajectory that has one (`rl.credit`).
      silent: groups that give no signal.
    """

    rewards: Float[np.ndarray, "P G T"]
    returns: Float[np.ndarray, "P G"]
    advantages: Float[np.ndarray, "P G T"]
    silent: Bool[np.ndarray, " P"]


def valued(
    groups: Sequence[Sequence[Trajectory]],
    reward: RewardConfig,
    prompts: int,
    rl: ConfigDict,
    penalties: Float[np.ndarray, "P G T"] | None = None,
) -> Worth:
    """Rewards and advantages of groups; of at most so many prompts.

    Args:
      penalties: of turns, taken off the rewards before these become advantages (`rl.divergence`).
    """
    rewards = rewards_of(groups, reward)
    returns = trajectory_rewards(rewards, reward)
    if penalties is not None:
        rewards, returns = rewards - penalties, returns - penalties.sum(axis=-1)
    turns = rewards.shape[-1]
    if rl.credit == Credit.TURN:
        found = [advantages_of(rewards[..., turn], prompts, rl) for turn in range(turns)]
        advantages = np.stack([each for each, _ in found], axis=-1)
        return Worth(rewards, returns, advantages, np.all([silent for _, silent in found], axis=0))
    each, silent = advantages_of(returns, prompts, rl)
    return Worth(rewards, returns, np.repeat(each[..., None], turns, axis=-1), silent)


Rows = TypeVar("Rows", Sequence[TokenRow], np.ndarray)


def parted(rows: Rows, count: int, parts: int) -> list[Rows]:
    """The rows of each mini-batch, or what belongs to them: in their order, in equal parts.

    Args:
      count: rows of all parts, with those that rest.
    """
    each = count // parts
    return [rows[start : start + each] for start in range(0, count, each)]


def mini_batches(
    rows: Sequence[TokenRow], count: int, parts: int, collate: Collate
) -> list[Arrays]:
    """The arrays of each mini-batch (`parted`)."""
    return [learner_batch(part, count // parts, collate) for part in parted(rows, count, parts)]


def less_divergence(
    groups: Sequence[Sequence[Trajectory]],
    rows: Sequence[TokenRow],
    batches: Sequence[Arrays],
    reward: RewardConfig,
    policies: tuple[Any, Any],
    fixed_logps: FixedLogps,
    prompts: int,
    mode: Mode,
    rl: ConfigDict,
) -> tuple[Float[np.ndarray, "P G T"], list[Arrays], dict[str, float]]:
    """Advantages once the divergence is taken off the rewards (`rl.divergence`).

    Args:
      rows, batches: of the groups, whose advantages nobody reads.
      policies: today's, and the reference.

    Returns:
      (the advantages, batches with them, metrics).
    """
    parts = parted(rows, prompts * rl.group, rl.mini_batches)
    before, reference = ([fixed_logps.of(each, x) for x in batches] for each in policies)
    found = [
        divergence_of_turns(own, theirs, batch, part, rl.turns, mode, Divergence(rl.kl))
        for own, theirs, batch, part in zip(before, reference, batches, parts, strict=True)
    ]
    apart = OfTurns(*(np.concatenate(x) for x in zip(*found, strict=True)))
    penalties = rl.kl_coef * apart.sums.reshape(len(groups), rl.group, rl.turns)
    advantages = valued(groups, reward, prompts, rl, penalties).advantages
    by_row = parted(advantages.reshape(-1, rl.turns), prompts * rl.group, rl.mini_batches)
    batches = [with_advantages(*x) for x in zip(batches, parts, by_row, strict=True)]
    if updates_per_step(rl) > 1:  # the ratio is taken to the same log-probabilities
        batches = [x | {"old_logps": own} for x, own in zip(batches, before, strict=True)]
    return advantages, batches, apart.metrics(rl.kl_coef)


def advantages_of(
    returns: Float[np.ndarray, "P G"], prompts: int, rl: ConfigDict
) -> tuple[Float[np.ndarray, "P G"], Bool[np.ndarray, " P"]]:
    """(advantages, whether groups gave no signal) of this host's groups.

    Args:
      returns: NaN where the judge could not score a turn that counts.
      prompts: of a step on this host. Where groups rest there are fewer; one program serves all.
    """
    rest = np.full((prompts - len(returns), rl.group), np.nan)
    returns = np.concatenate([returns, rest])
    advantages, silent = jax.device_get(
        group_advantages(
            jnp.asarray(returns),
            jnp.asarray(np.isfinite(returns)),
            *(rl.std_eps, rl.std_ddof, Baseline(rl.advantage)),
        )
    )
    count = prompts - len(rest)
    return advantages[:count], silent[:count]


def limits(rl: ConfigDict) -> dict[str, float]:
    """Metrics of the loss above which a step is refused."""
    return {"logp_gap": rl.max_logp_gap}


def make_loss(config: ConfigDict, token_logps: TokenLogps) -> LossFn:
    """`loss(params, micro_batch) -> (loss, metrics)` of GRPO with the options of `config.rl`."""
    rl = config.rl
    options = Objective(
        ratio=Ratio(rl.objective),
        clip_low=rl.clip_low,
        clip_high=rl.clip_high,
        clip_dual=rl.clip_dual,
        kl=Divergence(rl.kl),
        kl_coef=rl.kl_coef,
        entropy_coef=rl.entropy_coef,
    )

    def loss_fn(params: Any, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        logps, entropy = token_logps(params, batch)
        weights = batch["weights"]
        # What a batch was sampled with beside what the learner computes before its first update.
        before = batch.get("old_logps", jax.lax.stop_gradient(logps))
        found: dict[str, Array] = {}
        importance = None
        if is_off_policy(config):
            importance, found = truncated_importance(
                before, batch["sampler_logps"], weights, rl.max_importance
            )
        rows = len(batch["rows"]) // len(weights)  # of a part
        tokens = Tokens(
            weights,
            batch["advantages"],
            batch["sequence"],
            batch.get("old_logps"),
            batch.get("ref_logps"),
            importance,
            entropy if rl.entropy_coef else None,
        )
        loss, metrics = grpo_loss(logps, tokens, options, rows)
        means = {"entropy": weighted_sum(weights, entropy), "logp": weighted_sum(weights, logps)}
        gap = logp_gap(before, batch["sampler_logps"], weights, batch["sequence"], rows)
        return loss, metrics | means | found | gap

    return loss_fn

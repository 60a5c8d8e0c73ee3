"""What is watched during RL: rewards and rates per turn, self-correction, and signs of collapse."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from mmrecoder_jax.env.execution import Replay
from mmrecoder_jax.env.wire import Flag
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.correction import correction, same_code
from mmrecoder_jax.rl.trajectory import Trajectory, Turn, write_trajectories


@runtime_checkable
class Counts(Protocol):
    """What counts something since the start of the run (an environment, a judge)."""

    def stats(self) -> dict[str, float]: ...


class RolloutLog:
    """Writes down what a step's rollouts were: metrics, and trajectories where they are due.

    Args:
      directory: of the trajectories.
      every: steps between written trajectories; 0: none.
      env: counts executions.
      judge: counts verdicts; None where there is none.
    """

    def __init__(self, directory: str, every: int, env: Counts, judge: Counts | None):
        self._directory, self._every, self._env, self._judge = directory, every, env, judge

    def record(
        self,
        step: int,
        groups: Sequence[Sequence[Trajectory]],
        rewards: Float[np.ndarray, "P G T"],
        returns: Float[np.ndarray, "P G"],
        advantages: Float[np.ndarray, "P G"],
        silent: Bool[np.ndarray, " P"],
    ) -> dict[str, float]:
        """The step's metrics; see `rollout_metrics` for the arguments."""
        if self._every and step % self._every == 0 and distributed.is_main():
            rows = [
                (trajectory, rewards[p, g], float(advantages[p, g]))
                for p, group in enumerate(groups)
                for g, trajectory in enumerate(group)
            ]
            write_trajectories(self._directory, step, rows)
        metrics = rollout_metrics(groups, rewards, returns, advantages, silent)
        metrics |= env_metrics(self._env.stats())
        if self._judge is not None:
            metrics |= {f"judge/{name}": value for name, value in self._judge.stats().items()}
        return metrics


def rollout_metrics(
    groups: Sequence[Sequence[Trajectory]],
    rewards: Float[np.ndarray, "P G T"],
    returns: Float[np.ndarray, "P G"],
    advantages: Float[np.ndarray, "P G"],
    silent: Bool[np.ndarray, " P"],
) -> dict[str, float]:
    """Means over one step's trajectories. A mean over nothing is left out.

    Trajectories that could not be scored (NaN) are counted as "unscorable" and left out of the
    means of rewards.

    Args:
      silent: marks groups that gave no signal (all rewards equal).
    """
    trajectories = [t for group in groups for t in group]
    metrics = {
        "reward": _mean(returns),
        "reward_std": _mean([_std(group) for group in returns]),
        "unscorable": float(np.isnan(returns).sum()),
        "silent_groups": float(np.mean(silent)),
        "advantage_max": float(np.abs(advantages).max()),
    }
    for turn in range(rewards.shape[-1]):
        turns = [t.turns[turn] for t in trajectories]
        found = {"reward": _mean(rewards[..., turn])} | turn_metrics(turns)
        metrics |= {f"turn{turn + 1}/{name}": value for name, value in found.items()}
    if rewards.shape[-1] > 1:
        metrics |= correction_metrics(trajectories)
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def turn_metrics(turns: Sequence[Turn]) -> dict[str, float]:
    """Means over the same turn of many trajectories; "judge" is there where there is a judge."""
    metrics = {
        "low_level": float(np.mean([t.scores.overall for t in turns])),
        "exec_rate": float(np.mean([t.execution.ok for t in turns])),
        "format": float(np.mean([t.format for t in turns])),
        "truncated": float(np.mean([not t.finished for t in turns])),
        "tokens": float(np.mean([len(t.ids) for t in turns])),
        "logp": float(np.mean([t.logps.mean() if len(t.logps) else 0.0 for t in turns])),
        "tampered": float(np.mean([Flag.TAMPER in t.execution.flags for t in turns])),
        # A share of the executions is replayed; these are rates among those.
        "hidden_text": _rate_of_replays(turns, Flag.HIDDEN_TEXT),
        "forged": _rate_of_replays(turns, Flag.FORGED),
    }
    verdicts = [t.verdict for t in turns if t.verdict is not None]
    if verdicts:
        metrics["judge"] = _mean([np.nan if v.score is None else v.score for v in verdicts])
        metrics["judge_unscorable"] = float(sum(v.score is None for v in verdicts))
    return metrics


def correction_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The second turn against the first (`rl.correction`); empty where no first turn executes."""
    firsts, seconds = zip(*((t.turns[0], t.turns[1]) for t in trajectories), strict=True)
    found = correction(
        executed=np.array([turn.execution.ok for turn in firsts]),
        before=np.array([turn.scores.overall for turn in firsts], np.float64),
        after=np.array([turn.scores.overall for turn in seconds], np.float64),
        repeats=np.array([same_code(a.text, b.text) for a, b in zip(firsts, seconds, strict=True)]),
    )
    if found is None:
        return {}
    return {
        "improvement": float(found.gains.mean()),
        "improved": found.improved,
        "regressed": found.regressed,
        "code_repeat": found.code_repeat,
    }


def env_metrics(stats: Mapping[str, float]) -> dict[str, float]:
    """The environment's counts under names that make one panel per kind.

    `status_ok` -> `env_status/ok`, `rate_tamper` -> `env_rate/tamper`, `cpu_seconds` ->
    `env_seconds/cpu`.
    """

    def name(key: str) -> str:
        if "seconds" in key:
            return "env_seconds/" + (key.removesuffix("_seconds") if key != "seconds" else "wall")
        kind, _, rest = key.partition("_")
        return f"env_{kind}/{rest}" if kind in ("status", "flag", "rate") else f"env/{key}"

    return {name(key): value for key, value in stats.items()}


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of what is not NaN; NaN where nothing is left."""
    numbers = np.asarray(values)
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if numbers.size else float("nan")


def _std(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.std()) if values.size else float("nan")


def _rate_of_replays(turns: Sequence[Turn], flag: Flag) -> float:
    replayed = [t.execution.flags for t in turns if t.execution.replay == Replay.DONE]
    return float(np.mean([flag in flags for flags in replayed])) if replayed else 0.0

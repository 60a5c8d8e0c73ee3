"""What is watched during RL: rewards and rates per turn, self-correction, and signs of collapse."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from mmrecoder_jax.env import pool
from mmrecoder_jax.env.execution import Execution, Replay
from mmrecoder_jax.env.response import extract_thought
from mmrecoder_jax.env.wire import Flag, Status
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.correction import correction, same_code
from mmrecoder_jax.rl.kept import keep_below
from mmrecoder_jax.rl.trajectory import Origin, Trajectory, Turn, write_trajectories

# Is given a step's number, and of each group one trajectory, its rewards by turn, its advantage.
Show = Callable[[int, Sequence[tuple[Trajectory, Float[np.ndarray, " T"], float]]], None]


@runtime_checkable
class Counts(Protocol):
    """What counts something since the start of the run (an environment, a judge)."""

    def stats(self) -> dict[str, float]: ...


@runtime_checkable
class Drawn(Protocol):
    """What a step is trained on (`rl.step_rollouts.StepRollouts`)."""

    @property
    def groups(self) -> Sequence[Sequence[Trajectory]]:
        """`[P'][G]`."""
        ...

    @property
    def numbers(self) -> Int[np.ndarray, " P"]:
        """Of the groups among those of all hosts."""
        ...

    @property
    def origins(self) -> Sequence[Origin]:
        """Of the groups."""
        ...


class RolloutLog:
    """Writes down what a step's rollouts were: metrics, and trajectories where they are due.

    Args:
      directory: of the trajectories.
      every: steps between written trajectories; 0: none.
      env: counts executions.
      judge: counts verdicts; None where there is none.
      saved_every: steps between checkpoints. The rollouts after a checkpoint, and the first of all,
        are written too: theirs is a policy that is kept, so they can be sampled again.
      most_bytes: that the directory may hold (`rl.kept`).
      show: is given what was written.
    """

    def __init__(
        self,
        directory: str,
        every: int,
        env: Counts,
        judge: Counts | None,
        *,
        saved_every: int,
        most_bytes: float,
        show: Show,
    ):
        self._directory, self._every, self._env, self._judge = directory, every, env, judge
        self._saved_every, self._most_bytes, self._show = saved_every, most_bytes, show

    def record(
        self,
        step: int,
        drawn: Drawn,
        rewards: Float[np.ndarray, "P G T"],
        returns: Float[np.ndarray, "P G"],
        advantages: Float[np.ndarray, "P G"],
        silent: Bool[np.ndarray, " P"],
    ) -> dict[str, float]:
        """The step's metrics, of all hosts; the arguments are this host's (`rollout_metrics`)."""
        groups, numbers = drawn.groups, drawn.numbers
        if self._is_due(step):
            rows = [
                (trajectory, rewards[p, g], float(advantages[p, g]))
                for p, group in enumerate(groups)
                for g, trajectory in enumerate(group)
            ]
            size = len(rows) // max(len(groups), 1)
            places = (numbers[:, None] * size + np.arange(size)).ravel()
            origins = [(origin, member) for origin in drawn.origins for member in range(size)]
            write_trajectories(self._directory, step, rows, places, origins)
            keep_below(self._directory, self._most_bytes)
            self._show(step, [row for number, row in enumerate(rows) if number % size == 0])
        mine = facts_of(groups), rewards, returns, advantages, silent
        metrics = rollout_metrics(*(distributed.all_rows(x, numbers) for x in mine))
        metrics |= env_metrics(pool.total(distributed.gather_json(self._env.stats())))
        if self._judge is not None:
            found = judge_total(distributed.gather_json(self._judge.stats()))
            metrics |= {f"judge/{name}": value for name, value in found.items()}
        return metrics

    def _is_due(self, step: int) -> bool:
        after_checkpoint = (step - 1) % self._saved_every == 0
        return bool(self._every) and (step % self._every == 0 or after_checkpoint)


# What is known of a turn, as numbers, so that hosts can exchange it.
FACTS = (
    *("low_level", "exec_rate", "format", "truncated", "tokens", "logp", "tampered", "oversized"),
    *("blank", "thought", "replayed", "undecided", "hidden_text", "forged"),
    *("judged", "judge", "disagreement", "repeat", "same_render"),
)


def facts_of(groups: Sequence[Sequence[Trajectory]]) -> Float[np.ndarray, "P G T facts"]:
    """`FACTS` of every turn of this host's trajectories."""
    return np.array([[_facts(t.turns) for t in group] for group in groups], np.float64)


def _facts(turns: Sequence[Turn]) -> list[list[float]]:
    rows = []
    for number, turn in enumerate(turns):
        execution, verdict = turn.execution, turn.verdict
        judge = np.nan if verdict is None or verdict.score is None else verdict.score
        row = {
            "low_level": turn.scores.overall,
            "exec_rate": execution.ok,
            "format": turn.format,
            "truncated": not turn.finished,
            "tokens": len(turn.ids),
            "logp": turn.logps.mean() if len(turn.logps) else 0.0,
            "tampered": Flag.TAMPER in execution.flags,
            "oversized": execution.status == Status.OVERSIZED,
            "blank": is_blank(execution),
            "thought": len(extract_thought(turn.text)),
            "replayed": execution.replay == Replay.DONE,
            "undecided": execution.replay == Replay.UNDECIDED,
            "hidden_text": Flag.HIDDEN_TEXT in execution.flags,
            "forged": Flag.FORGED in execution.flags,
            "judged": verdict is not None,
            "judge": judge,
            "disagreement": abs(judge - turn.scores.overall),
            "repeat": number == 1 and same_code(turns[0].text, turn.text),
            "same_render": number == 1 and _same_render(turns[0].execution, execution),
        }
        rows.append([float(row[name]) for name in FACTS])
    return rows


def is_blank(execution: Execution) -> bool:
    """Whether a script ran and drew nothing: a picture of one colour, or axes without a drawing."""
    image, record = execution.image, execution.record
    one_colour = image is not None and bool((image == image[:1, :1]).all())
    return execution.ok and (one_colour or (record is not None and not record.types))


def _same_render(first: Execution, second: Execution) -> bool:
    """Whether two scripts drew the same picture, pixel for pixel."""
    if first.image is None or second.image is None:
        return False
    return np.array_equal(first.image, second.image)


def rollout_metrics(
    facts: Float[np.ndarray, "P G T facts"],
    rewards: Float[np.ndarray, "P G T"],
    returns: Float[np.ndarray, "P G"],
    advantages: Float[np.ndarray, "P G"],
    silent: Bool[np.ndarray, " P"],
) -> dict[str, float]:
    """Means over one step's trajectories. A mean over nothing is left out.

    Trajectories that could not be scored (NaN) are counted as "unscorable" and left out of the
    means of rewards.

    Args:
      facts: see `facts_of`.
      silent: marks groups that gave no signal (all rewards equal).
    """
    metrics = {
        "reward": _mean(returns),
        "reward_std": _mean([_std(group) for group in returns]),
        "unscorable": float(np.isnan(returns).sum()),
        "silent_groups": float(np.mean(silent)),
        "advantage_max": float(np.abs(advantages).max()),
    }
    columns = [
        {name: np.ascontiguousarray(facts[:, :, turn, i].ravel()) for i, name in enumerate(FACTS)}
        for turn in range(facts.shape[2])
    ]
    for turn, column in enumerate(columns):
        found = {"reward": _mean(rewards[..., turn])} | turn_metrics(column)
        metrics |= {f"turn{turn + 1}/{name}": value for name, value in found.items()}
    if len(columns) > 1:
        metrics |= correction_metrics(*columns[:2])
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


Column = Mapping[str, Float[np.ndarray, " trajectories"]]  # a turn's facts by name


def turn_metrics(turns: Column) -> dict[str, float]:
    """Means over the same turn of many trajectories; "judge" is there where there is a judge."""
    names = FACTS[: FACTS.index("replayed")]
    metrics = {name: float(np.mean(turns[name])) for name in names}
    metrics["logp"] = float(np.mean(turns["logp"].astype(np.float32)))  # as the sampler counts
    replayed = turns["replayed"] > 0  # a share of the executions; these are rates among those
    for name in ("hidden_text", "forged"):
        metrics[name] = float(np.mean(turns[name][replayed])) if replayed.any() else 0.0
    asked = replayed | (turns["undecided"] > 0)
    metrics["undecided"] = float(np.mean(turns["undecided"][asked])) if asked.any() else 0.0
    judged = turns["judged"] > 0
    if judged.any():
        metrics["judge"] = _mean(turns["judge"][judged])
        metrics["judge_unscorable"] = float(np.isnan(turns["judge"][judged]).sum())
        metrics["disagreement"] = _mean(turns["disagreement"][judged])
    return metrics


def correction_metrics(first: Column, second: Column) -> dict[str, float]:
    """The second turn against the first (`rl.correction`); empty where no first turn executes."""
    found = correction(
        executed=first["exec_rate"] > 0,
        before=first["low_level"],
        after=second["low_level"],
        repeats=second["repeat"] > 0,
    )
    if found is None:
        return {}
    return {
        "improvement": float(found.gains.mean()),
        "improved": found.improved,
        "regressed": found.regressed,
        "same": 1 - found.improved - found.regressed,
        "code_repeat": found.code_repeat,
        "identical_renders": float(second["same_render"][first["exec_rate"] > 0].mean()),
    }


def judge_total(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The counts of several hosts' judges together, and their latencies over all answers."""
    if len(stats) == 1:
        return dict(stats[0])
    answered = [own["scored"] + own["unscorable"] for own in stats]
    seconds = sum(own["latency_mean"] * max(n, 1) for own, n in zip(stats, answered, strict=True))
    counts = {name: sum(own[name] for own in stats) for name in stats[0]}
    return counts | {
        "latency_mean": seconds / max(sum(answered), 1),
        "latency_max": max(own["latency_max"] for own in stats),
    }


def env_metrics(stats: Mapping[str, float]) -> dict[str, float]:
    """The environment's counts under names that make one panel per kind.

    `status_ok` -> `env_status/ok`, `rate_tamper` -> `env_rate/tamper`, `cpu_seconds` ->
    `env_seconds/cpu`, `host_10.0.0.5:7435` -> `env_host/10.0.0.5:7435`.
    """

    def name(key: str) -> str:
        if "seconds" in key:
            return "env_seconds/" + (key.removesuffix("_seconds") if key != "seconds" else "wall")
        kind, _, rest = key.partition("_")
        return f"env_{kind}/{rest}" if kind in ("status", "flag", "rate", "host") else f"env/{key}"

    return {name(key): value for key, value in stats.items()}


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """The mean of what is not NaN; NaN where nothing is left."""
    numbers = np.asarray(values)
    numbers = numbers[~np.isnan(numbers)]
    return float(numbers.mean()) if numbers.size else float("nan")


def _std(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.std()) if values.size else float("nan")

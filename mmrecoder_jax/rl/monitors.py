"""What is watched during RL: rewards and rates per turn, self-correction, and the signs of
collapse.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mmrecoder_jax.env.chart_env import extract_code
from mmrecoder_jax.rl.rollout import Trajectory, Turn


def rollout_metrics(
    groups: Sequence[Sequence[Trajectory]],
    rewards: Float[np.ndarray, "P G T"],
    returns: Float[np.ndarray, "P G"],
    advantages: Float[np.ndarray, "P G"],
    silent: np.ndarray,
) -> dict[str, float]:
    """Means over one step's trajectories. `silent` marks groups that gave no signal (all rewards
    equal).

    Trajectories that could not be scored (NaN) are counted as "unscorable" and left out of the
    means of rewards. "turn<t>/judge" is the mean of the judge's scores of that turn's renders,
    where there is a judge. A mean over nothing is left out.
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
        metrics |= {
            f"turn{turn + 1}/reward": _mean(rewards[..., turn]),
            f"turn{turn + 1}/low_level": float(np.mean([t.scores.overall for t in turns])),
            f"turn{turn + 1}/exec_rate": float(np.mean([t.execution.ok for t in turns])),
            f"turn{turn + 1}/format": float(np.mean([t.format for t in turns])),
            f"turn{turn + 1}/truncated": float(np.mean([not t.finished for t in turns])),
            f"turn{turn + 1}/tokens": float(np.mean([len(t.ids) for t in turns])),
            f"turn{turn + 1}/logp": float(
                np.mean([t.logps.mean() if len(t.logps) else 0.0 for t in turns])
            ),
            f"turn{turn + 1}/tampered": float(
                np.mean(["tamper" in t.execution.flags for t in turns])
            ),
            # Found by replays of a share of the executions: among those.
            f"turn{turn + 1}/hidden_text": _rate_of_replays(turns, "hidden_text"),
            f"turn{turn + 1}/forged": _rate_of_replays(turns, "forged"),
        }
        verdicts = [t.verdict for t in turns if t.verdict is not None]
        if verdicts:
            metrics[f"turn{turn + 1}/judge"] = _mean(
                [np.nan if v.score is None else v.score for v in verdicts]
            )
            metrics[f"turn{turn + 1}/judge_unscorable"] = float(
                sum(v.score is None for v in verdicts)
            )
    if rewards.shape[-1] > 1:
        metrics |= correction_metrics(trajectories)
    return {name: value for name, value in metrics.items() if not np.isnan(value)}


def _mean(values) -> float:
    """The mean of what is not NaN; NaN where nothing is left."""
    values = np.asarray(values)
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else np.nan


def _std(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.std()) if values.size else np.nan


def _rate_of_replays(turns: Sequence[Turn], flag: str) -> float:
    replayed = [t.execution.flags for t in turns if t.execution.replay == "done"]
    return float(np.mean([flag in flags for flags in replayed])) if replayed else 0.0


def correction_metrics(
    trajectories: Sequence[Trajectory], margin: float = 1e-6
) -> dict[str, float]:
    """Self-correction over samples whose first turn executes (arXiv 2604.01600): mean improvement
    of the low-level score, share improved, share regressed, share whose second code repeats the
    first. Empty where no first turn executes.
    """
    counted = [t for t in trajectories if t.turns[0].execution.ok]
    if not counted:
        return {}
    gains = np.array([t.turns[1].scores.overall - t.turns[0].scores.overall for t in counted])
    repeats = [same_code(t.turns[0].text, t.turns[1].text) for t in counted]
    return {
        "improvement": float(gains.mean()),
        "improved": float((gains > margin).mean()),
        "regressed": float((gains < -margin).mean()),
        "code_repeat": float(np.mean(repeats)),
    }


def same_code(first: str, second: str) -> bool:
    """Whether two responses contain the same code, up to surrounding blank space."""
    a, b = extract_code(first), extract_code(second)
    return a is not None and b is not None and a.strip() == b.strip()

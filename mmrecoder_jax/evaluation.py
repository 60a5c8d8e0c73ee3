"""Evaluation with K turns: how good each turn is, and whether the later one corrects the first.

`python -m mmrecoder_jax.evaluate --config=configs/evaluate.py:tiny
--config.init_from=runs/tiny/stage2 --workdir=runs/eval`

Scores are `code_pass`: a script that does not execute scores 0. The self-correction figures count
only samples whose first turn already executes (arXiv 2604.01600): making a crashed script run is
not self-correction. With a judge (`reward.judge`) its score is reported under the judge's name; a
render it could not score is left out and counted. Intervals are 95 % bootstrap intervals over
charts, paired: a resample draws charts, not turns.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from mmrecoder_jax.data.sources import Chart, ChartDirectory
from mmrecoder_jax.monitoring.progress import bar
from mmrecoder_jax.rl.judge.base import Judge
from mmrecoder_jax.rl.monitors import same_code
from mmrecoder_jax.rl.rollout import RolloutEngine, Trajectory, judge_score
from mmrecoder_jax.rl.trajectory import write_trajectories
from mmrecoder_jax.runtime import Runtime

PARTS = ("low_level", "text", "layout", "type", "color")
MARGIN = 1e-6  # a change of the low-level score smaller than this is none


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of N charts over T turns.

    Attributes:
      name: e.g. "stage1 greedy".
      executed: bool [N, T].
      scores: float [N, T, 5] in the order of `PARTS`, 0 where the script did not execute.
      repeats: bool [N, T]: the turn's code repeats that of the turn before (False in the first).
      trajectories: the N conversations.
      judge: the judge's name, "" where there is none.
      judged: the judge's scores [N, T]: 0 where there was no render, NaN where it could not score
        one.
    """

    name: str
    executed: np.ndarray
    scores: Float[np.ndarray, "N T 5"]
    repeats: np.ndarray
    trajectories: tuple[Trajectory, ...]
    judge: str = ""
    judged: Float[np.ndarray, "N T"] | None = None


def run_evaluation(
    engine: RolloutEngine,
    params: Any,
    charts: Sequence[Chart],
    *,
    name: str,
    turns: int,
    batch_size: int,
    seed: int,
) -> Evaluation:
    """Lets the policy redraw every chart in `turns` turns. Charts are taken `batch_size` at a time
    (the last batch is filled up).
    """
    trajectories: list[Trajectory] = []
    numbers = list(range(len(charts)))
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    key = jax.random.key(seed)
    for batch in bar(f"evaluate {name}", batches, unit="batch"):
        filled = batch + [batch[-1]] * (batch_size - len(batch))
        groups = engine.rollout(params, [charts[i] for i in filled], filled, key, turns=turns)
        trajectories += [group[0] for group in groups[: len(batch)]]
    return measure(name, trajectories, "" if engine.judge is None else engine.judge.name)


def measure(name: str, trajectories: Sequence[Trajectory], judge: str = "") -> Evaluation:
    """The arrays of an `Evaluation` from finished trajectories; `judge` is the name of the judge
    that saw them.
    """
    executed = np.array([[turn.execution.ok for turn in t.turns] for t in trajectories])
    scores = np.array(
        [
            [[getattr(turn.scores, p) for p in ("overall", *PARTS[1:])] for turn in t.turns]
            for t in trajectories
        ]
    )
    repeats = np.array(
        [
            [i > 0 and same_code(t.turns[i - 1].text, turn.text) for i, turn in enumerate(t.turns)]
            for t in trajectories
        ]
    )
    judged = (
        np.array([[judge_score(turn) for turn in t.turns] for t in trajectories]) if judge else None
    )
    return Evaluation(name, executed, scores, repeats, tuple(trajectories), judge, judged)


def summarise(evaluation: Evaluation, seed: int = 0) -> list[dict[str, Any]]:
    """One row a turn: exec rate, low-level score and its parts, with intervals; from turn 2 on also
    what it did to turn 1.
    """
    rows = []
    for turn in range(evaluation.scores.shape[1]):
        low = evaluation.scores[:, turn, 0]
        row = {
            "policy": evaluation.name,
            "turn": turn + 1,
            "charts": len(low),
            "exec_rate": float(evaluation.executed[:, turn].mean()),
            **{part: float(evaluation.scores[:, turn, i].mean()) for i, part in enumerate(PARTS)},
            "low_level_ci": bootstrap(low, seed),
        }
        if evaluation.judged is not None:
            scored = evaluation.judged[~np.isnan(evaluation.judged[:, turn]), turn]
            row |= {"judge": evaluation.judge, "judge_unscorable": len(low) - len(scored)}
            row |= (
                {"judge_score": float(scored.mean()), "judge_ci": bootstrap(scored, seed)}
                if len(scored)
                else {}
            )
        if turn:
            row |= correction(evaluation, turn, seed)
        rows.append(row)
    return rows


def correction(evaluation: Evaluation, turn: int, seed: int = 0) -> dict[str, Any]:
    """Turn `turn` (0-based) against turn 0, over samples whose first turn executes; empty where
    there is none.
    """
    counted = evaluation.executed[:, 0]
    if not counted.any():
        return {}
    gains = evaluation.scores[counted, turn, 0] - evaluation.scores[counted, 0, 0]
    return {
        "counted": int(counted.sum()),
        "improvement": float(gains.mean()),
        "improvement_ci": bootstrap(gains, seed),
        "improved": float((gains > MARGIN).mean()),
        "regressed": float((gains < -MARGIN).mean()),
        "code_repeat": float(evaluation.repeats[counted, turn].mean()),
    }


def bootstrap(
    values: Float[np.ndarray, " N"], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the mean over charts."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def evaluation_sets(runtime: Runtime) -> dict[str, Sequence[Chart]]:
    """The configured charts by name: the split, and the real gallery where there is one."""
    config = runtime.config
    charts = runtime.charts(config.eval.split)
    count = config.eval.count or len(charts)
    sets: dict[str, Sequence[Chart]] = {
        config.eval.split: [charts[i] for i in range(min(count, len(charts)))]
    }
    if config.data.gallery:
        gallery = ChartDirectory(config.data.gallery, config.data.instruction)
        count = config.eval.gallery_count or len(gallery)
        # evenly spread, because neighbours come from one file
        picks = np.unique(np.linspace(0, len(gallery) - 1, min(count, len(gallery))).astype(int))
        sets["gallery"] = [gallery[int(i)] for i in picks]
    return sets


def evaluate(
    runtime: Runtime,
    params: Any,
    env: Any,
    name: str,
    sets: dict[str, Sequence[Chart]] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a policy on the configured sets, greedily and (with `eval.sampled`) at temperature
    1.

    Writes `evaluation.json` (rows of `summarise`, with "set" and "decoding") and the trajectories
    into the work directory; returns the rows.
    """
    with runtime.judge() as judge:
        rows = _evaluate(runtime, params, env, name, sets or evaluation_sets(runtime), judge)
    path = os.path.join(runtime.workdir, "evaluation.json")
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(rows, f, indent=1)
    os.replace(path + ".tmp", path)
    return rows


def _evaluate(
    runtime: Runtime,
    params: Any,
    env: Any,
    name: str,
    sets: dict[str, Sequence[Chart]],
    judge: Judge | None,
) -> list[dict[str, Any]]:
    config = runtime.config
    rows = []
    for set_name, charts in sets.items():
        for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            if temperature and (not config.eval.sampled or set_name == "gallery"):
                continue
            evaluation = run_evaluation(
                runtime.engine(env, temperature, judge),
                params,
                charts,
                name=f"{name} {set_name} {decoding}",
                turns=config.eval.turns,
                batch_size=min(config.eval.batch_size, len(charts)),
                seed=config.seed,
            )
            rows += [
                row | {"policy": name, "set": set_name, "decoding": decoding}
                for row in summarise(evaluation, config.seed)
            ]
            directory = os.path.join(runtime.workdir, "evaluation", f"{set_name}-{decoding}")
            flat = [
                (t, [turn.scores.overall for turn in t.turns], 0.0) for t in evaluation.trajectories
            ]
            write_trajectories(directory, 0, flat)
    return rows


def table_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`evaluation.json` rows for people: scores and shares in percent, intervals as text."""
    out = []
    for row in rows:
        low, high = row["low_level_ci"]
        shown = {
            "policy": row["policy"],
            "set": row["set"],
            "decoding": row["decoding"],
            "turn": row["turn"],
            "exec": f"{100 * row['exec_rate']:.1f}",
            "low-level": f"{100 * row['low_level']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            **{part: f"{100 * row[part]:.1f}" for part in PARTS[1:]},
        }
        if "judge_score" in row:
            low, high = row["judge_ci"]
            shown[f"judge {row['judge']}"] = (
                f"{100 * row['judge_score']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            )
        if "improvement" in row:
            low, high = row["improvement_ci"]
            shown |= {
                "improvement": f"{100 * row['improvement']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
                "improved": f"{100 * row['improved']:.1f}",
                "regressed": f"{100 * row['regressed']:.1f}",
                "repeat": f"{100 * row['code_repeat']:.1f}",
            }
        out.append(shown)
    return out

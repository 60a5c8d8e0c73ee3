"""Evaluation with K turns: how good each turn is, and whether the later one corrects the first.

Scores are `code_pass`: a script that does not execute scores 0. The self-correction figures count
only samples whose first turn already executes (arXiv 2604.01600): making a crashed script run is
not self-correction. With a judge (`reward.judge`) its score is reported under the judge's name; a
render it could not score is left out and counted. Intervals are 95 % bootstrap intervals over
charts, paired: a resample draws charts, not turns.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from mmrecoder_jax.config import derived_seed
from mmrecoder_jax.data.sources import Chart, ChartDirectory
from mmrecoder_jax.env.chart_env import ChartEnv
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.monitoring.measured import PARTS
from mmrecoder_jax.monitoring.progress import bar
from mmrecoder_jax.rl.correction import correction, same_code
from mmrecoder_jax.rl.judge.base import Judge
from mmrecoder_jax.rl.rollout import Answers, RolloutEngine, answer_all, refused_trajectory
from mmrecoder_jax.rl.trajectory import Trajectory, Turn, write_trajectories
from mmrecoder_jax.stage import Stage


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of charts over T turns.

    Attributes:
      name: e.g. "stage1 greedy".
      scores: in the order of `PARTS`, 0 where the script did not execute.
      repeats: whether the turn's code repeats that of the turn before (False in the first).
      own: (number of the chart, conversation) of the charts that this host asked about.
      judge: the judge's name, "" where there is none.
      judged: the judge's scores: 0 where there was no render, NaN where it could not score one.
      oversized: whether the figure was too large or too thin to be shown to the policy.
      refused: charts that cannot be shown to the policy; they count as failures.
    """

    name: str
    executed: Bool[np.ndarray, "charts T"]
    scores: Float[np.ndarray, "charts T 5"]
    repeats: Bool[np.ndarray, "charts T"]
    own: tuple[tuple[int, Trajectory], ...]
    judge: str = ""
    judged: Float[np.ndarray, "charts T"] | None = None
    oversized: Bool[np.ndarray, "charts T"] | None = None
    refused: int = 0


def run_evaluation(
    engine: RolloutEngine,
    params: Any,
    charts: Sequence[Chart],
    *,
    name: str,
    turns: int,
    batch_size: int,
    seed: int,
    remembered: int = 0,
) -> Evaluation:
    """Lets the policy redraw every chart in `turns` turns.

    Hosts share the charts, `batch_size` at a time over all of them. A chart that cannot be shown to
    the policy counts as a failure.

    Args:
      remembered: earlier turns that the policy sees; 0: all.
    """
    answers = answer_all(
        engine,
        params,
        charts,
        jax.random.key(seed),
        turns=turns,
        batch_size=batch_size,
        remembered=remembered,
        each=lambda starts: bar(f"evaluate {name}", starts, unit="batch"),
    )
    refused = answers.refused if distributed.is_main() else {}
    for number, reason in sorted(refused.items()):
        print(f"{name}: chart {charts[number].id} counts as a failure: {reason}", flush=True)
    own = with_refused(answers, charts, turns)
    judge = "" if engine.judge is None else engine.judge.name
    return measure(name, own, turns, judge)


def with_refused(
    answers: Answers, charts: Sequence[Chart], turns: int
) -> list[tuple[int, Trajectory]]:
    """(number of the chart, trajectory) of this host's answers; the main host's have the charts too
    that cannot be shown to the policy, as failures.
    """
    refused = answers.refused if distributed.is_main() else {}
    return answers.own + [
        (number, refused_trajectory(charts[number], number, reason, turns))
        for number, reason in refused.items()
    ]


def measure(
    name: str, own: Sequence[tuple[int, Trajectory]], turns: int, judge: str = ""
) -> Evaluation:
    """The arrays of an `Evaluation` from finished trajectories; all hosts call it together.

    Args:
      own: (number of the chart, trajectory) of this host.
      turns: of every trajectory.
      judge: the name of the judge that saw them; "" where there was none.
    """
    names = ("overall", *PARTS[1:])  # `Scores` calls the low-level score "overall"
    numbers = np.array([number for number, _ in own], np.int64)

    def of_all(what: Callable[[Turn], Any], shape: tuple[int, ...] = ()) -> np.ndarray:
        rows = [[what(turn) for turn in trajectory.turns] for _, trajectory in own]
        return all_rows(np.array(rows, np.float64).reshape(len(own), turns, *shape))

    def all_rows(rows: np.ndarray) -> np.ndarray:
        return distributed.all_rows(rows, numbers)

    repeats = np.array([_repeats(trajectory.turns) for _, trajectory in own], bool)
    return Evaluation(
        name=name,
        executed=of_all(lambda turn: turn.execution.ok) > 0,
        scores=of_all(lambda turn: [getattr(turn.scores, n) for n in names], (len(names),)),
        repeats=all_rows(repeats.reshape(len(own), turns)),
        own=tuple(own),
        judge=judge,
        judged=of_all(lambda turn: turn.judge_score) if judge else None,
        oversized=of_all(lambda turn: turn.execution.status == Status.OVERSIZED) > 0,
        refused=int(
            (of_all(lambda turn: turn.execution.status == Status.REFUSED) > 0)[:, :1].sum()
        ),
    )


def _repeats(turns: Sequence[Turn]) -> list[bool]:
    """Whether each turn's code is that of the turn before; False for the first."""
    return [False, *(same_code(a.text, b.text) for a, b in itertools.pairwise(turns))]


def summarise(evaluation: Evaluation, seed: int = 0) -> list[dict[str, Any]]:
    """One row per turn: exec rate, low-level score and its parts, with intervals; from turn 2 on
    also what it did to turn 1.
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
        if evaluation.refused:
            row["refused"] = evaluation.refused
        if evaluation.oversized is not None and evaluation.oversized[:, turn].any():
            row["oversized"] = float(evaluation.oversized[:, turn].mean())
        if evaluation.judged is not None:
            scored = evaluation.judged[~np.isnan(evaluation.judged[:, turn]), turn]
            row |= {"judge": evaluation.judge, "judge_unscorable": len(low) - len(scored)}
            if len(scored):
                row |= {"judge_score": float(scored.mean()), "judge_ci": bootstrap(scored, seed)}
        if turn:
            row |= correction_row(evaluation, turn, seed)
        rows.append(row)
    return rows


def correction_row(evaluation: Evaluation, turn: int, seed: int = 0) -> dict[str, Any]:
    """Turn `turn` (0-based) against turn 0 (`rl.correction`); empty where no first turn executes.

    "code_repeat" alone compares with the turn before.
    """
    low = evaluation.scores[..., 0]
    executed = evaluation.executed[:, 0]
    found = correction(executed, low[:, 0], low[:, turn], evaluation.repeats[:, turn])
    if found is None:
        return {}
    return {
        "counted": len(found.gains),
        "improvement": float(found.gains.mean()),
        "improvement_ci": bootstrap(found.gains, seed),
        "improved": found.improved,
        "regressed": found.regressed,
        "code_repeat": found.code_repeat,
    }


def bootstrap(
    values: Float[np.ndarray, " charts"], seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of the mean over charts."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def evaluation_sets(stage: Stage) -> dict[str, Sequence[Chart]]:
    """The configured charts by name: the split, and the real gallery where there is one."""
    config = stage.config
    charts = stage.charts(config.eval.split)
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
    stage: Stage,
    params: Any,
    env: ChartEnv,
    name: str,
    sets: dict[str, Sequence[Chart]] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a policy greedily and, with `eval.sampled`, at temperature 1.

    Writes `evaluation.json` and the trajectories into the work directory.

    Args:
      name: of the policy, in the rows.
      sets: charts by the name of their set; None: those of the configuration.

    Returns:
      Rows of `summarise`, with "set" and "decoding".
    """
    with stage.judge() as judge:
        rows = _evaluate(stage, params, env, name, sets or evaluation_sets(stage), judge)
    path = os.path.join(stage.workdir, "evaluation.json")
    with distributed.together():
        if distributed.is_main():
            with open(path + ".tmp", "w", encoding="utf-8") as f:
                json.dump(rows, f, indent=1)
            os.replace(path + ".tmp", path)
    return rows


def _evaluate(
    stage: Stage,
    params: Any,
    env: ChartEnv,
    name: str,
    sets: dict[str, Sequence[Chart]],
    judge: Judge | None,
) -> list[dict[str, Any]]:
    config = stage.config
    rows: list[dict[str, Any]] = []
    for set_name, charts in sets.items():
        for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            if temperature and (not config.eval.sampled or set_name == "gallery"):
                continue
            evaluation = run_evaluation(
                stage.engine(env, temperature, judge),
                params,
                charts,
                name=f"{name} {set_name} {decoding}",
                turns=config.eval.turns,
                remembered=config.eval.remembered,
                batch_size=min(config.eval.batch_size, len(charts)),
                seed=derived_seed(config, "evaluation"),
            )
            labels = {"policy": name, "set": set_name, "decoding": decoding}
            rows += [row | labels for row in summarise(evaluation, config.seed)]
            directory = os.path.join(stage.workdir, "evaluation", f"{set_name}-{decoding}")
            write_trajectories(
                directory,
                0,
                (
                    (trajectory, [turn.scores.overall for turn in trajectory.turns], 0.0)
                    for _, trajectory in evaluation.own
                ),
                [number for number, _ in evaluation.own],
            )
    return rows


def table_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`evaluation.json` rows for people: scores and shares in percent, intervals as text."""

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    def with_interval(value: float, interval: Sequence[float], form: str = ".1f") -> str:
        low, high = interval
        return f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"

    out = []
    for row in rows:
        shown = {name: row[name] for name in ("policy", "set", "decoding", "turn")}
        shown["exec"] = percent(row["exec_rate"])
        shown["low-level"] = with_interval(row["low_level"], row["low_level_ci"])
        shown |= {part: percent(row[part]) for part in PARTS[1:]}
        if "judge_score" in row:
            judged = with_interval(row["judge_score"], row["judge_ci"])
            shown[f"judge {row['judge']}"] = judged
        if "refused" in row:
            shown["refused"] = str(row["refused"])
        if "oversized" in row:
            shown["oversized"] = percent(row["oversized"])
        if "improvement" in row:
            shown |= {
                "improvement": with_interval(row["improvement"], row["improvement_ci"], "+.2f"),
                "improved": percent(row["improved"]),
                "regressed": percent(row["regressed"]),
                "repeat": percent(row["code_repeat"]),
            }
        out.append(shown)
    return out

"""What a person wants to know first: did it learn, did turn 2 help, what did it cost.

Three sentences and two pictures, made from the numbers of a run. Whether a sentence says "better",
"worse" or neither is decided by a 95 % bootstrap interval alone: of the paired difference over
charts where two evaluations asked about the same ones, else over the steps of training. What was
not measured is said to be unknown.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mmrecoder_jax.config import RL_STAGES
from mmrecoder_jax.evaluation import bootstrap
from mmrecoder_jax.monitoring.progress import format_duration
from mmrecoder_jax.reporting import svg
from mmrecoder_jax.reporting.escape import escape
from mmrecoder_jax.reporting.workdir import StageFiles

PEOPLE = {
    "sft_chart2code": "cold start 1",
    "sft_self_correction": "cold start 2",
    "stage1": "RL stage 1",
    "stage2": "RL stage 2",
}
SINGLE_TURN = "sft_chart2code"  # its policy has never seen a second turn
SHARE = 5  # of training: its first and its last fifth are compared
LEAST = 3  # steps of such a part
SPOILT = ": part of what turn 2 gains is what turn 1 lost."


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Trusted HTML: sentences in order, and pictures with what they show."""

    sentences: tuple[str, ...]
    pictures: tuple[tuple[str, str], ...]


def verdict(stages: Sequence[StageFiles]) -> Verdict:
    """Of the stages of a work directory, in their order."""
    metrics = {stage.name: stage.metrics() for stage in stages}
    evaluated = [stage for stage in stages if _greedy(stage)]
    rl = [stage for stage in stages if any("reward" in row for row in metrics[stage.name])]
    pictures = []
    if len(evaluated) > 1 or (evaluated and not rl):
        learnt = _learnt_by_charts(evaluated)
        helped = _helped_by_charts(evaluated)
        pictures = _pictures_of_charts(evaluated)
    elif rl:
        rows = metrics[rl[-1].name]
        learnt, helped = _learnt_by_steps(rl[-1], rows), _helped_by_steps(rl[-1], rows)
        pictures = _pictures_of_steps(rl[-1], rows)
    else:
        learnt = _loss(stages[-1], metrics[stages[-1].name])
        helped = "Whether turn 2 helps is unknown: no turn has been sampled yet."
    return Verdict((learnt, helped, _cost(stages, metrics)), tuple(pictures))


def compared(difference: Sequence[float], better: str, worse: str, neither: str) -> str:
    """One of three texts, by where the interval of a difference lies."""
    low, high = difference
    return better if low > 0 else worse if high < 0 else neither


# ---------------------------------------------------------------- by the charts of an evaluation


def _greedy(stage: StageFiles) -> list[Mapping[str, Any]]:
    return _rows(stage, "greedy")


def _rows(stage: StageFiles, decoding: str) -> list[Mapping[str, Any]]:
    """The rows of the first set that a stage was evaluated on so, by turn."""
    rows = [row for row in stage.evaluation() if row.get("decoding", "greedy") == decoding]
    first = rows[0].get("set") if rows else None
    return [row for row in rows if row.get("set") == first]


def _learnt_by_charts(evaluated: Sequence[StageFiles]) -> str:
    first, last = _before(evaluated), evaluated[-1]
    rows = _greedy(last)
    turn = min(2, len(rows))  # the paper trains two turns
    if SINGLE_TURN in (first.name, last.name):
        turn = 1
    row = rows[turn - 1]
    name = escape(PEOPLE.get(last.name, last.name))
    what = (
        f"after {name}, turn {turn} scores <b>{_percent(row['low_level'])}</b> "
        f"{_interval(row['low_level_ci'])} low-level on {row['charts']} charts ({escape(_set(row))}"
        ", greedy)"
    )
    gains = _paired(first, last, turn)
    if gains is None:
        return (
            f"Whether it learned is unknown: {what}, and there is no earlier evaluation beside it."
        )
    interval = bootstrap(gains)
    taught = "RL" if last.name in RL_STAGES and first.name not in RL_STAGES else "Training"
    said = compared(
        interval,
        f"<b>{taught} improved it</b>: ",
        f"<b>{taught} made it worse</b>: ",
        f"<b>{taught} made no difference that the charts could show</b>: ",
    )
    before = escape(PEOPLE.get(first.name, first.name))
    sampled = _paired(first, last, turn, "sampled")
    beside = "" if sampled is None else _sampled(sampled.mean(), bootstrap(sampled))
    return (
        f"{said}{what}, {_signed(gains.mean())} {_interval(interval, signed=True)} "
        f"against {before}{beside}."
    )


def _sampled(gain: float, interval: Sequence[float]) -> str:
    """The same difference where answers are sampled, which may have another sign."""
    return f" (sampled: {_signed(gain)} {_interval(interval, signed=True)})"


def _before(evaluated: Sequence[StageFiles]) -> StageFiles:
    """The stage that the last one is compared with: for RL the one before it, else the first."""
    rl = [i for i, stage in enumerate(evaluated) if stage.name in RL_STAGES]
    return evaluated[max(rl[0] - 1, 0)] if rl else evaluated[0]


def _paired(
    first: StageFiles, last: StageFiles, turn: int, decoding: str = "greedy"
) -> Float[np.ndarray, " charts"] | None:
    """What each chart's score at a turn gained from one stage to another; None where no charts are
    common to both.
    """
    if first.path == last.path:
        return None
    before, after = _scores(first, turn, decoding), _scores(last, turn, decoding)
    common = sorted(set(before) & set(after))
    if len(common) < 2:
        return None
    return np.array([after[chart] - before[chart] for chart in common])


def _scores(stage: StageFiles, turn: int, decoding: str) -> dict[str, float]:
    """Low-level score by chart, of a turn of an evaluation, or of the last one it has."""
    rows = _rows(stage, decoding)
    if not rows:
        return {}
    path = stage.path / "evaluation" / f"{_set(rows[0])}-{decoding}" / "000000.jsonl"
    if not path.is_file():
        return {}
    found = {}
    with open(path, encoding="utf-8") as f:
        for row in map(json.loads, f):
            turns = row["turns"]
            found[row["chart"]] = turns[min(turn, len(turns)) - 1]["scores"]["overall"]
    return found


def _helped_by_charts(evaluated: Sequence[StageFiles]) -> str:
    rows = _greedy(evaluated[-1])
    if len(rows) < 2:
        return "Whether turn 2 helps is unknown: the evaluation has one turn."
    row = rows[1]
    if "improvement" not in row:
        return "Whether turn 2 helps is unknown: no first turn of the evaluation executes."
    said = compared(
        row["improvement_ci"],
        "<b>Turn 2 helped</b>",
        "<b>Turn 2 made it worse</b>",
        "<b>Turn 2 made no difference that the charts could show</b>",
    )
    sampled = _rows(evaluated[-1], "sampled")
    beside = ""
    if len(sampled) > 1 and "improvement" in sampled[1]:
        beside = _sampled(sampled[1]["improvement"], sampled[1]["improvement_ci"])
    return (
        f"{said}: where the first turn executes ({row['counted']} charts), the second changes the "
        f"score by {_signed(row['improvement'])} {_interval(row['improvement_ci'], signed=True)}"
        f"{beside}; "
        f"{_percent(row['improved'])} % improved, {_percent(row['regressed'])} % regressed, "
        f"{_percent(row['code_repeat'])} % repeated their code."
    ) + _spoilt_by_charts(evaluated, row["improvement_ci"][0] > 0)


def _spoilt_by_charts(evaluated: Sequence[StageFiles], gains: bool) -> str:
    """A sentence where turn 1 fell: a second turn gains most where the first is spoilt."""
    first, last = _before(evaluated), evaluated[-1]
    changes = _paired(first, last, 1)
    if changes is None or (interval := bootstrap(changes))[1] >= 0:
        return ""
    before = escape(PEOPLE.get(first.name, first.name))
    return (
        f" But <b>turn 1 fell</b>, {_signed(changes.mean())} "
        f"{_interval(interval, signed=True)} against {before}{SPOILT if gains else '.'}"
    )


def _pictures_of_charts(evaluated: Sequence[StageFiles]) -> list[tuple[str, str]]:
    names = [PEOPLE.get(stage.name, stage.name) for stage in evaluated]
    by_turn: list[list[svg.Point | None]] = [[], []]
    gains: list[svg.Point | None] = []
    for stage in evaluated:
        # Second turns of a policy that never saw one are no measure of anything.
        rows = _greedy(stage)[: 1 if stage.name == SINGLE_TURN else 2]
        for turn, points in enumerate(by_turn):
            known = len(rows) > turn
            points.append(_point(rows[turn], "low_level") if known else None)
        known = len(rows) > 1 and "improvement" in rows[1]
        gains.append(_point(rows[1], "improvement") if known else None)
    label = "low-level score of turns 1 and 2 after each stage"
    learnt = svg.points(by_turn, names, label, unit="%")
    keys = '<span class="key c0">turn 1</span><span class="key c1">turn 2</span>'
    pictures = [(f"<b>Did it learn?</b> low-level score {keys}", learnt)]
    if any(gains):
        label = "change of the score by turn 2, after each stage"
        helped = svg.points([gains], names, label, zero=True)
        pictures.append(("<b>Did turn 2 help?</b> change of the score, in points", helped))
    return pictures


def _point(row: Mapping[str, Any], name: str) -> svg.Point:
    """A number of a row with its interval, in percent."""
    low, high = row[f"{name}_ci"]
    return svg.Point(100 * row[name], 100 * low, 100 * high)


# ---------------------------------------------------------------- by the steps of training


def _parts(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A metric in the first and in the last part of the steps; None where there are too few."""
    values = np.array([row[metric] for row in rows if row.get(metric) is not None], float)
    values = values[np.isfinite(values)]
    size = len(values) // SHARE
    return None if size < LEAST else (values[:size], values[-size:])


def _learnt_by_steps(stage: StageFiles, rows: Sequence[Mapping[str, Any]]) -> str:
    name, parts = escape(PEOPLE.get(stage.name, stage.name)), _parts(rows, "reward")
    if parts is None:
        return (
            f"Whether it learns is unknown: {name} has taken {len(rows)} steps, and there is no "
            "evaluation yet."
        )
    first, last = parts
    interval = _difference(first, last)
    said = compared(
        interval,
        "<b>The reward rose</b>",
        "<b>The reward fell</b>",
        "<b>The reward did not move beyond the noise of its steps</b>",
    )
    return (
        f"{said}: in {name} from {first.mean():.3f} in the first {len(first)} steps to "
        f"<b>{last.mean():.3f}</b> in the last {len(last)} of {len(rows)}, a change of "
        f"{last.mean() - first.mean():+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]. "
        "Training charts and sampled answers; an evaluation comes after the stage."
    )


def _difference(first: np.ndarray, last: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a difference of means."""
    rng = np.random.default_rng(0)
    means = [x[rng.integers(0, len(x), (2000, len(x)))].mean(axis=1) for x in (first, last)]
    low, high = np.percentile(means[1] - means[0], [2.5, 97.5])
    return float(low), float(high)


def _helped_by_steps(stage: StageFiles, rows: Sequence[Mapping[str, Any]]) -> str:
    parts = _parts(rows, "improvement")
    if parts is None:
        return "Whether turn 2 helps is unknown: too few steps have compared it with turn 1."
    last = parts[1]
    interval = bootstrap(last)
    said = compared(
        interval,
        "<b>Turn 2 helps</b>",
        "<b>Turn 2 makes it worse</b>",
        "<b>Turn 2 makes no difference that the steps could show</b>",
    )
    return (
        f"{said}: over the last {len(last)} steps, where the first turn executes, it changes the "
        f"score by {_signed(last.mean())} {_interval(interval, signed=True)}."
    ) + _spoilt_by_steps(rows, interval[0] > 0)


def _spoilt_by_steps(rows: Sequence[Mapping[str, Any]], gains: bool) -> str:
    """A sentence where turn 1 falls, as with a bonus for correcting."""
    parts = _parts(rows, "turn1/low_level")
    if parts is None or _difference(*parts)[1] >= 0:
        return ""
    first, last = parts
    fall = f"from {_percent(first.mean())} to {_percent(last.mean())}"
    return f" But <b>turn 1 falls</b>, {fall}{SPOILT if gains else '.'}"


def _pictures_of_steps(
    stage: StageFiles, rows: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    pictures = []
    for title, metric in (
        ("<b>Does it learn?</b> reward", "reward"),
        ("<b>Does turn 2 help?</b> change of the score", "improvement"),
    ):
        pairs = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
        if pairs:
            found = np.array(pairs, float)
            line = svg.Line(metric, 0, found[:, 0], found[:, 1])
            pictures.append((title, svg.lines([line], f"{metric} of {stage.name}")))
    return pictures


def _loss(stage: StageFiles, rows: Sequence[Mapping[str, Any]]) -> str:
    name = escape(PEOPLE.get(stage.name, stage.name))
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if not losses:
        return f"Whether it learns is unknown: {name} has taken no step yet."
    return (
        f"{name} has taken {len(losses)} steps; its loss went from {losses[0]:.3f} to "
        f"<b>{losses[-1]:.3f}</b>. What that is worth on charts is unknown until its evaluation."
    )


# ---------------------------------------------------------------- what it cost


def _cost(stages: Sequence[StageFiles], metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    seconds = {stage.name: _sum(metrics[stage.name], "seconds/step") for stage in stages}
    total = sum(seconds.values())
    if not total:
        return "What it cost is unknown: no step has ended yet."
    named = [
        f"{escape(PEOPLE.get(name, name))} {format_duration(spent)}"
        for name, spent in seconds.items()
        if spent
    ]
    said = f"<b>Training took {format_duration(total)}</b> of steps ({', '.join(named)})"
    rl = [row for rows in metrics.values() for row in rows if "seconds/decode" in row]
    if spent := _sum(rl, "seconds/step"):
        shares = [
            f"{100 * _sum(rl, f'seconds/{phase}') / spent:.0f} % {word}"
            for phase, word in (
                ("decode", "decoding"),
                ("execute", "waiting for scripts"),
                ("update", "in updates"),
            )
        ]
        said += f"; of RL {', '.join(shares)}"
    return said + ". Building data and evaluations are not counted."


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row.get(name) or 0.0 for row in rows)


def _set(row: Mapping[str, Any]) -> str:
    return str(row.get("set", "test"))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _interval(interval: Sequence[float], signed: bool = False) -> str:
    form = _signed if signed else _percent
    return f"[{form(interval[0])}, {form(interval[1])}]"

"""Which turn of which sample is handed over.

    visual    the turn whose render is most like the chart (`rl.judge.visual.similarity`)
    last      the last turn that runs; of one sample alone
    judge     the turn that the judge scores highest

Of equals the earliest is chosen. A turn that does not run is never chosen.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence

import numpy as np

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.images import decode
from mmrecoder_jax.rl.judge.visual import similarity
from mmrecoder_jax.rl.trajectory import Trajectory, Turn


class Select(enum.StrEnum):
    """How a turn is chosen."""

    VISUAL = "visual"
    LAST = "last"
    JUDGE = "judge"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A turn of several samples; both numbers count from 0."""

    sample: int
    turn: int


def check_select(select: str, samples: int, judged: bool) -> None:
    """Raises ConfigError where a turn cannot be chosen like that.

    Args:
      judged: whether there is a judge.
    """
    if select not in tuple(Select):
        raise ConfigError(f"--select={select!r}: use one of {', '.join(Select)}")
    if select == Select.LAST and samples > 1:
        raise ConfigError(
            f"--samples={samples} with --select=last: several samples are compared by --select="
            "visual or --select=judge"
        )
    if select == Select.JUDGE and not judged:
        raise ConfigError(
            "--select=judge needs --judge=URL and --judge-model=NAME, an OpenAI-compatible server "
            "with a vision model"
        )


def likeness(trajectories: Sequence[Trajectory]) -> list[list[float]]:
    """How alike each render and its chart are, by sample and turn; NaN where there is none."""
    target = np.asarray(decode(trajectories[0].chart.image))

    def of(turn: Turn) -> float:
        image = turn.execution.image
        return math.nan if image is None else similarity(target, image)

    return [[of(turn) for turn in trajectory.turns] for trajectory in trajectories]


def choose(
    trajectories: Sequence[Trajectory], alike: Sequence[Sequence[float]], select: str
) -> Choice | None:
    """The turn that is handed over; None where no turn runs.

    Args:
      trajectories: the samples of one chart.
      alike: of `likeness`.
    """
    places = [
        Choice(sample, turn)
        for sample, trajectory in enumerate(trajectories)
        for turn, one in enumerate(trajectory.turns)
        if one.execution.image is not None
    ]
    if not places:
        return None
    if select == Select.LAST:
        return max(places, key=lambda place: place.turn)

    def rank(place: Choice) -> tuple[float, float]:
        similar = alike[place.sample][place.turn]
        if select == Select.VISUAL:
            return similar, 0.0
        score = trajectories[place.sample].turns[place.turn].judge_score
        # what the judge could not score comes after all that it could
        return -1.0 if math.isnan(score) else score, similar

    return max(places, key=rank)

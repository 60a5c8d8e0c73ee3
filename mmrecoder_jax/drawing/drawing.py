"""A chart that was redrawn: its samples, and the turn that is handed over."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmrecoder_jax.data.sources import Chart, RandomAccess
from mmrecoder_jax.drawing.authors import Author
from mmrecoder_jax.drawing.choosing import Choice, choose, likeness
from mmrecoder_jax.env.response import extract_code
from mmrecoder_jax.env.wire import Status
from mmrecoder_jax.rl.trajectory import Trajectory, Turn


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A chart, what an author wrote about it, and which turn is handed over.

    Attributes:
      samples: one conversation each.
      alike: how alike each render and the chart are, by sample and turn, from 0 to 1; NaN where
        there is no render.
      choice: the turn that is handed over; None where no turn runs.
    """

    chart: Chart
    samples: tuple[Trajectory, ...]
    alike: Sequence[Sequence[float]]
    choice: Choice | None

    @property
    def turn(self) -> Turn | None:
        """The turn that is handed over."""
        if self.choice is None:
            return None
        return self.samples[self.choice.sample].turns[self.choice.turn]

    @property
    def code(self) -> str | None:
        """The script that is handed over; None where no turn runs."""
        return None if self.turn is None else extract_code(self.turn.text)

    @property
    def render(self) -> np.ndarray | None:
        """What the script draws, uint8 `[height, width, 3]`."""
        return None if self.turn is None else self.turn.execution.image

    @property
    def refused(self) -> bool:
        """Whether the chart could not be shown to the author."""
        return self.samples[0].turns[0].execution.status == Status.REFUSED

    @property
    def summary(self) -> str:
        """One line on what came of it."""
        last = self.samples[0].turns[-1].execution
        if self.refused:
            return last.error
        if self.choice is None:
            return f"no turn runs; the last: {last.status}: {' '.join(last.error.split())[-200:]}"
        turns, samples = len(self.samples[0].turns), len(self.samples)
        of_sample = f" of sample {self.choice.sample + 1}/{samples}" if samples > 1 else ""
        alike = self.alike[self.choice.sample][self.choice.turn]
        line = f"turn {self.choice.turn + 1}/{turns}{of_sample}, likeness {alike:.2f}"
        turn = self.turn
        if turn is not None and turn.verdict is not None:
            scored = not math.isnan(turn.judge_score)
            problem = " ".join(turn.verdict.problem.split())[:200]
            line += (
                f", judge {turn.judge_score:.2f}" if scored else f", no judge's score: {problem}"
            )
        return line


def draw(
    author: Author,
    charts: RandomAccess[Chart],
    *,
    turns: int,
    samples: int,
    temperature: float,
    seed: int,
    select: str,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[int, Drawing]]:
    """Drawings of charts by an author, as they come: see `authors.Author.answer`.

    Yields:
      (number of the chart, drawing)
    """
    begun: dict[int, dict[int, Trajectory]] = {}
    asked = author.answer(
        charts, turns=turns, samples=samples, temperature=temperature, seed=seed, numbers=numbers
    )
    for number, sample, trajectory in asked:
        own = begun.setdefault(number, {})
        own[sample] = trajectory
        if len(own) == samples:
            yield number, of_samples(begun.pop(number), select)


def of_samples(found: Mapping[int, Trajectory], select: str) -> Drawing:
    """The drawing of a chart's samples, by their numbers."""
    ordered = tuple(found[sample] for sample in sorted(found))
    alike = likeness(ordered)
    return Drawing(ordered[0].chart, ordered, alike, choose(ordered, alike, select))

"""Who writes the code: the policy in the box, a checkpoint, or a model behind a server."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from mmrecoder_jax.config import ConfigError
from mmrecoder_jax.data.sources import Chart, RandomAccess
from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.env.response import response_text, think_text
from mmrecoder_jax.rl.trajectory import Trajectory, Turn

Answered = tuple[int, int, Trajectory]  # number of the chart, sample, what came of it
Told = Callable[[str], None]  # is given a response that grows, from its beginning each time


@runtime_checkable
class Author(Protocol):
    """Writes code that redraws charts, sees what it drew, and writes again.

    Attributes:
      name: what people call it.
    """

    name: str

    def answer(
        self,
        charts: RandomAccess[Chart],
        *,
        turns: int,
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Answered]:
        """Redraws charts, each `samples` times.

        A chart that cannot be shown to the author has turns of status REFUSED, with the reason in
        their errors. Turns about a chart without a record have scores of NaN (`Scores.known`).

        Args:
          turns: of every trajectory.
          temperature: 0 is greedy.
          seed: together with the number of a chart it decides every random number of a policy.
          numbers: of the charts that are asked about; None: all.

        Yields:
          (number of the chart, sample, trajectory), as batches finish; in no order. Several hosts
          yield each its own.

        Raises:
          ConfigError: more than one sample at temperature 0, where all would be equal.
        """
        ...

    def next(
        self,
        chart: Chart,
        before: Sequence[Turn],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        told: Told | None = None,
    ) -> Turn:
        """One more turn of a conversation about a chart.

        Args:
          before: its turns so far; a person may have written some of them (`written`).
          told: is given the response while it is written, in the thread of the call or another. An
            author may begin it anew, and need not tell anything.

        Raises:
          NotShown: the author cannot be shown the chart, or one of the turns.
        """
        ...


class NotShown(ValueError):
    """What an author cannot be shown; the message says why."""


def written(code: str, execution: Execution, chart: Chart) -> Turn:
    """A turn that a person wrote."""
    nothing = np.zeros(0, np.float32)
    record = execution.record if execution.ok else None
    return Turn(
        ids=nothing.astype(np.int32),
        logps=nothing,
        finished=True,
        text=response_text(think_text(code), code),
        execution=execution,
        scores=score(record, chart.record),
        format=1.0,
    )


def check_samples(samples: int, temperature: float) -> None:
    """Raises ConfigError where several samples of a chart would be equal."""
    if samples > 1 and not temperature:
        raise ConfigError(
            f"samples={samples} at temperature=0: all samples would be equal; give a temperature "
            "above 0, such as 1"
        )

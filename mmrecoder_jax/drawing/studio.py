"""One author and many visitors: what the page of `mmrecoder_jax.demo` does, without the page.

A visit is a chart and the turns about it so far, some of which the visitor has written. Visitors
wait for each other while the author writes; their code runs in the sandbox like a model's.
"""

import dataclasses
import queue
import threading
from collections.abc import Iterator

import numpy as np

from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.drawing.authors import Author, Told, written
from mmrecoder_jax.drawing.pictures import chart_of
from mmrecoder_jax.env.chart_env import ChartEnv, FeedbackImage, feedback_images
from mmrecoder_jax.env.response import extract_code, extract_thought
from mmrecoder_jax.images import Encoded, decode
from mmrecoder_jax.rl.judge.visual import similarity
from mmrecoder_jax.rl.trajectory import Turn

MOST_TURNS = 12  # of a visit: a conversation has to stay in what an author can read
MOST_CHARACTERS = 20_000  # of a visitor's code


class NotNow(ValueError):
    """What a visitor asks for cannot be done; the message is for the visitor."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A turn of a visit, as a page shows it.

    Attributes:
      by: who wrote it.
      likeness: of the render and the chart, from 0 to 1; None without a render.
      difference: white where the render is right, in the chart's size; None without a render.
    """

    turn: Turn
    by: str
    likeness: float | None
    difference: np.ndarray | None

    @property
    def code(self) -> str:
        """Its script; empty where the response holds none."""
        return extract_code(self.turn.text) or ""

    @property
    def thought(self) -> str:
        """What was written before the code."""
        return extract_thought(self.turn.text)

    @property
    def line(self) -> str:
        """What came of it, in a line."""
        execution = self.turn.execution
        if self.likeness is None:
            return f"{self.by}: {execution.status}"
        return f"{self.by}: likeness {self.likeness:.2f}"


@dataclasses.dataclass(frozen=True)
class Visit:
    """A chart and the turns about it so far."""

    chart: Chart
    steps: tuple[Step, ...] = ()


class Studio:
    """Serves visits.

    Args:
      env: what executes the code of the author and of visitors.
      instruction: what the author is asked.
    """

    def __init__(self, author: Author, env: ChartEnv, instruction: str):
        self.author, self._env, self._instruction = author, env, instruction
        self._lock = threading.Lock()

    def open(self, picture: Encoded) -> Visit:
        """Begins a visit; raises BadImage for what is no picture."""
        return Visit(chart_of(picture, "chart", self._instruction, "this picture"))

    def next(
        self, visit: Visit, temperature: float = 0.0, seed: int = 0, told: Told | None = None
    ) -> Visit:
        """The visit with one more turn by the author, who may tell it while it is written.

        Raises:
          NotShown: the author cannot be shown the chart, or a turn.
          NotNow: the visit has as many turns as it may have.
        """
        self._check_room(visit)
        before = [step.turn for step in visit.steps]
        with self._lock:
            turn = self.author.next(
                visit.chart, before, temperature=temperature, seed=seed, told=told
            )
        return self._with(visit, turn, self.author.name)

    def follow(
        self, visit: Visit, temperature: float = 0.0, seed: int = 0
    ) -> Iterator["str | Visit"]:
        """As `next`: the response while it is written, from its beginning each time, and at last
        the visit with the turn. Who is slow to take it misses steps between. The turn is written to
        its end also where nobody waits for it.
        """
        events: queue.SimpleQueue[str | Visit | Exception] = queue.SimpleQueue()

        def write() -> None:
            try:
                events.put(self.next(visit, temperature, seed, events.put))
            except Exception as problem:
                events.put(problem)

        threading.Thread(target=write, daemon=True).start()
        while True:
            event = events.get()
            while isinstance(event, str) and not events.empty():
                event = events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Visit):
                return

    def run(self, visit: Visit, code: str) -> Visit:
        """The visit with one more turn, which the visitor has written; waits for the script.

        Raises:
          NotNow: there is no code, too much of it, or no room for a turn.
        """
        if not code.strip():
            raise NotNow("There is no code to run.")
        if len(code) > MOST_CHARACTERS:
            raise NotNow(f"The code has {len(code)} characters; {MOST_CHARACTERS} are the most.")
        self._check_room(visit)
        execution = self._env.submit(code).result()
        return self._with(visit, written(code, execution, visit.chart), "you")

    def _check_room(self, visit: Visit) -> None:
        if len(visit.steps) >= MOST_TURNS:
            raise NotNow(f"{MOST_TURNS} turns are the most: begin again with the chart.")

    def _with(self, visit: Visit, turn: Turn, by: str) -> Visit:
        execution, likeness, difference = turn.execution, None, None
        if execution.image is not None:
            target = np.asarray(decode(visit.chart.image))
            likeness = similarity(target, execution.image)
            (difference,) = feedback_images(execution, visit.chart.image, FeedbackImage.DIFFERENCE)
        return Visit(visit.chart, (*visit.steps, Step(turn, by, likeness, difference)))

"""What becomes of responses while others are decoded.

    response -> text, code -> execution -> scores, the judge's question -> feedback    in threads

Whoever decodes (`rl.schedule.Run` is one) asks here, and listens between two of its own steps: a
conversation goes on when its own script has run, whatever the others do.
"""

import contextlib
import dataclasses
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, Self, runtime_checkable

from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.conversations import Group, Talk
from mmrecoder_jax.rl.judge.base import Verdict
from mmrecoder_jax.rl.sampler import Response
from mmrecoder_jax.rl.trajectory import Turn


@runtime_checkable
class Exchange(Protocol):
    """What the policy is told, and what becomes of its answers (`rl.rollout.RolloutEngine`)."""

    def shown(self, execution: Execution, chart: Chart) -> Execution:
        """An execution whose figure can be fed back in a conversation about a chart."""
        ...

    def submit(self, response: Response) -> Future[Execution]:
        """Has the code of a response run."""
        ...

    def question(self, chart: Chart, execution: Execution) -> Future[Verdict] | None:
        """Asks the judge; None where there is nothing to ask."""
        ...

    def scored(self, chart: Chart, response: Response, execution: Execution) -> Turn:
        """A turn without the judge's verdict."""
        ...

    def feedback(self, turn: Turn, chart: Chart) -> Piece:
        """The next user message."""
        ...


class Answering:
    """Answers to the responses of one rollout; a context manager.

    Args:
      exchange: what executes, scores and writes feedback.
      turns: after which a conversation is done.

    Attributes:
      outstanding: responses that were asked about and not yet listened to.
    """

    def __init__(self, exchange: Exchange, turns: int):
        self._exchange, self._turns = exchange, turns
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._questions: list[tuple[Turn, Future[Verdict]]] = []
        self._exits = contextlib.ExitStack()
        self.outstanding = 0

    def __enter__(self) -> Self:
        self._asking = self._exits.enter_context(ThreadPoolExecutor(1))
        self._scoring = self._exits.enter_context(ThreadPoolExecutor(1))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exits.__exit__(*exc)

    def ask(self, talk: Talk, response: Response) -> None:
        """Has the code of a conversation's response run; does not wait."""
        self.outstanding += 1
        self._asking.submit(self._ask, talk, response)

    def listen(self) -> Iterator[tuple[Talk, Piece | None]]:
        """What has become of responses, without waiting: one by one, as it is written into their
        conversations.

        Yields:
          (conversation, feedback for its next turn, or None where it is done).

        Raises:
          BaseException: whatever ended an execution, a score or a feedback.
        """
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            yield self._take(event)

    def wait(self, seconds: float | None) -> None:
        """Waits until there is something to hear; None: however long it takes.

        What it finds is left to `listen`, around which hosts fail together.
        """
        with contextlib.suppress(queue.Empty):
            self._events.put(self._events.get(timeout=seconds))

    def judged(self, groups: Sequence[Group]) -> None:
        """Writes the judge's verdicts into the turns; waits for them."""
        with distributed.together():
            told = {
                id(turn): dataclasses.replace(turn, verdict=question.result())
                for turn, question in self._questions
            }
        for group in groups:
            for talk in group.talks:
                talk.turns = [told.get(id(turn), turn) for turn in talk.turns]

    def _ask(self, talk: Talk, response: Response) -> None:
        try:
            future = self._exchange.submit(response)
        except BaseException as problem:
            self._events.put(_Event(talk, problem=problem))
            return

        def after(done: Future[Execution]) -> None:
            with contextlib.suppress(RuntimeError):  # a rollout that has failed takes no more
                self._scoring.submit(self._score, talk, response, done)

        future.add_done_callback(after)

    def _score(self, talk: Talk, response: Response, done: Future[Execution]) -> None:
        """Scores a response whose code has run, and writes what the policy is told of it."""
        exchange, chart = self._exchange, talk.group.chart
        try:
            execution = exchange.shown(done.result(), chart)
            question = exchange.question(chart, execution)
            turn = exchange.scored(chart, response, execution)
            feedback = None if talk.turn == self._turns else exchange.feedback(turn, chart)
            self._events.put(_Event(talk, turn, feedback, question))
        except BaseException as problem:
            self._events.put(_Event(talk, problem=problem))

    def _take(self, event: "_Event") -> tuple[Talk, Piece | None]:
        self.outstanding -= 1
        if event.problem is not None:
            raise event.problem
        talk, turn = event.talk, event.turn
        assert turn is not None
        talk.pieces.append(Piece(turn.ids, talk.turn, logps=turn.logps))
        talk.turns.append(turn)
        if event.question is not None:
            self._questions.append((turn, event.question))
        return talk, event.feedback


@dataclasses.dataclass(frozen=True)
class _Event:
    """What became of a response: a turn and the feedback that follows, or a problem."""

    talk: Talk
    turn: Turn | None = None
    feedback: Piece | None = None
    question: Future[Verdict] | None = None
    problem: BaseException | None = None

"""Multi-turn rollouts: the policy writes code, sees what came out of it, and writes again.

    full trajectory     P prompts -> prefill -> repeat G -> turn 1 [P*G] -> feedback -> turn 2 [P*G]
    shared first turn   P prompts -> prefill -> turn 1 [P] -> feedback -> repeat G -> turn 2 [P*G]

Between turns the sampled token ids are the only truth: feedback is appended as ids to the live
cache and nothing is tokenised again. Code runs in the executor pool while other rows still decode.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from mmrecoder_jax.data.batching import (
    ImageArrays,
    Piece,
    VisionLayout,
    bucket,
    pad_images,
    pad_prompts,
)
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env.chart_env import feedback_image, feedback_text
from mmrecoder_jax.env.chartmimic import score
from mmrecoder_jax.env.execution import Execution
from mmrecoder_jax.env.response import extract_code, has_format
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.rl.judge.base import Judge, Verdict
from mmrecoder_jax.rl.sampler import Response, Sampler, SamplerState
from mmrecoder_jax.rl.trajectory import Mode, Trajectory, Turn
from mmrecoder_jax.rl.vision_features import FrozenTower

A = TypeVar("A")
B = TypeVar("B")


def conversation_slots(
    prompt_length: int, feedback_length: int, response_length: int, turns: int
) -> int:
    """Cache slots that a conversation can fill: a prompt, then a response per turn, with feedback
    between turns.

    >>> conversation_slots(prompt_length=40, feedback_length=80, response_length=72, turns=2)
    264
    """
    return prompt_length + turns * response_length + (turns - 1) * feedback_length


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """What a rollout needs to know of the configuration.

    Attributes:
      prompt_length, feedback_length: buckets of a prompt and of one feedback message, in tokens.
      windows: buckets of an image, in windows of the vision tower.
      feedback: `config.feedback`: the kind of image, and the texts of a render and of an error.
      score_mode: ChartMimic rules that turns are scored by.
    """

    prompt_length: int
    feedback_length: int
    windows: tuple[int, ...]
    feedback: Mapping[str, str]
    score_mode: str


@runtime_checkable
class Environment(Protocol):
    """What a rollout needs of an environment (`env.chart_env.ChartEnv` is one)."""

    def submit(self, code: str | None) -> Future[Execution]:
        """Queues one script; None where the response holds no code."""
        ...


@runtime_checkable
class Phases(Protocol):
    """What `progress.Progress` offers: a context manager that books time on a named phase."""

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]: ...


class _NoPhases:
    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class RolloutEngine:
    """Runs the policy against the chart environment.

    Args:
      tower: encodes every image once, for all turns and for the learner; None where the programs
        encode images themselves.
      judge: judges every render against its target.
    """

    def __init__(
        self,
        sampler: Sampler,
        processor: Processor,
        env: Environment,
        layout: VisionLayout,
        spec: RolloutSpec,
        tower: FrozenTower | None = None,
        judge: Judge | None = None,
    ):
        self.sampler, self.processor, self.env = sampler, processor, env
        self.layout, self.spec, self.tower, self.judge = layout, spec, tower, judge

    @property
    def image_arrays(self) -> ImageArrays:
        """How images enter a batch of the sampler or of the learner: as features of the frozen
        tower, or as patches.
        """
        return pad_images if self.tower is None else self.tower.arrays

    def rollout(
        self,
        params: Any,
        charts: Sequence[Chart],
        uids: Sequence[int],
        key: jax.Array,
        *,
        mode: Mode = Mode.FULL_TRAJECTORY,
        group: int = 1,
        turns: int = 2,
        at_once: int | None = None,
        progress: Phases | None = None,
    ) -> list[list[Trajectory]]:
        """`[P][G]` trajectories of P charts.

        Args:
          params: the policy.
          uids: one per chart; together with `key` they decide every random number.
          mode: where a chart's G trajectories part.
          at_once: charts sampled at one time; None: all of them. It bounds memory and changes no
            token.
        """
        progress = progress or _NoPhases()
        at_once = at_once or len(charts)
        groups = []
        for first in range(0, len(charts), at_once):
            part = slice(first, first + at_once)
            groups += self._rollout(
                params, charts[part], uids[part], key, mode, group, turns, progress
            )
        return groups

    def _rollout(
        self,
        params: Any,
        charts: Sequence[Chart],
        uids: Sequence[int],
        key: jax.Array,
        mode: Mode,
        group: int,
        turns: int,
        progress: Phases,
    ) -> list[list[Trajectory]]:
        with progress.phase("prefill"):
            prompts = [self._prompt(chart) for chart in charts]
            batch = self._pad(params, prompts, [()] * len(prompts), self.spec.prompt_length)
            state = self.sampler.prefill(params, batch, slots=self._slots(turns))
        repeat_at = 2 if mode == Mode.SHARED_FIRST_TURN else 1
        rows = [
            _Row(chart, int(uid), [prompt], [])
            for chart, uid, prompt in zip(charts, uids, prompts, strict=True)
        ]
        for turn in range(1, turns + 1):
            if turn == repeat_at and group > 1:
                state = self.sampler.repeat(state, group)
                rows = [row.copy(member) for row in rows for member in range(group)]
            turn_key = jax.random.fold_in(key, turn)
            state = self._turn(params, state, rows, turn_key, turn, progress)
            if turn < turns:
                with progress.phase("prefill"):
                    feedback = [self._feedback(row.turns[-1], row.chart) for row in rows]
                    before = [tuple(row.pieces) for row in rows]
                    batch = self._pad(params, feedback, before, self.spec.feedback_length)
                    state = self.sampler.extend(params, state, batch)
                    for row, piece in zip(rows, feedback, strict=True):
                        row.pieces.append(piece)
        trajectories = [
            Trajectory(row.chart, row.uid, tuple(row.pieces), tuple(row.turns)) for row in rows
        ]
        return [trajectories[i : i + group] for i in range(0, len(trajectories), group)]

    def _turn(
        self,
        params: Any,
        state: SamplerState,
        rows: Sequence["_Row"],
        key: jax.Array,
        number: int,
        progress: Phases,
    ) -> SamplerState:
        """Samples, executes, judges and scores a turn of every row, and appends it to its row."""
        executions: dict[int, Future[Execution]] = {}
        questions: dict[int, Future[Future[Verdict] | None]] = {}
        judge = self.judge

        def on_finished(row: int, response: Response) -> None:
            code = extract_code(self.processor.decode(response.ids))
            executions[row] = self.env.submit(code)
            if judge is not None:  # asked in the executor's thread, while other rows still decode
                ask = functools.partial(_ask, judge, rows[row].chart)
                questions[row] = _then(executions[row], ask)

        with progress.phase("decode"):
            uids = [row.uid for row in rows]
            state, responses = self.sampler.decode(params, state, uids, key, on_finished)
        with progress.phase("execute"):
            results = [executions[i].result() for i in range(len(rows))]
        verdicts: list[Verdict | None] = [None] * len(rows)
        if judge is not None:
            with progress.phase("judge"):
                asked = [questions[i].result() for i in range(len(rows))]
                judge.finish()
                verdicts = [None if future is None else future.result() for future in asked]
        with progress.phase("score"):
            for row, response, execution, verdict in zip(
                rows, responses, results, verdicts, strict=True
            ):
                row.turns.append(self._scored(row.chart, response, execution, verdict))
                row.pieces.append(Piece(response.ids, number))
        return state

    def _scored(
        self, chart: Chart, response: Response, execution: Execution, verdict: Verdict | None
    ) -> Turn:
        text = self.processor.decode(response.ids)
        record = execution.record if execution.ok else None
        return Turn(
            ids=response.ids,
            logps=response.logps,
            finished=response.finished,
            text=text,
            execution=execution,
            scores=score(record, chart.record, self.spec.score_mode),
            format=float(has_format(text)),
            verdict=verdict,
        )

    def _slots(self, turns: int) -> int:
        response_length = self.sampler.spec.response_length
        return conversation_slots(
            self.spec.prompt_length, self.spec.feedback_length, response_length, turns
        )

    def _prompt(self, chart: Chart) -> Piece:
        image = self.processor.image(chart.image)
        return Piece.shown(self.processor.first_prompt(chart.instruction, image))

    def _feedback(self, turn: Turn, chart: Chart) -> Piece:
        """The next user message.

        An error text too long for the bucket is cut from its front: its last line says what failed.
        """
        execution = turn.execution
        pixels = feedback_image(execution, chart.image, self.spec.feedback["image"])
        image = None if pixels is None else self.processor.image(pixels)
        text = feedback_text(execution, self.spec.feedback)
        segment = self.processor.feedback_prompt(text, image, closed=turn.finished)
        error = execution.error
        while len(segment.ids) > self.spec.feedback_length and error:
            error = error[len(error) // 4 + 1 :]
            text = feedback_text(dataclasses.replace(execution, error=error), self.spec.feedback)
            segment = self.processor.feedback_prompt(text, image, closed=turn.finished)
        return Piece.shown(segment)

    def _pad(
        self,
        params: Any,
        pieces: Sequence[Piece],
        before: Sequence[tuple[Piece, ...]],
        length: int,
    ) -> dict[str, np.ndarray]:
        """The sampler's arrays of one piece per row; `before` are the pieces that precede it."""
        longest = max(len(piece.ids) for piece in pieces)
        if longest > length:
            raise ValueError(
                f"a prompt or feedback of {longest} tokens exceeds its bucket of {length}: raise "
                "rl.prompt_length / rl.feedback_length, or lower processor.max_pixels"
            )
        images = [image for piece in pieces for image in piece.images]
        windows = bucket(
            max((len(image.valid) for image in images), default=0),
            self.spec.windows,
            "an image's windows",
        )
        if self.tower is not None:
            self.tower.encode(params, images)
        return pad_prompts(
            pieces, before, length, windows, len(pieces), self.layout, self.image_arrays
        )


def _ask(judge: Judge, chart: Chart, execution: Execution) -> Future[Verdict] | None:
    """A question to the judge; None where there is no render to judge."""
    return None if execution.image is None else judge.submit(chart.image, execution.image)


def _then(future: Future[A], function: Callable[[A], B]) -> Future[B]:
    """What `function` makes of a future's result, in the thread that sets it."""
    after: Future[B] = Future()

    def done(before: Future[A]) -> None:
        try:
            after.set_result(function(before.result()))
        except BaseException as problem:
            after.set_exception(problem)

    future.add_done_callback(done)
    return after


@dataclasses.dataclass
class _Row:
    """A conversation under way."""

    chart: Chart
    uid: int
    pieces: list[Piece]
    turns: list[Turn]

    def copy(self, member: int) -> "_Row":
        """Group member `member`: its own random numbers, the same past."""
        uid = (self.uid * 65537 + member + 1) % 2**32
        return _Row(self.chart, uid, list(self.pieces), list(self.turns))

"""Multi-turn rollouts: the policy writes code, the environment runs it, the policy sees what came
out and writes again.

    full trajectory      P prompts -> prefill -> repeat G -> turn 1 [P*G] -> feedback -> turn 2 [P*G]
    shared first turn    P prompts -> prefill -> turn 1 [P] -> feedback -> repeat G -> turn 2 [P*G]

Between turns the sampled token ids are the only truth: feedback is appended as ids to the live
cache and nothing is tokenised again. Code runs in the executor pool while other rows still decode.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float

from mmrecoder_jax.data.batching import (
    ImageArrays,
    Piece,
    VisionLayout,
    bucket,
    pad_images,
    pad_prompts,
)
from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.env import ChartEnv, Execution
from mmrecoder_jax.env.chart_env import extract_code, feedback_image, feedback_text, has_format
from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.models.processor import Processor
from mmrecoder_jax.rl.judge.base import Judge, Verdict
from mmrecoder_jax.rl.sampler import Response, Sampler
from mmrecoder_jax.rl.vision_features import FrozenTower

SHARED_FIRST_TURN = "shared_first_turn"
FULL_TRAJECTORY = "full_trajectory"


@dataclasses.dataclass(frozen=True)
class Turn:
    """One response, what executing it gave, its score against the target, and the judge's verdict
    (None: no judge, or no render).
    """

    ids: np.ndarray
    logps: Float[np.ndarray, " L"]
    finished: bool
    text: str
    execution: Execution
    scores: Scores
    format: float
    verdict: Verdict | None = None


def judge_score(turn: Turn) -> float:
    """The model part of a turn's reward: 0 where there was nothing to judge, NaN where the judge
    could not score the render.
    """
    if turn.verdict is None:
        return 0.0
    return math.nan if turn.verdict.score is None else turn.verdict.score


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A whole conversation about one chart. `pieces` are the token ids the policy saw and wrote, in
    order.
    """

    chart: Chart
    uid: int
    pieces: tuple[Piece, ...]
    turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """Buckets of a prompt and of one feedback message (tokens) and of an image (windows);
    `config.feedback`; ChartMimic mode.
    """

    prompt_length: int
    feedback_length: int
    windows: tuple[int, ...]
    feedback: Mapping[str, str]
    score_mode: str = "training"


class Phases(Protocol):
    """What `progress.Progress` offers: a context manager that books time on a named phase."""

    def phase(self, name: str) -> AbstractContextManager: ...


class _NoPhases:
    def phase(self, name: str) -> AbstractContextManager:
        return nullcontext()


class RolloutEngine:
    """Runs the policy against the chart environment.

    Args:
      tower: encodes every image once, for all turns and for the learner.
      judge: judges every render against its target.
    """

    def __init__(
        self,
        sampler: Sampler,
        processor: Processor,
        env: ChartEnv,
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

    def slots(self, turns: int) -> int:
        """Cache slots that a conversation of so many turns can fill."""
        response = self.sampler.spec.response_length
        return (
            self.spec.prompt_length
            + response
            + (turns - 1) * (self.spec.feedback_length + response)
        )

    def rollout(
        self,
        params: Any,
        charts: Sequence[Chart],
        uids: Sequence[int],
        key: jax.Array,
        *,
        mode: str = FULL_TRAJECTORY,
        group: int = 1,
        turns: int = 2,
        progress: Phases | None = None,
    ) -> list[list[Trajectory]]:
        """`[P][G]` trajectories of P charts. `uids` (one a chart) and `key` decide every random
        number.
        """
        progress = progress or _NoPhases()
        if mode not in (SHARED_FIRST_TURN, FULL_TRAJECTORY):
            raise ValueError(
                f"rollout mode {mode!r}: use {SHARED_FIRST_TURN!r} or {FULL_TRAJECTORY!r}"
            )
        with progress.phase("prefill"):
            prompts = [
                Piece.shown(
                    self.processor.first_prompt(
                        chart.instruction, self.processor.image(chart.image)
                    )
                )
                for chart in charts
            ]
            batch = self._pad(params, prompts, [()] * len(prompts), self.spec.prompt_length)
            state = self.sampler.prefill(params, batch, slots=self.slots(turns))
        repeat_at = 2 if mode == SHARED_FIRST_TURN else 1
        rows = [
            _Row(chart, int(uid), [prompt], [])
            for chart, uid, prompt in zip(charts, uids, prompts, strict=True)
        ]
        for turn in range(1, turns + 1):
            if turn == repeat_at and group > 1:
                state = self.sampler.repeat(state, group)
                rows = [row.copy(member) for row in rows for member in range(group)]
            state = self._turn(params, state, rows, jax.random.fold_in(key, turn), turn, progress)
            if turn < turns:
                with progress.phase("prefill"):
                    feedback = [self._feedback(row.turns[-1], row.chart) for row in rows]
                    batch = self._pad(
                        params,
                        feedback,
                        [tuple(row.pieces) for row in rows],
                        self.spec.feedback_length,
                    )
                    state = self.sampler.extend(params, state, batch)
                    for row, piece in zip(rows, feedback, strict=True):
                        row.pieces.append(piece)
        trajectories = [
            Trajectory(row.chart, row.uid, tuple(row.pieces), tuple(row.turns)) for row in rows
        ]
        return [trajectories[i : i + group] for i in range(0, len(trajectories), group)]

    def _turn(self, params, state, rows, key, turn, progress):
        executions, questions = {}, {}

        def judge(row: int, execution: Execution) -> Future[Verdict] | None:
            return (
                None
                if execution.image is None
                else self.judge.submit(rows[row].chart.image, execution.image)
            )

        def on_finished(row: int, response: Response) -> None:
            executions[row] = self.env.submit(extract_code(self.processor.decode(response.ids)))
            if self.judge is not None:  # in the executor's thread, while other rows still decode
                questions[row] = _then(executions[row], functools.partial(judge, row))

        with progress.phase("decode"):
            state, responses = self.sampler.decode(
                params, state, [row.uid for row in rows], key, on_finished
            )
        with progress.phase("execute"):
            results = [executions[i].result() for i in range(len(rows))]
        verdicts: list[Verdict | None] = [None] * len(rows)
        if self.judge is not None:
            with progress.phase("judge"):
                asked = [questions[i].result() for i in range(len(rows))]
                self.judge.finish()
                verdicts = [None if future is None else future.result() for future in asked]
        with progress.phase("score"):
            for row, response, execution, verdict in zip(
                rows, responses, results, verdicts, strict=True
            ):
                text = self.processor.decode(response.ids)
                record = execution.record if execution.ok else None
                scores = score(record, row.chart.record, self.spec.score_mode)
                form = float(has_format(text))
                row.turns.append(
                    Turn(
                        response.ids,
                        response.logps,
                        response.finished,
                        text,
                        execution,
                        scores,
                        form,
                        verdict,
                    )
                )
                row.pieces.append(Piece(response.ids, turn))
        return state

    def _feedback(self, turn: Turn, chart: Chart) -> Piece:
        """The next user message; an error text too long for the bucket is cut from its front (its
        last line says what failed).
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

    def _pad(self, params, pieces, starts, length):
        longest = max(len(piece.ids) for piece in pieces)
        if longest > length:
            raise ValueError(
                f"a prompt or feedback of {longest} tokens exceeds its bucket of {length}: raise rl.prompt_length / rl.feedback_length, "
                "or lower processor.max_pixels"
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
            pieces, starts, length, windows, len(pieces), self.layout, self.image_arrays
        )


def _then(future: Future, function: Callable[[Any], Any]) -> Future:
    """What `function` makes of a future's result, in the thread that sets it."""
    after: Future = Future()

    def done(before: Future) -> None:
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
        return _Row(
            self.chart, (self.uid * 65537 + member + 1) % 2**32, list(self.pieces), list(self.turns)
        )

"""Multi-turn rollouts: the policy writes code, sees what came out of it, and writes again.

    full trajectory     P prompts -> prefill -> repeat G -> turn 1 [P*G] -> feedback -> turn 2 [P*G]
    shared first turn   P prompts -> prefill -> turn 1 [P] -> feedback -> repeat G -> turn 2 [P*G]

Between turns the sampled token ids are the only truth: feedback is appended as ids to the live
cache and nothing is tokenised again. Code runs in the executor pool while other rows still decode.

What the policy draws may have any size. A figure that no bucket holds is a failure of its script
(`RolloutEngine.shown`), whatever the turn; a chart that no bucket holds is refused before anything
is asked (`RolloutEngine.refusal`). Hosts share buckets: each takes the largest of all hosts.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from mmrecoder_jax.data.sources import Chart, RandomAccess
from mmrecoder_jax.env.chart_env import feedback_image, feedback_text, oversized
from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.execution import Execution, Replay
from mmrecoder_jax.env.response import extract_code, has_format
from mmrecoder_jax.env.wire import Flag
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.processor import ImagePatches, Processor
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

    def watch(self, code: str) -> Future[Execution]:
        """Queues one script whose drawing is replayed for sure."""
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

    def shown(self, execution: Execution) -> Execution:
        """An execution whose figure can be fed back; a figure that no bucket holds is a failure.

        The rule is the same on every turn and for every `feedback.image`: a render is measured as
        if it were shown, in windows and in the tokens of a feedback.
        """
        if execution.image is None:
            return execution
        height, width, _ = execution.image.shape
        fits = self.feedback_fits(self.processor.outline_of_size(width, height))
        return execution if fits else oversized(execution)

    def feedback_fits(self, image: ImagePatches) -> bool:
        """Whether a bucket holds the feedback on a render that is like this image."""
        if image.patches.shape[0] > max(self.spec.windows):
            return False
        if not self.spec.feedback_length:  # first turns alone
            return True
        text = self.spec.feedback["render"]
        tokens = len(self.processor.feedback_prompt(text, image, closed=False).ids)
        return tokens <= self.spec.feedback_length

    def refusal(self, chart: Chart, turns: int) -> str:
        """Why the policy cannot be asked for `turns` turns about a chart; "" where it can."""
        try:
            image = self.processor.image(chart.image)
        except ValueError as error:
            return str(error)
        windows, length = image.patches.shape[0], self.spec.prompt_length
        if windows > max(self.spec.windows):
            return f"its image has {windows} windows, data.windows end at {max(self.spec.windows)}"
        tokens = len(self.processor.first_prompt(chart.instruction, image).ids)
        if tokens > length:
            return f"its prompt has {tokens} tokens, rl.prompt_length is {length}"
        if turns > 1 and not self.feedback_fits(image):
            return f"a render like it does not fit rl.feedback_length={self.spec.feedback_length}"
        return ""

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
            with distributed.together():
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
                    with distributed.together():
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
            executions[row] = _then(self.env.submit(code), self.shown)
            if judge is not None:  # asked in the executor's thread, while other rows still decode
                ask = functools.partial(_ask, judge, rows[row].chart)
                questions[row] = _then(executions[row], ask)

        with progress.phase("decode"):
            uids = [row.uid for row in rows]
            state, responses = self.sampler.decode(params, state, uids, key, on_finished)
        with progress.phase("execute"), distributed.together():
            results = [executions[i].result() for i in range(len(rows))]
            asked = [questions[i].result() for i in sorted(questions)]
        verdicts: list[Verdict | None] = [None] * len(rows)
        if judge is not None:
            with progress.phase("judge"):
                judge.finish()
                with distributed.together():
                    verdicts = [None if future is None else future.result() for future in asked]
        with progress.phase("score"), distributed.together():
            scored = [
                self._scored(row.chart, response, execution, verdict)
                for row, response, execution, verdict in zip(
                    rows, responses, results, verdicts, strict=True
                )
            ]
            for row, turn in zip(rows, self._watched(rows, scored), strict=True):
                row.turns.append(turn)
                row.pieces.append(Piece(turn.ids, number))
        return state

    def _watched(self, rows: Sequence["_Row"], turns: Sequence[Turn]) -> list[Turn]:
        """The turns, of which the best of each group was drawn again where no model code runs.

        One that turns out to be forged scores nothing, and the next best is looked at. Rows of a
        chart are a group; a row alone is compared with none, and not looked at.
        """
        turns = list(turns)
        seen: set[int] = set()
        groups = [
            list(numbers)
            for _, numbers in itertools.groupby(range(len(rows)), lambda i: id(rows[i].chart))
        ]
        while True:
            best = [max(group, key=lambda i: turns[i].scores.overall) for group in groups]
            asked = {
                i: self.env.watch(code)
                for i, group in zip(best, groups, strict=True)
                if len(group) > 1 and i not in seen and turns[i].scores.overall > 0
                if turns[i].execution.replay == Replay.NOT_ASKED
                if (code := extract_code(turns[i].text)) is not None
            }
            if not asked:
                return turns
            seen |= asked.keys()
            for i, future in asked.items():
                execution = future.result()
                if Flag.FORGED in execution.flags:
                    turns[i] = dataclasses.replace(
                        turns[i], execution=execution, scores=Scores(), verdict=None
                    )

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
        while len(segment.ids) > self.spec.feedback_length and text:
            if error:
                error = error[len(error) // 4 + 1 :]
                shorter = dataclasses.replace(execution, error=error)
                text = feedback_text(shorter, self.spec.feedback)
            else:  # the words around it are too long by themselves
                text = text[len(text) // 4 + 1 :]
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
        images = [image for piece in pieces for image in piece.images]
        own = [
            max(len(piece.ids) for piece in pieces),
            max((len(image.valid) for image in images), default=0),
        ]
        longest, windows = (int(size) for size in distributed.global_max(np.array(own)))
        if longest > length:
            raise ValueError(
                f"a prompt or feedback of {longest} tokens exceeds its bucket of {length}: raise "
                "rl.prompt_length / rl.feedback_length, or lower processor.max_pixels"
            )
        windows = bucket(windows, self.spec.windows, "an image's windows")
        if self.tower is not None:
            self.tower.encode(params, images)
        return pad_prompts(
            pieces, before, length, windows, len(pieces), self.layout, self.image_arrays
        )


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the policy answered to charts, one trajectory each.

    Attributes:
      own: (number of the chart, trajectory) of this host's charts; without patches of images.
      refused: why charts were not asked about, by number; those of all hosts.
    """

    own: list[tuple[int, Trajectory]]
    refused: dict[int, str]


def answer_all(
    engine: RolloutEngine,
    params: Any,
    charts: RandomAccess[Chart],
    key: jax.Array,
    *,
    turns: int,
    batch_size: int,
    each: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Answers:
    """Lets the policy answer every chart once. Hosts share the charts out.

    A chart's random numbers come from its number, so its answer depends on neither batch nor hosts.

    Args:
      batch_size: charts at one time, over all hosts; rounded up to what the devices can share. The
        last batch is filled up, so that one shape is compiled.
      each: goes through the first numbers of the batches, with a progress bar for instance.
    """
    count, hosts = len(charts), jax.process_count()
    ways = hosts * engine.layout.ways
    size = -(-min(batch_size, count) // ways) * ways
    answers = Answers([], {})
    for start in each(range(0, count, size or 1)):
        asked = range(start, min(start + size, count))
        with distributed.together():
            why = {
                number: engine.refusal(charts[number], turns)
                for number in distributed.own_share(asked)
            }
        for refused in distributed.gather_json([pair for pair in why.items() if pair[1]]):
            answers.refused.update(refused)
        good = [number for number in asked if number not in answers.refused]
        if not good:
            continue
        filled = distributed.own_share(good + [good[-1]] * (size - len(good)))
        with distributed.together():
            own = [charts[number] for number in filled]
        groups = engine.rollout(params, own, filled, key, turns=turns)
        places = distributed.own_numbers(len(filled))
        answers.own.extend(
            (number, _without_patches(group[0]))
            for place, number, group in zip(places, filled, groups, strict=True)
            if place < len(good)
        )
    return answers


def _without_patches(trajectory: Trajectory) -> Trajectory:
    """A trajectory that is kept and not learnt from: patches are most of its memory."""
    pieces = tuple(dataclasses.replace(piece, images=()) for piece in trajectory.pieces)
    return dataclasses.replace(trajectory, pieces=pieces)


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

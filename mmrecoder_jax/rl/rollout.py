"""Multi-turn rollouts: the policy writes code, sees what came out of it, and writes again.

    full trajectory     P prompts -> G times: turn 1 -> feedback -> turn 2
    shared first turn   P prompts -> turn 1 -> feedback -> G times: turn 2

Conversations do not wait for each other (`rl.schedule`): each goes on when its own code has run.
Between turns the sampled token ids are the only truth: feedback is appended as ids to the live
cache and nothing is tokenised again.

What the policy draws may have any size. A figure that no bucket holds is a failure of its script
(`RolloutEngine.shown`), whatever the turn; a chart that no bucket holds is refused before anything
is asked (`RolloutEngine.refusal`). Hosts share buckets: each takes the largest of all hosts.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from mmrecoder_jax.data.batching import (
    ImageArrays,
    Piece,
    VisionLayout,
    pad_images,
    pad_prompts,
)
from mmrecoder_jax.data.batching import bucket as bucketed
from mmrecoder_jax.data.sources import Chart, RandomAccess
from mmrecoder_jax.env.chart_env import feedback_images, feedback_text, oversized
from mmrecoder_jax.env.chartmimic import Scores, score
from mmrecoder_jax.env.execution import Execution, Replay
from mmrecoder_jax.env.response import extract_code, has_format
from mmrecoder_jax.env.wire import Flag, Status
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.processor import ImagePatches, Processor
from mmrecoder_jax.rl.conversations import Group, Talk
from mmrecoder_jax.rl.decoder import Decoder
from mmrecoder_jax.rl.judge.base import Judge, Verdict
from mmrecoder_jax.rl.sampler import Response, Sampler
from mmrecoder_jax.rl.schedule import Bucket, Phases, RolloutSpec, Run, Size, Stats
from mmrecoder_jax.rl.trajectory import Mode, Trajectory, Turn
from mmrecoder_jax.rl.vision_features import FrozenTower


@runtime_checkable
class Environment(Protocol):
    """What a rollout needs of an environment (`env.chart_env.ChartEnv` is one)."""

    def submit(self, code: str | None) -> Future[Execution]:
        """Queues one script; None where the response holds no code."""
        ...

    def watch(self, code: str) -> Future[Execution]:
        """Queues one script whose drawing is replayed for sure."""
        ...


class _NoPhases:
    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class RolloutEngine:
    """Runs the policy against the chart environment.

    Args:
      tower: encodes every image once, for all turns and for the learner; None where the programs
        encode images themselves.
      judge: judges every render against its target.
      decoder: who decodes.
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
        decoder: Decoder = Run,
    ):
        self.sampler, self.processor, self.env = sampler, processor, env
        self.layout, self.spec, self.tower, self.judge = layout, spec, tower, judge
        self.decoder = decoder
        self.stats = Stats()  # of the last rollout

    def at(self, temperature: float) -> "RolloutEngine":
        """This engine at another temperature and without a judge: it runs the same programs, with
        the same features and the same server.
        """
        spec = dataclasses.replace(self.sampler.spec, temperature=temperature)
        sampler = Sampler(self.sampler.model, spec, self.sampler.mesh)
        rest = self.layout, self.spec, self.tower, None, self.decoder
        return RolloutEngine(sampler, self.processor, self.env, *rest)

    def shown(self, execution: Execution, chart: Chart) -> Execution:
        """An execution whose figure can be fed back; a figure that no bucket holds is a failure.

        The rule is the same on every turn and for every `feedback.image`: a render is measured as
        if it were shown, in windows and in the tokens of a feedback. A second picture beside it has
        the chart's size.
        """
        if execution.image is None:
            return execution
        height, width, _ = execution.image.shape
        images = [self.processor.outline_of_size(width, height)]
        if self.spec.pictures > 1:
            images.append(self.processor.outline(chart.image))
        return execution if self.feedback_fits(images) else oversized(execution)

    def feedback_fits(self, images: Sequence[ImagePatches]) -> bool:
        """Whether a bucket holds a feedback with these pictures."""
        widest = max(image.patches.shape[0] for image in images)
        if widest > max(self.spec.windows):
            return False
        if not self.spec.feedback_length:  # first turns alone
            return True
        text = self.spec.feedback["render"]
        tokens = len(self.processor.feedback_prompt(text, images, closed=False).ids)
        return tokens <= self.spec.feedback_length

    def refusal(self, chart: Chart, turns: int) -> str:
        """Why the policy cannot be asked for `turns` turns about a chart; "" where it can."""
        try:
            images = [self.processor.image(png) for png in chart.images]
        except ValueError as error:
            return str(error)
        windows, length = max(i.patches.shape[0] for i in images), self.spec.prompt_length
        if windows > max(self.spec.windows):
            return f"its image has {windows} windows, data.windows end at {max(self.spec.windows)}"
        first, *more = images
        tokens = len(self.processor.first_prompt(chart.instruction, first, more).ids)
        if tokens > length:
            return f"its prompt has {tokens} tokens, rl.prompt_length is {length}"
        if turns > 1 and not self.feedback_fits([first] * self.spec.pictures):
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
        size: Size | None = None,
        progress: Phases | None = None,
    ) -> list[list[Trajectory]]:
        """`[P][G]` trajectories of P charts.

        Args:
          params: the policy.
          uids: one per chart; together with `key` they decide every random number.
          mode: where a chart's G trajectories part.
          size: how much is under way at one time. It bounds memory and changes no token.
        """
        groups = self.begun(charts, uids, mode=mode, group=group, turns=turns)
        self.run(params, groups, key, turns=turns, size=size, progress=progress)
        return [trajectories(one) for one in groups]

    def begun(
        self, charts: Sequence[Chart], uids: Sequence[int], *, mode: Mode, group: int, turns: int
    ) -> list[Group]:
        """Groups of conversations about charts, of which nothing is written yet; see `rollout`."""
        parts_at = turns if mode == Mode.SHARED_FIRST_TURN else 1
        with distributed.together():
            return [
                Group(chart, int(uid), group, parts_at, self.prompt(chart))
                for chart, uid in zip(charts, uids, strict=True)
            ]

    def run(
        self,
        params: Any,
        groups: Sequence[Group],
        key: jax.Array,
        *,
        turns: int,
        size: Size | None = None,
        progress: Phases | None = None,
        budget: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Goes on with groups of conversations until all are done, or rest.

        Args:
          budget, meanwhile: see `rl.schedule.Run`; a group rests where any of its conversations
            does, and is given to a later call.
        """
        progress = progress or _NoPhases()
        how = size or Size(), progress, budget, meanwhile
        run = self.decoder(self, params, key, groups, turns, *how)
        run.go()
        self.stats = run.stats
        with progress.phase("judge" if self.judge is not None else "score"):
            if self.judge is not None:
                self.judge.finish()
            run.answering.judged(groups)
        talks = [talk for group in groups if not group.rests for talk in group.talks]
        with progress.phase("score"), distributed.together():
            for turn in range(turns):
                watched = self._watched(talks, [talk.turns[turn] for talk in talks])
                for talk, of_turn in zip(talks, watched, strict=True):
                    talk.turns[turn] = of_turn

    def _watched(self, talks: Sequence[Talk], turns: Sequence[Turn]) -> list[Turn]:
        """The turns, of which the best of each group was drawn again where no model code runs.

        One that turns out to be forged scores nothing, and the next best is looked at. A
        conversation alone is compared with none, and not looked at.
        """
        turns = list(turns)
        seen: set[int] = set()
        groups = [
            list(numbers)
            for _, numbers in itertools.groupby(range(len(talks)), lambda i: id(talks[i].group))
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

    def submit(self, response: Response) -> Future[Execution]:
        """Has the code of a response run."""
        return self.env.submit(extract_code(self.processor.decode(response.ids)))

    def question(self, chart: Chart, execution: Execution) -> Future[Verdict] | None:
        """Asks the judge; None where there is no judge, or no render to judge."""
        if self.judge is None or execution.image is None:
            return None
        return self.judge.submit(chart.image, execution.image)

    def scored(self, chart: Chart, response: Response, execution: Execution) -> Turn:
        """A turn without the judge's verdict."""
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
        )

    def prompt(self, chart: Chart) -> Piece:
        image, *more = (self.processor.image(png) for png in chart.images)
        return Piece.shown(self.processor.first_prompt(chart.instruction, image, more))

    def feedback(self, turn: Turn, chart: Chart) -> Piece:
        """The next user message.

        An error text too long for the bucket is cut from its front: its last line says what failed.
        """
        execution = turn.execution
        pictures = feedback_images(execution, chart.image, self.spec.feedback["image"])
        images = [self.processor.image(pixels) for pixels in pictures]
        text = feedback_text(execution, self.spec.feedback)
        segment = self.processor.feedback_prompt(text, images, closed=turn.finished)
        error = execution.error
        while len(segment.ids) > self.spec.feedback_length and text:
            if error:
                error = error[len(error) // 4 + 1 :]
                shorter = dataclasses.replace(execution, error=error)
                text = feedback_text(shorter, self.spec.feedback)
            else:  # the words around it are too long by themselves
                text = text[len(text) // 4 + 1 :]
            segment = self.processor.feedback_prompt(text, images, closed=turn.finished)
        return Piece.shown(segment)

    def pad(
        self,
        params: Any,
        pieces: Sequence[Piece],
        before: Sequence[Sequence[Piece]],
        bucket: Bucket,
    ) -> dict[str, np.ndarray]:
        """The sampler's arrays of one piece per row; `before` are the pieces that precede it.

        All hosts call this together.
        """
        images = [image for piece in pieces for image in piece.images]
        own = [
            max(len(piece.ids) for piece in pieces),
            max((len(image.valid) for image in images), default=0),
        ]
        longest, windows = (int(size) for size in distributed.global_max(np.array(own)))
        if longest > bucket.length:
            raise ValueError(
                f"a prompt or feedback of {longest} tokens exceeds its bucket of {bucket.length}: "
                "raise rl.prompt_length / rl.feedback_length, or lower processor.max_pixels"
            )
        windows = bucketed(windows, self.spec.windows, "an image's windows")
        if self.tower is not None:
            self.tower.encode(params, images)
        places = len(pieces) * bucket.shown
        return pad_prompts(
            pieces, before, bucket.length, windows, places, self.layout, self.image_arrays
        )


def trajectories(group: Group) -> list[Trajectory]:
    """What a group's conversations have come to."""
    return [
        Trajectory(group.chart, talk.uid, tuple(talk.pieces), tuple(talk.turns))
        for talk in group.talks
    ]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the policy answered to charts.

    Attributes:
      own: (number of the chart, trajectory) of this host's charts, without patches of images; a
        chart's G trajectories follow each other.
      refused: why charts were not asked about, by number; those of all hosts.
    """

    own: list[tuple[int, Trajectory]]
    refused: dict[int, str]


def answer_batches(
    engine: RolloutEngine,
    params: Any,
    charts: RandomAccess[Chart],
    key: jax.Array,
    *,
    turns: int,
    batch_size: int,
    group: int = 1,
    mode: Mode = Mode.FULL_TRAJECTORY,
    at_once: Size | None = None,
    numbers: Sequence[int] | None = None,
    remembered: int = 0,
    each: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Iterator[Answers]:
    """Lets the policy answer charts, a batch at a time. Hosts share the charts out, and go through
    the batches together.

    A chart's random numbers come from its number, so its answer depends on neither batch nor hosts.

    Args:
      batch_size: charts at one time, over all hosts; rounded up to what the devices can share. The
        last batch is filled up, so that one shape is compiled.
      group: G, trajectories of each chart.
      mode: where a chart's trajectories part.
      at_once: how much is under way at one time; None: a batch.
      numbers: of the charts that are asked about; None: all.
      remembered: see `written_on`; 0: the policy sees all of its earlier turns.
      each: goes through the places at which batches begin, with a progress bar for instance.
    """
    numbers = range(len(charts)) if numbers is None else numbers
    count, hosts = len(numbers), jax.process_count()
    ways = hosts * engine.layout.ways
    size = -(-min(batch_size, count) // ways) * ways
    for start in each(range(0, count, size or 1)):
        asked = numbers[start : start + size]
        with distributed.together():
            why = {
                number: engine.refusal(charts[number], turns)
                for number in distributed.own_share(asked)
            }
        answers = Answers([], {})
        for refused in distributed.gather_json([pair for pair in why.items() if pair[1]]):
            answers.refused.update(refused)
        good = [number for number in asked if number not in answers.refused]
        if good:
            filled = distributed.own_share(good + [good[-1]] * (size - len(good)))
            with distributed.together():
                own = [charts[number] for number in filled]
            how = at_once or Size(prompts=size, rows=size * group)
            seen = min(turns, remembered + 1) if remembered else turns
            groups = engine.rollout(
                params, own, filled, key, mode=mode, group=group, turns=seen, size=how
            )
            for turn in range(seen, turns):
                again = jax.random.fold_in(key, turn)
                groups = written_on(engine, params, groups, again, remembered, how)
            places = distributed.own_numbers(len(filled))
            answers.own.extend(
                (number, _without_patches(trajectory))
                for place, number, of_chart in zip(places, filled, groups, strict=True)
                if place < len(good)
                for trajectory in of_chart
            )
        yield answers


def answer_all(
    engine: RolloutEngine,
    params: Any,
    charts: RandomAccess[Chart],
    key: jax.Array,
    *,
    turns: int,
    batch_size: int,
    mode: Mode = Mode.FULL_TRAJECTORY,
    at_once: Size | None = None,
    remembered: int = 0,
    each: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Answers:
    """Lets the policy answer every chart once; see `answer_batches`."""
    answers = Answers([], {})
    for batch in answer_batches(
        engine,
        params,
        charts,
        key,
        turns=turns,
        batch_size=batch_size,
        mode=mode,
        at_once=at_once,
        remembered=remembered,
        each=each,
    ):
        answers.own.extend(batch.own)
        answers.refused.update(batch.refused)
    return answers


def written_on(
    engine: RolloutEngine,
    params: Any,
    groups: Sequence[Sequence[Trajectory]],
    key: jax.Array,
    remembered: int,
    size: Size,
) -> list[list[Trajectory]]:
    """Trajectories with one more turn, of a policy that remembers its latest turns alone.

    It sees the prompt, so many of its turns with what came of each, and nothing of those before: a
    policy that was trained on two turns is asked for a second one, however often.

    Args:
      groups: `[P][G]` trajectories that the policy itself has written.
    """
    begun = []
    with distributed.together():
        for of_chart in groups:
            first = of_chart[0]
            group = Group(first.chart, first.uid, len(of_chart), 1, first.pieces[0], parted=True)
            for one in of_chart:
                recent = one.turns[-remembered:]
                pieces = [group.prompt]
                for number, turn in enumerate(recent, 1):
                    pieces += [Piece(turn.ids, number), engine.feedback(turn, one.chart)]
                group.talks.append(Talk(group, one.uid, pieces, list(recent)))
            begun.append(group)
    engine.run(params, begun, key, turns=remembered + 1, size=size)
    return [
        [
            dataclasses.replace(
                one,
                pieces=(
                    *one.pieces,
                    talk.pieces[-2],
                    dataclasses.replace(talk.pieces[-1], turn=len(one.turns) + 1),
                ),
                turns=(*one.turns, talk.turns[-1]),
            )
            for one, talk in zip(of_chart, group.talks, strict=True)
        ]
        for of_chart, group in zip(groups, begun, strict=True)
    ]


def refused_trajectory(chart: Chart, number: int, reason: str, turns: int) -> Trajectory:
    """Empty turns in place of what nobody was asked for."""
    nothing = np.zeros(0, np.float32)
    turn = Turn(
        ids=nothing.astype(np.int32),
        logps=nothing,
        finished=False,
        text="",
        execution=Execution(Status.REFUSED, error=f"This chart is not shown: {reason}"),
        scores=score(None, chart.record),
        format=0.0,
    )
    return Trajectory(chart, number, (), (turn,) * turns)


def _without_patches(trajectory: Trajectory) -> Trajectory:
    """A trajectory that is kept and not learnt from: patches are most of its memory."""
    pieces = tuple(dataclasses.replace(piece, images=()) for piece in trajectory.pieces)
    return dataclasses.replace(trajectory, pieces=pieces)

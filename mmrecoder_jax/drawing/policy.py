"""A policy of ours as an author: decoded by this process, on its devices."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from mmrecoder_jax.data.batching import Piece
from mmrecoder_jax.data.sources import Chart, RandomAccess
from mmrecoder_jax.drawing.authors import Answered, NotShown, Told, check_samples
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.rl.conversations import Group, Talk
from mmrecoder_jax.rl.judge.base import Judge
from mmrecoder_jax.rl.rollout import (
    Environment,
    RolloutEngine,
    answer_batches,
    refused_trajectory,
)
from mmrecoder_jax.rl.trajectory import Turn
from mmrecoder_jax.stage import Stage


class PolicyAuthor:
    """The policy `params` of a stage.

    Args:
      judge: judges every render; its verdicts are in the turns.
      batch_size: trajectories at one time.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        params: Any,
        env: Environment,
        judge: Judge | None = None,
        batch_size: int = 16,
    ):
        self.name, self.stage, self.params, self.env = name, stage, params, env
        self._judge, self._batch_size = judge, batch_size
        self._remembered: int = stage.config.eval.remembered
        self._engines: dict[float, RolloutEngine] = {}

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
        """See `authors.Author`."""
        check_samples(samples, temperature)
        batches = answer_batches(
            self.engine(temperature),
            self.params,
            charts,
            jax.random.key(seed),
            turns=turns,
            batch_size=max(1, self._batch_size // samples),
            group=samples,
            numbers=numbers,
            remembered=self._remembered,
        )
        for batch in batches:
            seen: collections.Counter[int] = collections.Counter()
            for number, trajectory in batch.own:
                yield number, seen[number], trajectory
                seen[number] += 1
            if distributed.is_main():
                for number, reason in batch.refused.items():
                    refused = refused_trajectory(charts[number], number, reason, turns)
                    yield from ((number, sample, refused) for sample in range(samples))

    def next(
        self,
        chart: Chart,
        before: Sequence[Turn],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        told: Told | None = None,
    ) -> Turn:
        """See `authors.Author`."""
        engine = self.engine(temperature)
        forgotten = max(0, len(before) - self._remembered) if self._remembered else 0
        recent = before[forgotten:]
        turns = len(recent) + 1
        reason = engine.refusal(chart, turns)
        if reason:
            raise NotShown(reason)
        pieces, most = [engine.prompt(chart)], engine.sampler.spec.response_length
        for number, turn in enumerate(recent, 1):
            ids = turn.ids if len(turn.ids) else engine.processor.response(turn.text)
            if len(ids) > most:
                raise NotShown(
                    f"turn {forgotten + number} has {len(ids)} tokens, and this author reads "
                    f"{most}: shorten it"
                )
            shown = dataclasses.replace(turn, execution=engine.shown(turn.execution, chart))
            pieces += [Piece(ids, number), engine.feedback(shown, chart)]
        group = Group(chart, 0, size=1, parts_at=1, prompt=pieces[0], parted=True)
        talk = Talk(group, 0, pieces, list(recent))
        if told is not None:
            talk.heard = lambda ids: told(engine.processor.decode(ids))
        group.talks = [talk]
        key = jax.random.key(seed)
        if forgotten:
            key = jax.random.fold_in(key, len(before))
        engine.run(self.params, [group], key, turns=turns)
        return talk.turns[-1]

    def engine(self, temperature: float) -> RolloutEngine:
        """Sampler and environment at one temperature; what it has compiled is kept."""
        if temperature not in self._engines:
            self._engines[temperature] = self.stage.engine(self.env, temperature, self._judge)
        return self._engines[temperature]

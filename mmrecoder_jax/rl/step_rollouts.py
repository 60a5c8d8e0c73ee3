"""The rollouts that each step of a stage is trained on.

By default a step's rollouts are drawn whole, with the policy that the step then changes. Two
options give that up, for speed:

    rl.ahead = k     the rollouts of step s + k are drawn beside the update of step s:

                     k = 0   draw 1, update 1, draw 2, update 2, ...
                     k = 1   draw 1, draw 2 + update 1, draw 3 + update 2, ...

    rl.partial = n   a response that has written n tokens rests, and with it its group; both go on
                     in the next step's rollouts, with the policy of that step

What a step is trained on was then written by older policies, which the loss corrects for by
truncated importance weights (`rl.losses`). Both options stop before a checkpoint: nothing is drawn
beyond the step that a checkpoint follows, and no response rests across it. So a checkpoint holds
all there is, and a resumed run draws what an uninterrupted one would have drawn.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from mmrecoder_jax.data.sources import Chart
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.models.trees import Chosen
from mmrecoder_jax.rl.conversations import Group
from mmrecoder_jax.rl.policy import copy_of_trained
from mmrecoder_jax.rl.rollout import trajectories
from mmrecoder_jax.rl.schedule import Phases, Size, Stats
from mmrecoder_jax.rl.trajectory import Mode, Origin, Trajectory


def is_off_policy(config: ConfigDict) -> bool:
    """Whether a step may be trained on what another policy wrote: an older one, or what a server's
    rounding makes of today's.
    """
    return bool(config.rl.ahead or config.rl.partial) or config.engine.kind != "sampler"


@runtime_checkable
class Engine(Protocol):
    """What draws conversations (`rl.rollout.RolloutEngine`)."""

    @property
    def stats(self) -> Any:
        """`Stats` of the last run."""
        ...

    def begun(
        self, charts: Sequence[Chart], uids: Sequence[int], *, mode: Mode, group: int, turns: int
    ) -> Sequence[Group]:
        """Groups of conversations about charts, of which nothing is written yet."""
        ...

    def run(
        self,
        params: Any,
        groups: Sequence[Group],
        key: jax.Array,
        *,
        turns: int,
        size: Size,
        progress: Phases,
        budget: int,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        """Goes on with groups of conversations until all are done, or rest."""
        ...


@runtime_checkable
class Course(Phases, Protocol):
    """What the rollouts need of the loop (`loop.Loop`)."""

    @property
    def params(self) -> Any:
        """The policy after the last update."""
        ...

    @property
    def progress(self) -> Phases: ...

    def key(self, step: int) -> jax.Array:
        """The key that every random number of a step comes from."""
        ...

    def next_save(self, step: int) -> int:
        """The first step from this one on that a checkpoint follows."""
        ...


@dataclasses.dataclass(frozen=True)
class StepRollouts:
    """What one step is trained on.

    Attributes:
      groups: `[P'][G]` of this host; P' is its share of the prompts, or less where groups rest.
      numbers: of the groups among those of all hosts; they decide the order in what is written.
      metrics: of the rollouts, without those of what the trajectories are worth.
      origins: of the groups.
    """

    groups: list[list[Trajectory]]
    numbers: Int[np.ndarray, " P"]
    metrics: dict[str, float]
    origins: tuple[Origin, ...]

    def with_others(self, places: Sequence[int], others: Self) -> Self:
        """With other groups in some places, which it counts (`rollout/resampled`, of all hosts)."""
        groups, origins = list(self.groups), list(self.origins)
        for place, group, origin in zip(places, others.groups, others.origins, strict=True):
            groups[place], origins[place] = group, origin
        before = self.metrics.get("rollout/resampled", 0.0)
        count = float(distributed.global_sum(np.array([len(places)]))[0])
        metrics = self.metrics | {"rollout/resampled": before + count}
        return dataclasses.replace(self, groups=groups, origins=tuple(origins), metrics=metrics)


@dataclasses.dataclass
class _Slot:
    """A place for a group of a step.

    Attributes:
      group: None where it is free.
      policy: the update after which its first tokens were written.
    """

    group: Group | None = None
    policy: int = 0


class Rollouts:
    """Draws the rollouts of a stage's steps, in order.

    Args:
      engine: draws them.
      rl: `config.rl`.
      prompts: of a step, on this host.
      charts: gives the next charts, as many as it is asked for; all hosts call it together.
      trained: chooses the parameters that updates change.
      mesh: sizes of the axes of the devices' mesh, as trajectories note them.
    """

    def __init__(
        self,
        engine: Engine,
        rl: ConfigDict,
        mode: Mode,
        prompts: int,
        charts: Callable[[int], Sequence[Chart]],
        course: Course,
        trained: Chosen,
        mesh: tuple[int, ...],
    ):
        self._engine, self._rl, self._mode, self._charts = engine, rl, mode, charts
        self._course, self._trained, self._mesh = course, trained, mesh
        self._slots = [_Slot() for _ in range(prompts)]
        self._uids = distributed.own_numbers(prompts)  # alike for any number of hosts
        self._drawn: collections.deque[StepRollouts] = collections.deque()
        self._last: int | None = None  # step whose rollouts were drawn last
        self._updated = 0  # step whose update was taken last

    def of(self, step: int) -> StepRollouts:
        """The rollouts of a step, which may have been drawn ahead."""
        if self._last is None:
            self._last, self._updated = step - 1, step - 1
        while self._last < max(step, min(step + self._rl.ahead - 1, self._course.next_save(step))):
            self._draw(self._last + 1)
        found = self._drawn.popleft()
        policy = found.metrics.pop("policy")
        return dataclasses.replace(
            found, metrics=found.metrics | {"rollout/staleness": step - 1 - policy}
        )

    def beside(self, step: int, update: Callable[[], None]) -> None:
        """Takes a step's update, beside the rollouts of a later step where there are any."""
        assert self._last is not None
        if self._last < min(step + self._rl.ahead, self._course.next_save(step)):
            self._draw(self._last + 1, update)
        else:
            update()
        self._updated = step

    def again(self, step: int, attempt: int, places: Sequence[int]) -> StepRollouts | None:
        """Groups about the next charts in some places of a step's, by the same policy; None where
        no host wants any.

        Args:
          attempt: from 1 on; each draws other tokens.
          places: of this host, in its `StepRollouts.groups`.
        """
        if not distributed.global_max(np.array([len(places)]))[0]:
            return None
        groups = self._begun(places)
        key = jax.random.fold_in(self._course.key(step), attempt)
        self._run(self._course.params, groups, key)
        policies, words = (self._updated, self._updated), _words(key)
        origins = tuple(Origin(group.uid, policies, words, self._mesh) for group in groups)
        found = [trajectories(group) for group in groups]
        stats = self._engine.stats.metrics()
        return StepRollouts(found, self._uids[list(places)], stats, origins)

    def _begun(self, places: Sequence[int]) -> Sequence[Group]:
        """Groups about the next charts, one for each place."""
        rl, uids = self._rl, self._uids[list(places)].tolist()
        with self._course.progress.phase("data"):
            return self._engine.begun(
                self._charts(len(uids)), uids, mode=self._mode, group=rl.group, turns=rl.turns
            )

    def _run(
        self,
        params: Any,
        groups: Sequence[Group],
        key: jax.Array,
        budget: int = 0,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        rl = self._rl
        self._engine.run(
            params,
            groups,
            key,
            turns=rl.turns,
            size=Size(prompts=rl.rollout_prompts, rows=rl.rows),
            progress=self._course.progress,
            budget=budget,
            meanwhile=meanwhile,
        )

    def _draw(self, step: int, meanwhile: Callable[[], None] | None = None) -> None:
        course, rl = self._course, self._rl
        # The update consumes the parameters that it changes.
        keep = meanwhile is not None
        params = copy_of_trained(course.params, self._trained) if keep else course.params
        free = [i for i, slot in enumerate(self._slots) if slot.group is None]
        begun = self._begun(free)
        for i, group in zip(free, begun, strict=True):
            self._slots[i] = _Slot(group, self._updated)
        stats = Stats()

        def run(groups: Sequence[Group], budget: int, work: Callable[[], None] | None) -> None:
            self._run(params, groups, course.key(step), budget, work)
            stats.add(self._engine.stats)

        groups = [slot.group for slot in self._slots if slot.group is not None]
        run(groups, 0 if step == course.next_save(step) else rl.partial, meanwhile)
        # Each host has something to train on.
        alone = all(group.rests for group in groups)
        if distributed.global_max(np.array([alone]))[0]:
            run(groups if alone else [], 0, None)
        self._take(step, stats)

    def _take(self, step: int, stats: Stats) -> None:
        """Takes what is finished out of its places."""
        done = [i for i, slot in enumerate(self._slots) if slot.group and not slot.group.rests]
        policies = np.array([[self._slots[i].policy, 1] for i in done], float).sum(axis=0)
        age, count = distributed.global_sum(policies)
        metrics = stats.metrics() | {"policy": float(age / count)}
        if self._rl.partial:
            resting = distributed.global_sum(np.array([len(self._slots) - len(done)]))
            metrics["rollout/resting"] = float(resting[0])
        key = _words(self._course.key(step))
        found, origins = [], []
        for i in done:
            slot = self._slots[i]
            assert slot.group is not None
            found.append(trajectories(slot.group))
            written = slot.policy, self._updated
            origins.append(Origin(slot.group.uid, written, key, self._mesh))
            self._slots[i] = _Slot()
        drawn = StepRollouts(found, self._uids[done], metrics, tuple(origins))
        self._drawn.append(drawn)
        self._last = step


def _words(key: jax.Array) -> tuple[int, ...]:
    """A key as a trajectory notes it."""
    return tuple(np.asarray(jax.random.key_data(key)).tolist())

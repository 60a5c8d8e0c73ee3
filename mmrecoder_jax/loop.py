"""What the supervised loop and the GRPO loop share: a state that resumes, updates, and their log.

    with Loop(stage, loss, iterator, steps) as loop:
        for step in loop.steps():                   from the newest checkpoint on
            with loop.phase("data"): ...            time is booked on phases
            metrics = loop.update(batch)
            loop.finish(step, metrics, shown=...)   checkpoint, progress line, metrics row

An update whose loss or gradients are not finite changes nothing (`learner.update`); it is counted
in the metric `skipped`. After `optim.max_skipped` of them in a row the run ends with an error, and
no checkpoint is written while they last, so the newest one is from before the first.

A checkpoint holds parameters, optimizer, random key and the data iterator, so a resumed run takes
the steps that an uninterrupted one would have taken. It also notes the run's settings, data and
first weights, which a resumed run must share (`resume`). A step's row of metrics is written before
its checkpoint: killed between the two, the step is taken again and its row replaced.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import grain
import jax
import numpy as np
from jaxtyping import Float

from mmrecoder_jax import places, resume
from mmrecoder_jax.config import ConfigError, Preempted, derived_seed
from mmrecoder_jax.images import decode
from mmrecoder_jax.learner import distributed, preemption
from mmrecoder_jax.learner.checkpoint import Checkpoints
from mmrecoder_jax.learner.init import source_digest
from mmrecoder_jax.learner.update import (
    LossFn,
    TrainState,
    Update,
    from_params,
    make_optimizer,
    reference_of,
    usable,
    with_reference,
)
from mmrecoder_jax.monitoring import measured
from mmrecoder_jax.monitoring.alarms import ALARMS_FILE, Alarms
from mmrecoder_jax.monitoring.compilations import Compilations
from mmrecoder_jax.monitoring.metrics import MetricsWriter, Sample, read_metrics
from mmrecoder_jax.monitoring.profile import Profile
from mmrecoder_jax.monitoring.progress import Progress
from mmrecoder_jax.monitoring.rows import RowFile
from mmrecoder_jax.rl.policy import copy_of_trained
from mmrecoder_jax.rl.trajectory import Trajectory
from mmrecoder_jax.stage import Stage

SHOWN_TRAJECTORIES = 8  # of a step, in TensorBoard and wandb


class Loop:
    """The state of one training stage; a context manager.

    Args:
      loss: `(params, micro_batch) -> (loss, metrics)`.
      iterator: of the data; its state is part of the checkpoint.
      steps: at which the stage ends.
      updates_per_step: optimizer steps per step.
      keep_reference: also keep a reference policy: the one that the stage started from.
      reference_every: steps after which the policy takes its place; 0: it stays.
      data: digests of what is learnt from, by the field that names it.

    Attributes:
      state: parameters, optimizer and random key after the last update.
      reference: the policy that divergences are measured from, or None.
      progress: phases and lines of progress.
    """

    def __init__(
        self,
        stage: Stage,
        loss: LossFn,
        iterator: grain.DatasetIterator,
        steps: int,
        updates_per_step: int = 1,
        keep_reference: bool = False,
        reference_every: int = 0,
        data: Mapping[str, str] | None = None,
        limits: Mapping[str, float] | None = None,
    ):
        self._stage, self._iterator, self._steps = stage, iterator, steps
        self._updates_per_step = updates_per_step
        self._keep_reference, self._reference_every = keep_reference, reference_every
        self._tx, schedule = make_optimizer(stage.config.optim, steps * updates_per_step)
        self._note = resume.note_of(stage.config, data or {})
        self._update = Update(
            *(loss, self._tx, schedule, stage.mesh, stage.trained, limits or {}),
            rounding=stage.config.optim.rounding,
        )
        self._exits = contextlib.ExitStack()
        self._ahead: Future[None] | None = None
        self._skipped_in_row = 0  # updates
        self._save_due = False
        self._alarms: Alarms | None = None
        self.state: TrainState
        self.reference: Any = None

    def __enter__(self) -> Self:
        stage, config = self._stage, self._stage.config
        with contextlib.ExitStack() as exits:
            exits.enter_context(preemption.training())  # to the end of the last save
            self._checkpoints = exits.enter_context(
                Checkpoints(
                    stage.workdir,
                    config.checkpoint.keep,
                    stage.saved,
                    every=config.checkpoint.keep_every * self._updates_per_step,
                    goal=measured.Goal.of(config.checkpoint.best),
                )
            )
            self._compare_with_saved()
            stage.write_config()
            log = config.log
            if distributed.is_main():
                self._writer = exits.enter_context(
                    MetricsWriter(stage.workdir, log.tensorboard, log.wandb, config.to_dict())
                )
            self._beside = exits.enter_context(ThreadPoolExecutor(1, "compilations"))
            self._start()
            if "alarms" in config and distributed.is_main():
                self._alarms = self._begin_alarms(exits)
            self._profile = exits.enter_context(Profile(stage.workdir, distributed.is_main()))
            self.progress = exits.enter_context(
                Progress(
                    config.stage,
                    self._steps,
                    config.train.log_every,
                    start_step=self._first - 1,
                    annotate=self._profile.annotate,
                )
            )
            self._compilations = exits.enter_context(Compilations(lambda: self.progress.open_phase))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exits.__exit__(*exc)

    def _compare_with_saved(self) -> None:
        """Raises ConfigError where this run may not go on with what the work directory holds."""
        config = self._stage.config
        if config.init_from:
            self._note["digests"]["init_from"] = source_digest(config.init_from)
        found = self._checkpoints.note()
        if found is None or "run" not in found[1]:  # of a version that kept no note
            return
        step, note = found
        where = os.path.join(self._stage.workdir, "checkpoints", str(step))
        if said := resume.compare(note["run"], self._note, where, config.checkpoint.accept_changes):
            self._say(said)
        schedule = config.optim.schedule
        if note["steps"] != self._steps:
            self._say(
                f"{where} is of a run of {note['steps']} steps, now there are {self._steps}"
                + ("" if schedule == "constant" else f": so the {schedule} schedule differs")
            )

    @staticmethod
    def _say(message: str) -> None:
        if distributed.is_main():
            print(places.shown(message), flush=True)

    def _start(self) -> None:
        """The newest saved state, else a fresh one around the initial policy."""
        stage = self._stage
        initial = stage.initial_params()
        if self._keep_reference:
            self.reference = copy_of_trained(initial, stage.trained)
        seed = derived_seed(stage.config, "sampling")
        fresh = from_params(initial, self._tx, stage.mesh, seed, stage.trained)
        del initial  # or it would be held in memory beside the state
        if self._reference_every:  # what changes is part of the state
            fresh = with_reference(fresh, self.reference, stage.trained)
        restored, damages = self._checkpoints.restore(fresh, self._iterator)
        self.state = restored or fresh
        if self._reference_every:
            self.reference = reference_of(self.state)
        for damage in damages:
            self._say(damage)
        done = int(self.state.step) // self._updates_per_step
        self._first = done + 1
        if distributed.is_main():
            self._writer.rewind(stage.config.stage, done)

    def _follow(self) -> None:
        """Puts today's policy in the place of the reference."""
        self.reference = None  # before the copy: the devices need not hold both
        self.state = self.state.replace(reference=None)
        trained = self._stage.trained
        self.reference = copy_of_trained(self.params, trained)
        self.state = with_reference(self.state, self.reference, trained)

    def _begin_alarms(self, exits: contextlib.ExitStack) -> Alarms:
        """The alarms of the stage, as they were after the step that it goes on from."""
        config = self._stage.config
        file = RowFile(os.path.join(self._stage.workdir, ALARMS_FILE))
        exits.callback(file.close)
        file.rewind(config.stage, self._first - 1)
        alarms = Alarms(config.stage, config.alarms.to_dict(), file, self._say)
        alarms.resume(read_metrics(self._writer.path))
        return alarms

    def steps(self) -> Iterator[int]:
        """Numbers of the steps that are left; the first of a fresh run is 1."""
        for step in range(self._first, self._steps + 1):
            with self._profile.step(step):
                yield step

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Books the time inside on this phase."""
        return self.progress.phase(name)

    def key(self, step: int) -> jax.Array:
        """The key that every random number of a step comes from."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.state.rng), step)

    @property
    def params(self) -> Any:
        """The policy after the last update."""
        return self.state.params

    @property
    def usable(self) -> Any:
        """The policy that is evaluated and handed on (`learner.update.usable`)."""
        return usable(self.state)

    def next_save(self, step: int) -> int:
        """The first step from this one on that a checkpoint follows, if no update is skipped."""
        config = self._stage.config
        intervals = [config.checkpoint.every, config.checkpoint.keep_every]
        if config.checkpoint.best:  # any evaluation may be the best
            intervals.append(measured.every(config))
        nexts = [-(-step // every) * every for every in intervals if every]
        return step if self._save_due else min(*nexts, self._steps)

    def compile_ahead(self, micro: dict[str, np.ndarray], micro_batches: int) -> None:
        """Begins to compile the update, beside what comes before the first one.

        Updates by micro-batches of other sizes compile their own programs when they come, and so do
        all where these cannot be compiled. Several hosts compile nothing ahead: they must do so in
        one order.

        Args:
          micro: a micro-batch as large as those that are expected.
        """
        if jax.process_count() == 1:
            self._ahead = self._beside.submit(
                self._update.compile, self.state, micro, micro_batches
            )

    def update(self, *batches: dict[str, np.ndarray]) -> dict[str, float]:
        """Takes the step's optimizer steps on this host's rows `[M, B, ...]`: mini-batches in turn.

        Returns:
          The last one's metrics, and how many of them were `skipped`.

        Raises:
          ConfigError: `optim.max_skipped` updates in a row were skipped.
        """
        self._wait_for_compilations()
        metrics: dict[str, float] = {}
        skipped = 0
        for number in range(self._updates_per_step):
            self.state, found = self._update(self.state, batches[number % len(batches)])
            metrics = {name: float(value) for name, value in found.items()}
            skipped += bool(metrics["skipped"])
            self._count_skipped(bool(metrics["skipped"]))
        return metrics | {"skipped": float(skipped)}

    def _wait_for_compilations(self) -> None:
        if self._ahead is None:
            return
        try:
            self._ahead.result()
        except jax.errors.JaxRuntimeError as error:  # such as no memory for the largest bucket
            self._say(f"the update could not be compiled ahead: {error}")
        self._ahead = None

    def _count_skipped(self, skipped: bool) -> None:
        self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
        # A short stage must not end well where it never took a step.
        limit = min(self._stage.config.optim.max_skipped, self._steps * self._updates_per_step)
        if self._skipped_in_row >= limit:
            raise ConfigError(
                f"{self._skipped_in_row} updates in a row were skipped, because the loss or a "
                f"gradient was not finite{self._or_above()} (optim.max_skipped="
                f"{self._stage.config.optim.max_skipped}): the newest checkpoint is from before "
                "the first of them. Try a lower optim.lr, --config.model.attention=xla, or "
                "model.dtype=float32; --selfcheck compares the attention kernels"
            )

    def _or_above(self) -> str:
        rl = self._stage.config.get("rl", {})
        if "max_logp_gap" not in rl:
            return ""
        return f", or logp_gap was above rl.max_logp_gap={rl.max_logp_gap} (see metrics.jsonl)"

    def show(
        self,
        step: int,
        rows: Sequence[tuple[Trajectory, Float[np.ndarray, " T"], float]],
    ) -> None:
        """Gives some trajectories with their rewards and advantages to whoever shows metrics."""
        if distributed.is_main() and self._writer.shows_pictures:
            samples = [_sample(*row) for row in rows[:SHOWN_TRAJECTORIES]]
            self._writer.show(step, self._stage.config.stage, samples)

    def finish(self, step: int, metrics: Mapping[str, float], shown: Sequence[str]) -> None:
        """Ends a step: alarms, progress line, the row of metrics, and where they are due a new
        reference and a checkpoint.

        A checkpoint is due every so many steps, and where an evaluation is the best so far. One
        that falls due while updates are skipped waits for the next one that is taken.
        The last step is always saved: its parameters are those of the last update that was taken.

        Args:
          shown: metrics on the progress line, where they are there; `skipped` is always shown.

        Raises:
          Preempted: the process was told to end; this step is saved, where it can be.
        """
        config = self._stage.config
        values = {name: metrics[name] for name in shown if name in metrics}
        skipped = metrics["skipped"]
        if skipped:  # or the means of the whole interval would be NaN
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        ringing = []
        if self._alarms is not None:  # the main host's
            ringing = self._alarms.observe(step, metrics)
            metrics = {**metrics, "alarms": len(ringing)}
        alarms = {alarm.name: str(alarm) for alarm in ringing}
        timing = self.progress.step(step, values, skipped=int(skipped), alarms=alarms)
        compiled = self._compilations.taken()
        if distributed.is_main():
            self._writer.write(step, config.stage, {**metrics, **timing, **compiled})
        places.push(self._stage.workdir, wait=False)
        if self._reference_every and step % self._reference_every == 0:
            self._follow()
        self._save_due |= step % config.checkpoint.every == 0
        keep_every = config.checkpoint.keep_every
        self._save_due |= bool(keep_every) and step % keep_every == 0
        found = {name: metrics[name] for name in measured.names_of(config) if name in metrics}
        # Of parameters that are saved later, nothing would have been measured.
        better = not self._skipped_in_row and self._checkpoints.is_better(found)
        self._save_due |= distributed.main_says(better) if found else False
        asked = preemption.is_asked()
        due = self._save_due or (asked and self._draws_in_order)
        if saved := (due and not self._skipped_in_row) or step == self._steps:
            self._save_due = False
            with self.phase("save"):
                note = {"stage": config.stage, "step": step, "steps": self._steps}
                note |= {"run": self._note}
                self._checkpoints.save(self.state, self._iterator, note, found)
        if asked:
            where = f"step {step}, which is saved" if saved else "the newest checkpoint"
            raise Preempted(f"the same command goes on from {where} in {self._stage.workdir}")

    @property
    def _draws_in_order(self) -> bool:
        """Whether nothing of a later step is drawn yet, so that any step can be saved."""
        rl = self._stage.config.get("rl", {})
        return not (rl.get("ahead", 0) or rl.get("partial", 0))


def _sample(trajectory: Trajectory, rewards: Float[np.ndarray, " T"], advantage: float) -> Sample:
    """A trajectory as TensorBoard and wandb are shown it."""
    values: dict[str, float | str] = {"chart": trajectory.chart.id, "advantage": advantage}
    for number, (turn, reward) in enumerate(zip(trajectory.turns, rewards, strict=True), 1):
        values[f"turn {number} status"] = str(turn.execution.status)
        values[f"turn {number} reward"] = float(reward)
        values[f"turn {number} response"] = turn.text
    renders = [turn.execution.image for turn in trajectory.turns]
    return Sample(values, np.asarray(decode(trajectory.chart.image)), renders)


def padding(*batches: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`padding/update`: the share of the token slots of batches, over all hosts, without a token.

    Args:
      batches: this host's arrays (`data.batching`).
    """
    own = [(batch["home"] >= 0).sum() for batch in batches], [x["home"].size for x in batches]
    tokens, slots = distributed.global_sum(np.sum(own, axis=1))
    return {"padding/update": float(1 - tokens / slots)}

"""Checkpoints: parameters, optimizer, step, random key, data iterator and a note in one orbax step.

A step is saved as a whole or not at all. A work directory is

    config.json   tokenizer/   checkpoints/<step>/{params,learner,data,meta}    [reference]

What comes later may damage one: a full disk, half a copy, a flipped bit. The note holds a checksum
of every array (`checksums`) and digests of the hosts' places in the data, which are compared with
what was read. A stage that resumes goes back to the newest checkpoint that can be read, and moves
those after it to `checkpoints/damaged-<step>`.

The newest stay on disk, and beside them those that are kept for good and the best by a metric on
held-out charts (`goal`). The note of a checkpoint holds what was measured at its step, so that a
resumed run remembers its best, and one whose goal is another finds the best of what is there.

Parameters are an item of their own, so the next stage (`init_from`) reads them without the
optimizer, on any mesh. Where an average of them is kept (`optim.ema`) it stands in their place, and
what is trained is with the learner. With adapters (`config.lora`) they are the adapters alone.

Of a reference policy that moves (`rl.reference_every`) what is trained is an item of its own too.
One that stays is the policy of `init_from`, and no checkpoint holds it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from mmrecoder_jax import places
from mmrecoder_jax.config import ConfigError, work_directory
from mmrecoder_jax.learner import distributed, positions
from mmrecoder_jax.learner.checksums import changed, checksums
from mmrecoder_jax.learner.update import TrainState, average_of, usable
from mmrecoder_jax.models.files import CheckpointError
from mmrecoder_jax.models.trees import Chosen, everything, join, pick, split
from mmrecoder_jax.monitoring.measured import Goal


class DamagedCheckpoint(CheckpointError):
    """No checkpoint can be read; the message names the directory and the first reason."""


class Checkpoints:
    """Saves and restores the state of one stage; a context manager, whose end waits for a save.

    Args:
      workdir: the work directory of the stage.
      keep: how many of the newest checkpoints are kept.
      saved: chooses the parameters that a checkpoint holds. A resumed stage reads the others where
        it first read them.
      every: updates between checkpoints that stay for good; 0: none does.
      goal: the best checkpoint by it stays too; ties go to the first.
    """

    def __init__(
        self,
        workdir: str,
        keep: int,
        saved: Chosen = everything,
        *,
        every: int = 0,
        goal: Goal = Goal(),  # noqa: B008 - it is frozen
    ):
        self._saved, self._workdir, self._goal = saved, workdir, goal
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep), _Best(self)]
        if every:
            kept.append(policies.EveryNSteps(every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            create=True,
            enable_async_checkpointing=True,
        )
        self._remember()
        with self._saving(places.checkpoints(workdir)):
            self._manager = ocp.CheckpointManager(places.checkpoints(workdir), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._saving(self._manager.directory):
            self._manager.wait_until_finished()
            self._manager.close()

    @property
    def best(self) -> int | None:
        """The best checkpoint by the goal; None where there is none."""
        return self._best[0] if self._best else None

    def is_better(self, measured: Mapping[str, float]) -> bool:
        """Whether what was measured is better than at the best checkpoint, or the first."""
        worth = self._goal.worth(measured)
        return worth is not None and (self._best is None or worth > self._best[1])

    def _remember(self) -> None:
        """Finds the best of the checkpoints that are there; the main host looks, for all."""
        found = _best_of(self._workdir, self._goal) if distributed.is_main() else None
        best = distributed.gather_json(found)[0]
        self._best: tuple[int, float] | None = None if best is None else (best[0], best[1])

    def save(
        self,
        state: TrainState[jax.Array],
        iterator: grain.DatasetIterator,
        meta: dict[str, Any],
        measured: Mapping[str, float] | None = None,
    ) -> None:
        """Saves at `state.step`; returns once the arrays are copied, a thread writes them.

        Args:
          meta: the note.
          measured: metrics of these parameters on held-out charts.

        Raises:
          CheckpointError: this checkpoint cannot be written, or the one before could not.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        measured = measured or {}
        sums = {"checksums": self._checksums(state), "positions": _positions(iterator)}
        sums["measured"] = dict(measured)
        if self.is_better(measured):
            self._best = step, self._goal.worth(measured) or 0.0
        places.push(self._workdir)  # before the checkpoint is there: all that belongs to its step
        with self._saving(self._manager.directory):
            items = {name: ocp.args.StandardSave(x) for name, x in self._items(state).items()}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **items,
                    data=grain.checkpoint.CheckpointSave(iterator),
                    meta=ocp.args.JsonSave(meta | sums),
                ),
            )

    @staticmethod
    @contextlib.contextmanager
    def _saving(directory: epath.Path) -> Iterator[None]:
        """Around what a save may fail in, this one or the one before, which a thread wrote."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, (OSError, ValueError, *places.errors())):
                raise  # of no library of checkpoints or buckets
            raise CheckpointError(
                f"a checkpoint cannot be written below {directory} "
                f"({distributed.first_line(error)}): free space, or give this user its rights, and "
                "give the same command again; it goes on from the newest checkpoint there"
            ) from error

    def note(self) -> tuple[int, dict[str, Any]] | None:
        """(step, note) of the newest checkpoint whose note can be read; None where there is none.

        Nothing else of a checkpoint is read.
        """
        for step in self._newest_first():
            with contextlib.suppress(Exception):  # orbax, tensorstore and JSON have their own
                args = ocp.args.Composite(meta=ocp.args.JsonRestore())
                return step, self._manager.restore(step, args=args).meta
        return None

    def restore(
        self, state: TrainState[jax.Array], iterator: grain.DatasetIterator
    ) -> tuple[TrainState[jax.Array] | None, list[str]]:
        """The newest state that can be read, sharded like `state`; what is said of damaged ones.

        The state is None if nothing was saved. `iterator` is moved to where it was.

        Raises:
          DamagedCheckpoint: there are checkpoints, and none can be read.
          ConfigError: this many hosts cannot go on from the newest (`positions.move`).
        """
        failures: dict[int, str] = {}
        for step in self._newest_first():
            found, failure = None, ""
            note: dict[str, Any] = {}
            try:
                found, note = self._restore(step, state, iterator)
            except ConfigError:
                raise
            except Exception as error:  # orbax, tensorstore, grain and JSON have their own
                failure = distributed.first_line(error)
            # Hosts go on from one step: where one cannot read it, none takes it.
            reason = next(filter(None, distributed.gather_texts(failure)), "")
            if found is not None and not reason:
                reason = self._unlike(note, found)
            if not reason:
                return found, [self._set_aside(*failed, step) for failed in failures.items()]
            failures[step] = reason
        if failures:
            step, newest = next(iter(failures.items()))
            raise DamagedCheckpoint(
                f"no checkpoint of {self._manager.directory} can be read; the newest, {step}: "
                f"{newest}. Remove {self._manager.directory / str(step)} and those before it to "
                "begin anew"
            )
        return None, []

    def _newest_first(self) -> list[int]:
        return sorted(self._manager.all_steps(), reverse=True)

    def _set_aside(self, step: int, reason: str, instead: int) -> str:
        """Gives a damaged checkpoint another name, so that its step can be saved again."""
        path = self._manager.directory / str(step)
        numbers = (f"damaged-{step}{suffix}" for suffix in ("", *(f"-{i}" for i in range(1, 100))))
        target = next(path.parent / name for name in numbers if not (path.parent / name).exists())
        with distributed.together():
            if distributed.is_main():
                places.rename_checkpoint(path, target)
        self._manager.reload()
        self._remember()
        return (
            f"{path} cannot be read ({reason}): going on from step {instead}; it is now "
            f"{target.name}"
        )

    def _restore(
        self, step: int, state: TrainState[jax.Array], iterator: grain.DatasetIterator
    ) -> tuple[TrainState[jax.Array], dict[str, Any]]:
        """A saved state and its note."""
        saved, others = split(state.params, self._saved)
        abstract = _abstract(state.replace(params=saved))
        items = {"params": abstract.params, "learner": _learner(abstract)}
        # A run whose reference stayed has saved none; it goes on from that of `init_from`.
        if state.reference is not None and self._has_reference(step):
            items["reference"] = abstract.reference
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(x) for name, x in items.items()},
                meta=ocp.args.JsonRestore(),
            ),
        )
        places = positions.saved(self._manager.directory / str(step) / "data")
        if restored.meta.get("positions", _digests(places)) != _digests(places):
            raise ValueError("the position in the data is not what was saved")
        positions.move(iterator, places, jax.process_index(), jax.process_count())
        learner = dict(restored.learner) | {"reference": restored.get("reference", state.reference)}
        params = join(join(others, restored.params), learner.pop("trained", {}))
        return state.replace(params=params, **learner), restored.meta

    def _has_reference(self, step: int) -> bool:
        return (self._manager.directory / str(step) / "reference").exists()

    def _items(self, state: TrainState[jax.Array]) -> dict[str, Any]:
        """The trees that a checkpoint holds, by item."""
        items = {"params": split(usable(state), self._saved)[0], "learner": _learner(state)}
        return items if state.reference is None else items | {"reference": state.reference}

    def _checksums(self, state: TrainState[jax.Array]) -> dict[str, dict[str, str]]:
        return {item: checksums(tree) for item, tree in self._items(state).items()}

    def _unlike(self, note: dict[str, Any], state: TrainState[jax.Array]) -> str:
        """What of a restored state is not what was saved; "" where all is. Hosts agree on it."""
        if "checksums" not in note:  # of a version that saved none
            return ""
        for item, now in self._checksums(state).items():
            # Of a run whose reference stayed there is no such item.
            for path in changed(note["checksums"].get(item, {}), now):
                return f"{item} {path} is not what was saved"
        return ""


@dataclasses.dataclass(frozen=True)
class _Best:
    """A preservation policy of orbax: the best checkpoint stays."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [info.step == self.checkpoints.best for info in checkpoints]


def _learner(state: TrainState[Any]) -> dict[str, Any]:
    """All of a state but its usable parameters: with an average of them, what is trained too."""
    found = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
    average = average_of(state.opt_state)
    return found if average is None else found | {"trained": pick(state.params, average)}


def _positions(iterator: grain.DatasetIterator) -> list[str]:
    """A digest of each host's place in the data."""
    return distributed.gather_texts(_digests([iterator.get_state()])[0])


def _digests(places: Sequence[positions.State]) -> list[str]:
    texts = (json.dumps(place, sort_keys=True, default=repr) for place in places)
    return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]


def kept_steps(workdir: str) -> list[int]:
    """The complete checkpoints of a work directory, oldest first."""
    return places.steps(workdir)


def latest_step(workdir: str) -> int | None:
    """The newest complete checkpoint of a work directory, or None."""
    return max(kept_steps(workdir), default=None)


def steps_done(workdir: str) -> tuple[int, int] | None:
    """(step, step that the stage ends with) of the newest checkpoint whose note can be read; None
    where there is none. The stage has finished where the two are one: its last step is always
    saved. Starts no device.
    """
    for step in reversed(kept_steps(workdir)):
        note = _note(workdir, step)
        with contextlib.suppress(KeyError, ValueError, TypeError):
            return int(note["step"]), int(note["steps"])
    return None


def best_step(workdir: str, goal: Goal) -> int | None:
    """The best checkpoint of a work directory, or None. Starts no device."""
    found = _best_of(workdir, goal)
    return None if found is None else found[0]


def split_source(source: str) -> tuple[str, int | None]:
    """(work directory, step) of `DIR@120` or `DIR@best`; the step is None for any other source, of
    which the newest checkpoint is meant.

    A path that exists is meant as it is, whatever is in its name.

    Raises:
      CheckpointError: the work directory has no such checkpoint; the message names those it has.
    """
    workdir = work_directory(source)
    if workdir == source:
        return source, None
    wanted = source[len(workdir) + 1 :]
    steps = kept_steps(workdir)
    there = f"{workdir} has checkpoints of steps {', '.join(map(str, steps))}"
    if not steps:
        raise CheckpointError(f"{source}: no checkpoint in {workdir}: has that stage been run?")
    if wanted == "best":
        goal = _goal_of(workdir)
        step = best_step(workdir, goal)
        if step is None:
            why = "was measured" if goal.name else "is named by checkpoint.best"
            raise CheckpointError(f"{source}: no metric {why} in that run; {there}: name one")
        return workdir, step
    if not (wanted.isascii() and wanted.isdigit()) or int(wanted) not in steps:
        raise CheckpointError(f"{source}: there is no such checkpoint; {there}, or @best")
    return workdir, int(wanted)


def _goal_of(workdir: str) -> Goal:
    """`checkpoint.best` of the run in a work directory."""
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError),
        open(os.path.join(workdir, "config.json"), encoding="utf-8") as f,
    ):
        return Goal.of(str(json.load(f)["checkpoint"]["best"]))
    return Goal()


def _best_of(workdir: str, goal: Goal) -> tuple[int, float] | None:
    """(step, worth) of the first of the best checkpoints whose notes can be read."""
    best: tuple[int, float] | None = None
    for step in kept_steps(workdir):
        with contextlib.suppress(TypeError, AttributeError):  # a note that is something else
            worth = goal.worth(_note(workdir, step).get("measured", {}))
            if worth is not None and (best is None or worth > best[1]):
                best = step, worth
    return best


def digests_of(workdir: str) -> dict[str, str]:
    """Digests of what the run of a work directory began with, by the field that names it; empty
    where no checkpoint says. Starts no device.
    """
    for step in reversed(kept_steps(workdir)):
        with contextlib.suppress(KeyError, TypeError):
            return dict(_note(workdir, step)["run"]["digests"])
    return {}


def _note(workdir: str, step: int) -> dict[str, Any]:
    """The note of a checkpoint; empty where it cannot be read."""
    path = places.checkpoints(workdir) / str(step) / "meta" / "metadata"
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(path.read_text(encoding="utf-8"))
        return note if isinstance(note, dict) else {}
    return {}


def load_params(workdir: str, abstract_params: Any, step: int | None = None) -> Any:
    """Parameters of a checkpoint, in the shapes, types and shards of `abstract_params`.

    Args:
      step: of the checkpoint; None: the newest, or the one that `DIR@best` names.

    Raises:
      CheckpointError: it names none (`split_source`).
      FileNotFoundError: the work directory has no checkpoint.
      DamagedCheckpoint: it cannot be read, or is not what was saved.
    """
    named = step is not None
    if step is None:
        workdir, step = split_source(workdir)
        named = step is not None
        step = latest_step(workdir) if step is None else step
    if step is None:
        raise FileNotFoundError(
            f"no checkpoint under {places.checkpoints(workdir)}: has that stage been run?"
        )
    path = places.checkpoints(workdir) / str(step)
    remedy = f"remove {path} to take the one before it"

    def restore() -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path / "params", abstract_params)

    return _read(path, "params", restore, _another(workdir, step) if named else remedy)


def load_trained(workdir: str, abstract_trained: Any, step: int) -> Any:
    """What a checkpoint's next update changes, where it holds an average in its place
    (`optim.ema`).

    Args:
      abstract_trained: the parameters that are trained alone.

    Raises:
      DamagedCheckpoint: it cannot be read, or is not what was saved.
    """
    path = places.checkpoints(workdir) / str(step)
    wanted = {"trained": abstract_trained}

    def restore() -> Any:  # without the optimizer's moments
        shards = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=shards, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path / "learner", args=args)

    return _read(path, "learner", restore, _another(workdir, step))["trained"]


def _another(workdir: str, step: int) -> str:
    others = [str(other) for other in kept_steps(workdir) if other != step]
    return f"name another step of {workdir}: {', '.join(others) or 'there is none'}"


def _read(path: epath.Path, item: str, restore: Callable[[], Any], remedy: str) -> Any:
    """Arrays of an item of a checkpoint, compared with its note.

    Raises:
      DamagedCheckpoint: they cannot be read, or are not what was saved; says the remedy.
    """
    try:
        found = restore()
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            note = checkpointer.restore(path / "meta")
    except Exception as error:
        reason = distributed.first_line(error)
        raise DamagedCheckpoint(f"{path} cannot be read ({reason}): {remedy}") from error
    saved = note.get("checksums", {}).get(item, {})
    if differing := changed(saved, checksums(found)):
        raise DamagedCheckpoint(f"{path}: {item} {differing[0]} is not what was saved: {remedy}")
    return found


def _abstract(tree: Any) -> Any:
    """The shapes, types and shards of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

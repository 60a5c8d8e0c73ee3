"""Checkpoints: parameters, optimizer, step, random key, data iterator and a note in one orbax step.

A step is saved as a whole or not at all. A work directory is

    config.json   tokenizer/   checkpoints/<step>/{params,learner,data,meta}

Parameters are an item of their own, so the next stage (`init_from`) reads them without the
optimizer, on any mesh. With adapters (`config.lora`) they are the adapters alone.
"""

import os
from typing import Any, Self

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from mmrecoder_jax.learner.update import TrainState
from mmrecoder_jax.models.trees import Chosen, everything, join, split


class Checkpoints:
    """Saves and restores the state of one stage; a context manager, whose end waits for a save.

    Args:
      workdir: the work directory of the stage.
      keep: how many of the newest checkpoints are kept.
      saved: chooses the parameters that a checkpoint holds. A resumed stage reads the others where
        it first read them.
    """

    def __init__(self, workdir: str, keep: int, saved: Chosen = everything):
        self._saved = saved
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            epath.Path(os.path.abspath(workdir)) / "checkpoints", options=options
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(
        self, state: TrainState[jax.Array], iterator: grain.DatasetIterator, meta: dict[str, Any]
    ) -> None:
        """Saves at `state.step`; returns once the arrays are copied, a thread writes them."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(split(state.params, self._saved)[0]),
                learner=ocp.args.StandardSave(
                    {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}
                ),
                data=grain.checkpoint.CheckpointSave(iterator),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(
        self, state: TrainState[jax.Array], iterator: grain.DatasetIterator
    ) -> TrainState[jax.Array] | None:
        """The newest saved state, sharded like `state`; None if nothing was saved.

        `iterator` is moved to where it was.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        saved, others = split(state.params, self._saved)
        abstract = _abstract(state.replace(params=saved))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                learner=ocp.args.StandardRestore(
                    {"step": abstract.step, "opt_state": abstract.opt_state, "rng": abstract.rng}
                ),
                data=grain.checkpoint.CheckpointRestore(iterator),
            ),
        )
        learner = restored.learner
        params = join(others, restored.params)
        return state.replace(
            params=params, step=learner["step"], opt_state=learner["opt_state"], rng=learner["rng"]
        )


def latest_step(workdir: str) -> int | None:
    """The newest complete checkpoint of a work directory, or None."""
    path = epath.Path(os.path.abspath(workdir)) / "checkpoints"
    if not path.exists():
        return None
    # orbax gives an unfinished step another name, which is not a number
    steps = [int(p.name) for p in path.iterdir() if p.name.isdigit()]
    return max(steps, default=None)


def load_params(workdir: str, abstract_params: Any) -> Any:
    """Parameters of the newest checkpoint, in the shapes, types and shards of `abstract_params`.

    Raises:
      FileNotFoundError: the work directory has no checkpoint.
    """
    step = latest_step(workdir)
    if step is None:
        raise FileNotFoundError(
            f"no checkpoint under {os.path.join(workdir, 'checkpoints')}: has that stage been run?"
        )
    path = epath.Path(os.path.abspath(workdir)) / "checkpoints" / str(step) / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract_params)


def _abstract(tree: Any) -> Any:
    """The shapes, types and shards of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

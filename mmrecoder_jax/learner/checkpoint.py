"""One orbax step = parameters, optimizer, step, random key, data iterator and a note; saved whole
or not at all.

A work directory is `config.json`, `tokenizer/` and `checkpoints/<step>/{params,learner,data,meta}`.
Parameters are an item of their own, so the next stage (`init_from`) reads them without the
optimizer, on any mesh. With adapters (`config.lora`) they are the adapters alone.
"""

import os
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from mmrecoder_jax.learner.update import TrainState
from mmrecoder_jax.models.trees import Chosen, everything, join, split


class Checkpoints:
    """Saves and restores the state of one stage. Use as a context manager: leaving it waits for a
    save under way.

    `saved` chooses the parameters that a checkpoint holds; the others a resumed stage reads where
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

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(
        self, state: TrainState, iterator: grain.DatasetIterator, meta: dict[str, Any]
    ) -> None:
        """Saves at `state.step`; returns once the arrays are copied, writing goes on behind."""
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

    def restore(self, state: TrainState, iterator: grain.DatasetIterator) -> TrainState | None:
        """The newest saved state in the shards of `state`, with `iterator` moved to where it was;
        None where nothing was saved.
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
    """The newest whole checkpoint of a work directory, or None."""
    path = epath.Path(os.path.abspath(workdir)) / "checkpoints"
    if not path.exists():
        return None
    steps = [int(p.name) for p in path.iterdir() if p.name.isdigit()]
    return max(steps, default=None)


def load_params(workdir: str, abstract_params: Any) -> Any:
    """Parameters of the newest checkpoint, in the shapes, types and shards of `abstract_params`.

    Raises FileNotFoundError where the work directory has none.
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
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

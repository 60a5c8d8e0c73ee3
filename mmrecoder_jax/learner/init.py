"""The policy that a stage starts from: random, a published checkpoint, or an earlier stage.

init_from                       weights                         adapters
""                              random                          fresh, where lora.rank > 0
a Hugging Face directory        read                            fresh, where lora.rank > 0
a work directory                its newest checkpoint           fresh, where lora.rank > 0
DIR@120, DIR@best               another checkpoint              as with the newest
a work directory with adapters  those below its adapters        carried on where rank, alpha and
                                                                targets agree, else merged
a PEFT directory                those that it names             the same
"""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmrecoder_jax import places
from mmrecoder_jax.config import (
    MODEL_SWITCHES,
    PUBLISHED,
    ConfigError,
    lora_config,
    naming,
    work_directory,
)
from mmrecoder_jax.learner import checkpoint, distributed
from mmrecoder_jax.models import adapters as peft
from mmrecoder_jax.models.config import LoraConfig, ModelConfig
from mmrecoder_jax.models.hub import local_directory
from mmrecoder_jax.models.lora import is_adapter, merge
from mmrecoder_jax.models.published import load_config
from mmrecoder_jax.models.qwen2_5_vl import init_params
from mmrecoder_jax.models.sharding import param_shardings
from mmrecoder_jax.models.trees import Chosen, join, split
from mmrecoder_jax.models.weights import load_pretrained

Params = Any
_PIECE_BYTES = 1 << 16  # of a file of weights, for its digest


def initial_params(config: ConfigDict, sizes: ModelConfig, mesh: Mesh) -> Params:
    """The policy of `config.init_from`, in its shards on the mesh; see the top of this module.

    Args:
      config: reads `init_from`, `seed` and `model.preset`.
      sizes: of the model, with the adapters that are wanted.

    Raises:
      ConfigError: weights of another size or that cannot be read, or adapters whose weights are not
        there.
    """
    source = _Source(config, sizes, mesh)
    base, adapters = source.read(config.init_from, sizes.lora)
    if not sizes.lora.rank:
        return base
    if adapters is None:
        adapters = source.random(sizes, adapters_only=True)
    return join(base, adapters)


def saved_adapters(config: ConfigDict, sizes: ModelConfig, mesh: Mesh) -> Params:
    """The adapters of the work directory `config.init_from`, without the weights below them.

    Args:
      sizes: of the model, with these adapters.
    """
    abstract = _Source(config, sizes, mesh).abstract(sizes)
    return checkpoint.load_params(config.init_from, split(abstract, is_adapter)[0])


def params_at(
    config: ConfigDict,
    sizes: ModelConfig,
    mesh: Mesh,
    workdir: str,
    step: int,
    trained: Chosen,
) -> Params:
    """The policy that a checkpoint of the stage itself goes on from: what the next step's rollouts
    are drawn with. Adapters stand above the weights of `config.init_from`, as while it trained;
    where an average is kept (`optim.ema`), what is trained stands in its place.

    Args:
      workdir: of the stage.
      step: of the checkpoint.
      trained: chooses the parameters that the stage trains.
    """
    source = _Source(config, sizes, mesh)
    abstract = source.abstract(sizes)
    base: Params = {}
    if sizes.lora.rank:
        base, _ = source.read(config.init_from, sizes.lora)
        abstract = split(abstract, is_adapter)[0]
    found = join(base, checkpoint.load_params(workdir, abstract, step))
    if not config.optim.ema:
        return found
    return join(found, checkpoint.load_trained(workdir, split(abstract, trained)[0], step))


def source_digest(source: str) -> str:
    """A text that differs between weights: of a work directory's newest checkpoint, or of the files
    of a published directory. Names, sizes and small files are read, and of large ones a piece.
    """
    source, step = checkpoint.split_source(source)
    step = checkpoint.latest_step(source) if step is None else step
    root = Path(source) if step is None else places.checkpoints(source) / str(step)
    digest = hashlib.sha256()
    for name, size in places.files(root):
        path = root / name
        weights = path.suffix == ".safetensors" or step is not None
        if weights or path.name in ("config.json", peft.CONFIG):
            digest.update(f"{name} {size}\n".encode())
        if path.name in ("config.json", peft.CONFIG, "_CHECKPOINT_METADATA"):  # the last has times
            digest.update(path.read_bytes())
        if path.suffix == ".safetensors":
            digest.update(_middle(path))
    return digest.hexdigest()[:16]


def _middle(path: Path) -> bytes:
    """Bytes from the middle of a file: training changes nearly all weights, and a 7B's are not read
    for this.
    """
    with open(path, "rb") as file:
        file.seek(path.stat().st_size // 2)
        return file.read(_PIECE_BYTES)


class _Source:
    """Reads or makes parameters for one model on one mesh."""

    def __init__(self, config: ConfigDict, sizes: ModelConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._sizes = replace(sizes, lora=LoraConfig())  # the weights themselves

    def read(self, source: str, lora: LoraConfig) -> tuple[Params, Params | None]:
        """(weights, adapters of `lora` that belong to them or None): the policy of `source`."""
        if not source:
            return self.random(self._sizes), None
        if peft.holds_adapters(source):
            return self._peft(source, lora)
        workdir = work_directory(source)
        if not places.has_checkpoints(workdir):
            return self._published(source), None
        with open(os.path.join(workdir, "config.json"), encoding="utf-8") as f:
            saved = json.load(f)
        # A work directory from before there were adapters has no such section.
        theirs = lora_config(saved["lora"]) if "lora" in saved else LoraConfig()
        if not theirs.rank:
            return checkpoint.load_params(source, self.abstract(self._sizes)), None
        return self._with_adapters(source, saved["init_from"], theirs, lora)

    def _with_adapters(
        self, source: str, below: str, theirs: LoraConfig, wanted: LoraConfig
    ) -> tuple[Params, Params | None]:
        """The policy of a work directory that holds adapters alone, of the weights at `below`."""
        below = places.local(below)
        if not os.path.exists(
            os.path.join(work_directory(below), "config.json")
        ) and not peft.holds_adapters(below):
            raise ConfigError(
                f"{source} holds adapters alone, of the weights at {below!r}, "
                f"which is not there (seen from {os.getcwd()})"
            )
        base, _ = self.read(below, theirs)
        abstract = self.abstract(replace(self._sizes, lora=theirs))
        adapters = checkpoint.load_params(source, split(abstract, is_adapter)[0])
        return self._carried_on(base, adapters, theirs, wanted)

    def _peft(self, source: str, wanted: LoraConfig) -> tuple[Params, Params | None]:
        """The policy of a directory that PEFT saved, of the weights that it names."""
        with naming("init_from"), distributed.together():  # a damaged file is on some host's disk
            saved = peft.read_adapters(source)
            values = peft.to_tree(saved, self._sizes)
            abstract = split(self.abstract(replace(self._sizes, lora=saved.lora)), is_adapter)[0]
            peft.check_shapes(values, abstract)
            below = local_directory(saved.base)
        base = self._published(below)
        adapters = jax.tree.map(
            lambda x, a: jax.make_array_from_callback(a.shape, a.sharding, lambda index: x[index]),
            values,
            abstract,
        )
        return self._carried_on(base, adapters, saved.lora, wanted)

    def _carried_on(
        self, base: Params, adapters: Params, theirs: LoraConfig, wanted: LoraConfig
    ) -> tuple[Params, Params | None]:
        """The adapters as they are where they are what is wanted, else in the weights."""
        same_targets = set(theirs.targets) == set(wanted.targets)
        if same_targets and (theirs.rank, theirs.alpha) == (wanted.rank, wanted.alpha):
            return base, adapters
        where = jax.tree.map(lambda x: x.sharding, base)
        merged = jax.jit(lambda params: merge(params, theirs), out_shardings=where)
        return merged(join(base, adapters)), None

    def random(self, sizes: ModelConfig, adapters_only: bool = False) -> Params:
        """Parameters to train from scratch, or fresh adapters (which change nothing yet)."""

        def chosen(params: Params) -> Params:
            return split(params, is_adapter)[0] if adapters_only else params

        where = jax.tree.map(lambda x: x.sharding, chosen(self.abstract(sizes)))
        key = jax.random.key(self._config.seed)
        with jax.set_mesh(self._mesh):
            return jax.jit(lambda: chosen(init_params(sizes, key)), out_shardings=where)()

    def _published(self, source: str) -> Params:
        """The weights of a Hugging Face directory."""
        switches = {name: getattr(self._sizes, name) for name in MODEL_SWITCHES}
        with naming("init_from"):
            published = replace(load_config(source), **switches)
            if published != self._sizes:
                raise ConfigError(self._another_size(source, published))
            with distributed.together():  # a damaged shard is on the hosts that read it
                _, params = load_pretrained(
                    source, lambda tree: param_shardings(tree, self._mesh), **switches
                )
        return params

    def _another_size(self, source: str, published: ModelConfig) -> str:
        """The message for a directory whose sizes are not the preset's."""
        theirs, ours = asdict(published), asdict(self._sizes)
        differing = ", ".join(
            f"{name}={theirs[name]} (not {value})"
            for name, value in ours.items()
            if theirs[name] != value
        )
        return (
            f"config.json in {source} is not of the size model.preset="
            f"{self._config.model.preset!r}: {differing}; set --config.model.preset={PUBLISHED} to "
            "take its sizes"
        )

    def abstract(self, sizes: ModelConfig) -> Params:
        """Shapes, types and shards of a model's parameters."""
        abstract = jax.eval_shape(lambda: init_params(sizes, jax.random.key(0)))
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            param_shardings(abstract, self._mesh),
        )

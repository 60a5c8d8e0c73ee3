"""Writes the newest policy of a work directory for `transformers` to load.

    python scripts/export.py --workdir=runs/stage2 --out=exported
    python scripts/export.py --workdir=runs/stage2 --out=exported --dtype=float32

The result is a Hugging Face directory: config.json, generation_config.json,
preprocessor_config.json, sharded safetensors and the tokenizer's files. Adapters are merged into
the weights that they were trained on. `config.init_from` of a later stage takes the directory too.
"""

import os
from pathlib import Path

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import ConfigError, check_local_path, check_output_dir
from mmrecoder_jax.data.rows import json_object
from mmrecoder_jax.models.export import export_policy
from mmrecoder_jax.models.weights import to_tensors
from mmrecoder_jax.stage import build

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory of a stage, with config.json and checkpoints/.", required=True
)
_OUT = flags.DEFINE_string(
    "out", None, "Directory to write; it must not hold a model yet.", required=True
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "Type of the weights on disk."
)
_SHARD_BYTES = flags.DEFINE_integer(
    "shard_bytes", 5 * 10**9, "Largest size of one file of weights.", lower_bound=1
)


def stage_config(workdir: str) -> ConfigDict:
    """The stage's configuration, changed so that its policy is read as a plain model.

    It is read on whatever devices there are.

    Raises:
      FileNotFoundError: not a work directory.
      RowError, ConfigError: its config.json cannot be read, or lacks what is read of it.
    """
    check_local_path("--workdir", workdir)
    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path) or not os.path.isdir(os.path.join(workdir, "checkpoints")):
        raise FileNotFoundError(
            f"{workdir}: no work directory of a stage, which has config.json and checkpoints/ "
            "(runs/tiny/stage2, say)"
        )
    config = ConfigDict(json_object(Path(path)))
    lacking = {"lora", "mesh", "model", "processor", "feedback", "data"} - set(config)
    if lacking:
        raise ConfigError(f"{path} lacks {', '.join(sorted(lacking))}: is it of a stage's own?")
    config.init_from = workdir
    config.lora.rank = 0  # adapters of the work directory are merged
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    return config


def export(workdir: str, out: str, dtype: str, shard_bytes: int) -> None:
    """Writes the directory.

    Raises:
      FileNotFoundError, FileExistsError, ConfigError: no such policy, or a model at `out` already.
    """
    check_output_dir("--out", out)
    config = stage_config(workdir)
    stage = build(config, workdir)
    pixels = config.processor.min_pixels, config.processor.max_pixels
    sizes = stage.model.config
    tensors = to_tensors(stage.initial_params(), sizes, jnp.dtype(dtype))
    export_policy(out, tensors, sizes, stage.tokenizer, pixels, dtype, shard_bytes)


def main() -> None:
    export(_WORKDIR.value, _OUT.value, _DTYPE.value, _SHARD_BYTES.value)
    print(f"{_OUT.value}: the policy of {_WORKDIR.value} in {_DTYPE.value}")


if __name__ == "__main__":
    run_with_flags(main, "--workdir=runs/tiny/stage2 --out=exported")

"""Writes the newest policy of a work directory as a directory that others open.

    python -m mmrecoder_jax.export --workdir=runs/stage2 --out=exported
    python -m mmrecoder_jax.export --workdir=runs/stage2@best --out=exported --dtype=float32
    python -m mmrecoder_jax.export --workdir=runs/lora --out=adapters --adapters

The result is a Hugging Face directory for `AutoProcessor` and `AutoModelForImageTextToText` of
transformers 4.57 and 5: config.json, generation_config.json, preprocessor_config.json, sharded
safetensors, the tokenizer's files, a chat template, and a model card with the run's numbers.
Adapters are merged into the weights that they were trained on; with `--adapters` they alone are
written, as a directory of the PEFT library. `config.init_from` of a later stage takes both.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from mmrecoder_jax import __version__, places
from mmrecoder_jax.command import run_with_flags
from mmrecoder_jax.config import (
    TRAINING_FILE,
    ConfigError,
    check_local_path,
    check_output_dir,
    check_place,
    lora_config,
    naming,
    work_directory,
)
from mmrecoder_jax.data.rows import json_list, json_object
from mmrecoder_jax.learner.checkpoint import latest_step, split_source
from mmrecoder_jax.learner.init import saved_adapters
from mmrecoder_jax.models import adapters as peft
from mmrecoder_jax.models.config import LoraConfig
from mmrecoder_jax.models.export import export_policy, save_tokenizer
from mmrecoder_jax.models.hub import published_name
from mmrecoder_jax.models.weights import to_tensors
from mmrecoder_jax.monitoring.metrics import read_metrics
from mmrecoder_jax.reporting.card import Origin, model_card
from mmrecoder_jax.stage import Stage, build

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Work directory of a stage, or a checkpoint of it: DIR@120, DIR@best.",
    required=True,
)
_OUT = flags.DEFINE_string(
    "out", None, "Directory to write; it must be missing or empty.", required=True
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float32"], "Type of the weights on disk."
)
_SHARD_BYTES = flags.DEFINE_integer(
    "shard_bytes", 5 * 10**9, "Largest size of one file of weights.", lower_bound=1
)
_ADAPTERS = flags.DEFINE_bool(
    "adapters", False, "Writes the adapters alone, as a directory of PEFT, not the merged model."
)
_BASE = flags.DEFINE_string(
    "base",
    "",
    "With --adapters: the directory or hub id of the weights below them, for the file that names "
    "them; empty: what the run began with.",
)


def saved_config(workdir: str) -> ConfigDict:
    """The configuration of a finished stage.

    Raises:
      FileNotFoundError: not a work directory.
      RowError, ConfigError: its config.json cannot be read, or lacks what is read of it.
    """
    check_local_path("--workdir", workdir)
    with naming("--workdir"):
        workdir = split_source(workdir)[0]
    path = os.path.join(workdir, "config.json")
    if not os.path.isfile(path) or not places.has_checkpoints(workdir):
        raise FileNotFoundError(
            f"{workdir}: no work directory of a stage, which has config.json and checkpoints/ "
            "(runs/tiny/stage2, say)"
        )
    config = ConfigDict(json_object(Path(path)))
    lacking = {"lora", "mesh", "model", "processor", "feedback", "data"} - set(config)
    if lacking:
        raise ConfigError(f"{path} lacks {', '.join(sorted(lacking))}: is it of a stage's own?")
    return config


def check_out(out: str) -> None:
    """Raises ConfigError, FileExistsError where `--out` cannot be written or holds something."""
    check_output_dir("--out", out)
    if os.path.isdir(out) and os.listdir(out):
        held = "a model" if os.path.exists(os.path.join(out, "config.json")) else "files"
        raise FileExistsError(f"{out}: holds {held} already; choose another directory")


def built(config: ConfigDict, workdir: str, rank: int) -> Stage:
    """The stage on whatever devices there are, its policy read with adapters of this rank."""
    config = config.copy_and_resolve_references()
    config.init_from = workdir
    config.lora.rank = rank
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    return build(config, work_directory(workdir))


def export_model(config: ConfigDict, workdir: str, out: str, dtype: str, shard_bytes: int) -> None:
    """Writes the policy as a plain model: adapters of the work directory are merged."""
    stage = built(config, workdir, rank=0)
    pixels = config.processor.min_pixels, config.processor.max_pixels
    sizes = stage.model.config
    tensors = to_tensors(stage.initial_params(), sizes, jnp.dtype(dtype))
    system = config.processor.system
    export_policy(out, tensors, sizes, stage.tokenizer, pixels, dtype, shard_bytes, system)


def export_adapters(config: ConfigDict, workdir: str, out: str, dtype: str, base: str) -> None:
    """Writes the adapters alone, for PEFT.

    Raises:
      ConfigError: there are none, or nobody can say which weights they belong to.
    """
    lora = lora_config(config.lora)
    if not lora.rank:
        raise ConfigError(
            f"--adapters: {workdir} has trained the weights themselves (lora.rank=0): leave the "
            "flag out"
        )
    base = base or base_weights(config.init_from, lora)
    stage = built(config, workdir, lora.rank)
    tree = jax.device_get(saved_adapters(stage.config, stage.model.config, stage.mesh))
    peft.write_adapters(Path(out), tree, lora, base, dtype)
    save_tokenizer(Path(out), stage.tokenizer, config.processor.system)


def base_weights(source: str, lora: LoraConfig) -> str:
    """The directory or hub id of the weights that adapters of this kind, trained from `source`, are
    added to. Stages hand the same adapters on, so it may be several stages below.

    Raises:
      ConfigError: they are those of a work directory, which PEFT does not read.
    """
    below = places.local(source)
    while places.has_checkpoints(work_directory(below)):
        saved = json_object(Path(work_directory(below), "config.json"))
        if "lora" not in saved or lora_config(saved["lora"]) != lora:
            raise ConfigError(
                f"--adapters: these are added to the policy of the work directory {below}: export "
                f"that first (`python -m mmrecoder_jax.export --workdir={below} --out=DIR`) and "
                "give --base=DIR"
            )
        below = places.local(saved["init_from"])
    if peft.holds_adapters(below) and peft.read_adapters(below).lora == lora:
        return peft.base_of(below)
    if peft.holds_adapters(below):
        raise ConfigError(
            f"--adapters: these are added to the weights and adapters of {below} together: merge "
            "the two with peft, and give the merged model as --base=DIR"
        )
    return published_name(below)


def origin(config: ConfigDict, workdir: str) -> Origin:
    """What the model card says of the run. An evaluation is of its last checkpoint."""
    workdir, named = split_source(workdir)
    newest = latest_step(workdir) or 0
    step = newest if named is None else named
    rows: list[dict[str, Any]] = []
    if step == newest and os.path.isfile(path := os.path.join(workdir, "evaluation.json")):
        rows = json_list(Path(path))
    metrics: list[Any] = []
    if os.path.isfile(path := os.path.join(workdir, "metrics.jsonl")):
        metrics = read_metrics(path)
    if step != newest:
        taken = step // config.get("rl", {}).get("updates_per_batch", 1)
        metrics = [row for row in metrics if row["step"] <= taken]
    last = metrics[-1] if metrics else {}
    return Origin(config, __version__, step, rows, last)


def main() -> None:
    """Writes everything beside `--out` first: a directory there is whole, whatever happens."""
    check_place("--workdir", _WORKDIR.value)
    check_out(_OUT.value)
    workdir, out, dtype = (
        places.local(_WORKDIR.value),
        os.path.normpath(_OUT.value),
        _DTYPE.value,
    )
    if _BASE.value and not _ADAPTERS.value:
        raise ConfigError(f"--base={_BASE.value}: names the weights below --adapters; give both")
    config = saved_config(workdir)
    partial = f"{out}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if _ADAPTERS.value:
        export_adapters(config, workdir, partial, dtype, _BASE.value)
    else:
        export_model(config, workdir, partial, dtype, _SHARD_BYTES.value)
    card = model_card(Path(partial), origin(config, workdir))
    Path(partial, "README.md").write_text(card, encoding="utf-8")
    kept = json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"
    Path(partial, TRAINING_FILE).write_text(kept, encoding="utf-8")
    os.rename(partial, out)
    what = "adapters" if _ADAPTERS.value else "policy"
    print(f"{_OUT.value}: the {what} of {_WORKDIR.value} in {dtype}; README.md is the model card")


if __name__ == "__main__":
    run_with_flags(main, "--workdir=runs/tiny/stage2 --out=exported")

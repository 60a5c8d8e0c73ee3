"""Adapters as a directory of the PEFT library <-> our parameters.

    adapter_config.json         rank, alpha, targets, and the weights that they adapt
    adapter_model.safetensors   for each adapted matmul of each layer, below
                                base_model.model.model.language_model.layers.0.self_attn.q_proj,
                                  lora_A.weight  [rank, in]   one layer of our lora_a, transposed
                                  lora_B.weight  [out, rank]  one layer of our lora_b, transposed

PEFT computes `y = x W + (lora_alpha / r) (x A) B`, as `layers.Dense` does. What it can compute
otherwise (rank-stabilised scaling, DoRA, a rank of its own for some layers, adapters of the vision
tower) is refused, not ignored.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mmrecoder_jax.models.config import LORA_TARGETS, LoraConfig, ModelConfig
from mmrecoder_jax.models.files import CheckpointError, few, read_json, shown
from mmrecoder_jax.models.safetensors import open_file, write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LAYERS = r"model\.(?:language_model\.)?layers\.(\d+)\.(self_attn|mlp)"
_NAME = re.compile(rf"base_model\.model\.{_LAYERS}\.(\w+)\.lora_([AB])\.weight")
# Fields with which PEFT would compute something else, and the value with which it does not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": ([],),
    "layers_to_transform": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What the two files say.

    Attributes:
      base: the weights that are adapted, as the directory names them: a directory or a hub id.
      tensors: our leaves by (matmul, "lora_a" or "lora_b"): float32 `[layers, in, rank]` and
        `[layers, rank, out]`.
    """

    base: str
    lora: LoraConfig
    tensors: dict[tuple[str, str], np.ndarray]


def holds_adapters(directory: str | pathlib.Path) -> bool:
    """Whether this is a directory of PEFT: adapters without the weights below them."""
    directory = pathlib.Path(directory)
    return (directory / CONFIG).is_file() and not (directory / "config.json").exists()


def base_of(directory: str | pathlib.Path) -> str:
    """The name of the weights that a directory of PEFT adapts.

    Raises:
      FileNotFoundError, CheckpointError: there is none, or it cannot be read.
    """
    path = pathlib.Path(directory) / CONFIG
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{path}: base_model_name_or_path is {shown(base)}, but must name the weights that are "
            "adapted: write the directory or hub id there"
        )
    return base


def read_adapters(directory: str | pathlib.Path) -> Adapters:
    """The adapters of a directory that PEFT saved.

    Raises:
      FileNotFoundError: a file is missing.
      CheckpointError: a file is damaged, or what PEFT computes with it is not what ours does.
    """
    directory = pathlib.Path(directory)
    base = base_of(directory)
    fields = read_json(directory / CONFIG)
    where = directory / CONFIG
    for name, plain in _PLAIN.items():
        if (value := fields.get(name)) is not None and value not in plain:
            raise CheckpointError(
                f"{where}: {name} is {shown(value)}; only {shown(plain[0])} is read: merge the "
                "adapters with peft (`merge_and_unload().save_pretrained(out)`) and give `out`"
            )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise CheckpointError(
            f"{where}: r is {shown(rank)}, lora_alpha is {shown(alpha)}, but both must be positive "
            "numbers; copy the file again"
        )
    layers = _layers(directory / WEIGHTS, rank)
    targets = tuple(name for name in LORA_TARGETS if (name, "lora_a") in layers)
    count = 1 + max(layer for places in layers.values() for layer in places)
    tensors = {}
    for (name, part), places in layers.items():
        other = "lora_b" if part == "lora_a" else "lora_a"
        if set(places) != set(range(count)) or (name, other) not in layers:
            raise CheckpointError(
                f"{directory / WEIGHTS}: {name} has adapters in some layers alone, or one matrix "
                "of two; adapters of every layer are read"
            )
        tensors[name, part] = np.stack([places[layer] for layer in range(count)])
    return Adapters(base, LoraConfig(rank, float(alpha), targets), tensors)


def _layers(path: pathlib.Path, rank: int) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """Our matrices of each matmul, by layer."""
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    unknown = []
    for name, x in open_file(path).items():
        match = _NAME.fullmatch(name)
        if not match or match[3] not in LORA_TARGETS:
            unknown.append(name)
            continue
        part = "lora_a" if match[4] == "A" else "lora_b"
        if x.ndim != 2 or x.shape[part == "lora_b"] != rank:
            raise CheckpointError(
                f"{path}: {name} has shape {list(x.shape)}, which is not of rank {rank}; copy both "
                "files of the adapters again"
            )
        values = x.astype(np.float32).T
        if not np.isfinite(values).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values; copy it again")
        found.setdefault((match[3], part), {})[int(match[1])] = values
    if unknown or not found:
        what = few(unknown) if unknown else "no tensor"
        raise CheckpointError(
            f"{path}: holds {what}; adapters of the decoder's matmuls ({', '.join(LORA_TARGETS)}) "
            "are read: merge the adapters with peft and give the merged model"
        )
    return found


def to_tree(adapters: Adapters, sizes: ModelConfig) -> dict[str, Any]:
    """The adapters as the branches of our parameters.

    Raises:
      CheckpointError: they are of a model with another number of layers.
    """
    tree: dict[str, Any] = {}
    for (name, part), x in adapters.tensors.items():
        if len(x) != sizes.num_layers:
            raise CheckpointError(
                f"the adapters are of {len(x)} layers, the weights of {adapters.base} have "
                f"{sizes.num_layers}: give base_model_name_or_path the model that was adapted"
            )
        block = "self_attn" if name in _ATTENTION else "mlp"
        tree.setdefault(block, {}).setdefault(name, {})[part] = x
    return {"model": {"layers": tree}}


def check_shapes(tree: Mapping[str, Any], wanted: Mapping[str, Any], path: str = "") -> None:
    """Raises CheckpointError where adapters do not fit the weights.

    Args:
      tree: of arrays.
      wanted: of arrays, or of anything with a shape: the adapters of these weights.
    """
    for name, value in wanted.items():
        if isinstance(value, Mapping):
            check_shapes(tree[name], value, f"{path}{name}/")
        elif tree[name].shape != value.shape:
            raise CheckpointError(
                f"the adapters' {path}{name} has shape {list(tree[name].shape)}, the weights need "
                f"{list(value.shape)}: give base_model_name_or_path the model that was adapted"
            )


def write_adapters(
    directory: pathlib.Path,
    tree: Mapping[str, Any],
    lora: LoraConfig,
    base: str,
    dtype: str = "float32",
) -> None:
    """Writes both files; the directory is made.

    Args:
      tree: the adapters' branches of our parameters, as arrays of NumPy.
      base: what `base_model_name_or_path` says.
      dtype: of the tensors: "float32" or "bfloat16".
    """
    directory.mkdir(parents=True, exist_ok=True)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {
        f"base_model.model.model.language_model.layers.{layer}.{block}.{name}.{part}.weight": (
            np.ascontiguousarray(values.T.astype(kind))
        )
        for block, matmuls in tree["model"]["layers"].items()
        for name, pair in matmuls.items()
        for ours, part in (("lora_a", "lora_A"), ("lora_b", "lora_B"))
        for layer, values in enumerate(np.asarray(pair[ours]))
    }
    write_file(directory / WEIGHTS, tensors)
    # The vision tower has matmuls of the same names: the decoder's are told by where they are.
    matmuls = "|".join(lora.targets)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "target_modules": rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({matmuls})",
    }
    text = json.dumps(config, indent=2) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")

"""Published Qwen2.5-VL directories <-> our parameters.

One table (`entries`) says where each published tensor goes and how it is converted. Reading is
lazy: a device's part of a parameter is cut out of the memory-mapped files when it is sent there,
`CHUNK_BYTES` at a time. So a host reads only the bytes that its devices hold, and needs memory for
one chunk beside its devices' arrays.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from mmrecoder_jax.models import safetensors
from mmrecoder_jax.models.config import ModelConfig, VisionConfig
from mmrecoder_jax.models.qwen2_5_vl import init_params

MODEL_TYPE = "qwen2_5_vl"
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
CHUNK_BYTES = 2**30
TOKEN_IDS = {  # of the published tokenizer
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_VISION_FIELDS = tuple(field.name for field in dataclasses.fields(VisionConfig))
_TEXT_FIELDS = {  # ours -> published
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
}


Tensor = np.ndarray | jax.Array  # a tracer where `from_tensors` asks for shapes alone


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How a published tensor becomes (one layer of) our parameter, and back.

    `to_ours` makes a view wherever it can: a copy would read the whole tensor.
    """

    to_ours: Callable[[Tensor], Tensor]
    to_published: Callable[[Tensor], Tensor]


def _patch_kernel(x: Tensor) -> Tensor:
    """`[D, channels, 2, side, side]` -> `[C, D]`, C = channels * side * side.

    The two temporal slices see the same still image, so their weights add up.
    """
    return x.astype(np.float32).sum(axis=2).reshape(len(x), -1).T


SAME = Conversion(lambda x: x, lambda x: x)
TRANSPOSED = Conversion(lambda x: x.T, lambda x: x.T)
QKV_KERNEL = Conversion(
    lambda x: x.reshape(3, x.shape[0] // 3, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
)
QKV_BIAS = Conversion(lambda x: x.reshape(3, -1), lambda x: x.reshape(-1))


def _patch_conversion(vision: VisionConfig) -> Conversion:
    """Between the published patch kernel and ours, where one slice has the sum of both."""

    def back(x: Tensor) -> Tensor:
        # which slice held how much of the sum is not known any more, and does not matter
        kernel = (x / vision.temporal_patch_size).T.reshape(
            -1, vision.in_channels, 1, vision.patch_size, vision.patch_size
        )
        return kernel.repeat(vision.temporal_patch_size, axis=2)

    return Conversion(_patch_kernel, back)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published tensor.

    Attributes:
      name: as published.
      path: of our parameter.
      place: index in our parameter's stacked axes, () where nothing is stacked.
      conversion: to one layer of our parameter.
    """

    name: str
    path: tuple[str, ...]
    place: tuple[int, ...]
    conversion: Conversion


def entries(config: ModelConfig) -> list[Entry]:
    """The whole table for a model of this size."""
    table = [
        Entry("model.embed_tokens.weight", ("model", "embed_tokens", "weight"), (), SAME),
        Entry("model.norm.weight", ("model", "norm", "weight"), (), SAME),
        Entry(
            "visual.patch_embed.proj.weight",
            ("visual", "patch_embed", "proj", "kernel"),
            (),
            _patch_conversion(config.vision),
        ),
        Entry("visual.merger.ln_q.weight", ("visual", "merger", "ln_q", "weight"), (), SAME),
    ]
    if not config.tie_word_embeddings:
        table.append(Entry("lm_head.weight", ("lm_head", "weight"), (), SAME))
    for i in (0, 2):
        table += _dense(f"visual.merger.mlp.{i}", ("visual", "merger", f"mlp_{i}"), (), bias=True)
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", ("model", "layers")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table.append(Entry(f"{theirs}.{norm}.weight", (*ours, norm, "weight"), (i,), SAME))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            table += _dense(
                f"{theirs}.self_attn.{name}",
                (*ours, "self_attn", name),
                (i,),
                bias=name != "o_proj",
            )
        for name in ("gate_proj", "up_proj", "down_proj"):
            table += _dense(f"{theirs}.mlp.{name}", (*ours, "mlp", name), (i,), bias=False)
    for i in range(config.vision.depth):
        group, within = divmod(i, config.vision.group_layers)
        full = within == config.vision.group_layers - 1
        place = (group,) if full else (group, within)
        table += _vision_block(f"visual.blocks.{i}", "full" if full else "window", place)
    return table


def _vision_block(theirs: str, kind: str, place: tuple[int, ...]) -> list[Entry]:
    ours, qkv = ("visual", "blocks", kind), ("visual", "blocks", kind, "attn", "qkv")
    table = [
        Entry(f"{theirs}.norm1.weight", (*ours, "norm1", "weight"), place, SAME),
        Entry(f"{theirs}.norm2.weight", (*ours, "norm2", "weight"), place, SAME),
        Entry(f"{theirs}.attn.qkv.weight", (*qkv, "kernel"), place, QKV_KERNEL),
        Entry(f"{theirs}.attn.qkv.bias", (*qkv, "bias"), place, QKV_BIAS),
        *_dense(f"{theirs}.attn.proj", (*ours, "attn", "proj"), place, bias=True),
    ]
    for name in ("gate_proj", "up_proj", "down_proj"):
        table += _dense(f"{theirs}.mlp.{name}", (*ours, "mlp", name), place, bias=True)
    return table


def _dense(theirs: str, ours: tuple[str, ...], place: tuple[int, ...], bias: bool) -> list[Entry]:
    table = [Entry(f"{theirs}.weight", (*ours, "kernel"), place, TRANSPOSED)]
    return [*table, Entry(f"{theirs}.bias", (*ours, "bias"), place, SAME)] if bias else table


def from_tensors(
    tensors: dict[str, np.ndarray], config: ModelConfig, shardings: Any = None
) -> dict:
    """Published tensors -> parameters in `config.param_dtype`.

    Args:
      tensors: named as on the hub (`model.layers.0...`, `visual...`) or as transformers 5 holds
        them (`model.language_model...`).
      config: the model's sizes, without adapters.
      shardings: a tree of shardings (`sharding.param_shardings`); None puts whole arrays on the
        default device.

    Raises:
      ValueError: tensors are missing or unknown, or have a wrong shape. The message names the first
        few of a kind.
    """
    tensors = {_hub_name(name): x for name, x in tensors.items()}
    table = entries(config)
    wanted = {entry.name for entry in table}
    unknown = (
        tensors.keys() - wanted - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    )
    if missing := wanted - tensors.keys():
        raise ValueError(f"the checkpoint lacks {_few(missing)}")
    if unknown:
        raise ValueError(f"the checkpoint has tensors that this model has not: {_few(unknown)}")
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    stacks: dict[tuple[str, ...], dict[tuple[int, ...], Tensor]] = {}
    wrong = []
    for entry in table:
        shape = _leaf(abstract, entry.path).shape[len(entry.place) :]
        expected = jax.eval_shape(
            entry.conversion.to_published, jax.ShapeDtypeStruct(shape, np.float32)
        ).shape
        if tensors[entry.name].shape != expected:
            wrong.append(
                f"{entry.name} {list(tensors[entry.name].shape)} (expected {list(expected)})"
            )
        else:
            stacks.setdefault(entry.path, {})[entry.place] = entry.conversion.to_ours(
                tensors[entry.name]
            )
    if wrong:
        raise ValueError(f"tensors of another size: {_few(wrong)}")

    def make(
        path: tuple[Any, ...],
        leaf: jax.ShapeDtypeStruct,
        sharding: jax.sharding.Sharding | None = None,
    ) -> jax.Array:
        layers = stacks[tuple(key.key for key in path)]
        if sharding is None:
            return _piece(layers, leaf, (slice(None),) * leaf.ndim, None)
        where = sharding.addressable_devices_indices_map(leaf.shape)
        pieces = []
        for device, index in where.items():
            assert index is not None  # only a device of another host has none
            # a mesh of this device alone: the caller may have set a larger one
            with jax.set_mesh(jax.make_mesh((1,), ("one",), (AxisType.Auto,), devices=[device])):
                pieces.append(_piece(layers, leaf, index, device))
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, pieces)

    return jax.tree_util.tree_map_with_path(
        make, abstract, *([] if shardings is None else [shardings])
    )


def to_tensors(params: dict, config: ModelConfig, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters -> (hub name, array in `dtype`), one tensor at a time."""
    for entry in entries(config):
        x = np.asarray(_leaf(params, entry.path)[entry.place], np.float32)
        yield entry.name, np.ascontiguousarray(entry.conversion.to_published(x).astype(dtype))


def load_pretrained(
    directory: str | pathlib.Path, shardings: Any = None, **changes: Any
) -> tuple[ModelConfig, dict]:
    """(config, params) of a published directory.

    Args:
      directory: holds config.json and safetensors, as on the hub.
      shardings: a tree of shardings, or a function from the abstract parameters to one; None for
        one device.
      **changes: fields of ModelConfig that are not published: `dtype`, `param_dtype`, `remat`,
        `attention`, `scan_unroll`.

    Raises:
      FileNotFoundError, ValueError: a file or tensor is missing, cut short, of another size or of
        another architecture; the message names it.
    """
    config = dataclasses.replace(load_config(directory), **changes)
    if callable(shardings):
        shardings = shardings(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    return config, from_tensors(safetensors.open_directory(directory), config, shardings)


def save_pretrained(
    directory: str | pathlib.Path,
    params: dict,
    config: ModelConfig,
    dtype: str = "bfloat16",
    token_ids: Mapping[str, int] = TOKEN_IDS,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json and sharded safetensors that `transformers` loads.

    Args:
      directory: is made, and must not hold a model yet.
      params: without adapters (`lora.merge`).
      dtype: in which the tensors are written.
      token_ids: what config.json says about the tokenizer; `image_token_id` at least.
      shard_bytes: largest size of a file, about.

    Raises:
      FileExistsError: there is a config.json already.
    """
    directory = pathlib.Path(directory)
    if (directory / "config.json").exists():
        raise FileExistsError(f"{directory}: holds a model already; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write_directory(
        directory, to_tensors(params, config, jax.numpy.dtype(dtype)), shard_bytes
    )
    (directory / "config.json").write_text(
        json.dumps(published_config(config, dtype, token_ids), indent=2) + "\n"
    )


def load_config(directory: str | pathlib.Path) -> ModelConfig:
    """The sizes in a directory's config.json.

    Both forms are read: the flat one of the hub and the nested one of transformers 5.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the architecture is another one, has a feature that this model lacks, or a field
        is missing.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a published model directory has one")
    published = json.loads(path.read_text())
    if published.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{path}: model_type is {published.get('model_type')!r}, "
            f"this loader reads {MODEL_TYPE!r}"
        )
    text = published | published.get("text_config", {})
    rope = text.get("rope_parameters") or (text.get("rope_scaling") or {}) | {
        "rope_theta": text.get("rope_theta")
    }
    for name, value in (("hidden_act", "silu"), ("use_sliding_window", False)):
        if text.get(name, value) != value:
            raise ValueError(f"{path}: {name}={text[name]!r} is not supported, only {value!r}")
    try:
        vision = {
            name: value
            for name, value in published["vision_config"].items()
            if name in _VISION_FIELDS
        }
        sizes = {ours: text[theirs] for ours, theirs in _TEXT_FIELDS.items()}
        return ModelConfig(
            **sizes,
            vision=VisionConfig(
                **vision | {"fullatt_block_indexes": tuple(vision["fullatt_block_indexes"])}
            ),
            head_dim=text["hidden_size"] // text["num_attention_heads"],
            rope_theta=float(rope["rope_theta"]),
            mrope_section=tuple(rope["mrope_section"]),
            tie_word_embeddings=published.get(
                "tie_word_embeddings", text.get("tie_word_embeddings", False)
            ),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: incomplete, {error}") from error


def published_config(
    config: ModelConfig, dtype: str, token_ids: Mapping[str, int] = TOKEN_IDS
) -> dict:
    """The config.json of this model, in the flat form of the hub.

    Raises:
      ValueError: sizes that the published architecture cannot have.
    """
    if config.head_dim * config.num_heads != config.hidden_size:
        raise ValueError(
            "published models have head_dim = hidden_size / num_heads; "
            f"this one has {config.head_dim} x {config.num_heads}"
        )
    vision = dataclasses.asdict(config.vision) | {
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        "tokens_per_second": 2,
    }
    vision |= {
        "in_chans": config.vision.in_channels,
        "spatial_patch_size": config.vision.patch_size,
    }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **token_ids,
        **{theirs: getattr(config, ours) for ours, theirs in _TEXT_FIELDS.items()},
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.mrope_section)},
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "torch_dtype": dtype,
        "vision_config": vision,
    }


def _piece(
    layers: dict[tuple[int, ...], Tensor],
    leaf: jax.ShapeDtypeStruct,
    index: tuple[slice, ...],
    device: jax.Device | None,
) -> jax.Array:
    """The values of a parameter at `index`, on a device.

    They are read and sent `CHUNK_BYTES` at a time and put together on the device.
    """
    first, *rest = (
        range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)
    )
    row = math.prod(map(len, rest)) * leaf.dtype.itemsize
    step = max(1, CHUNK_BYTES // max(row, 1))
    if len(first) <= step:
        return jax.device_put(read_part(layers, leaf, index), device)
    piece = jax.numpy.zeros([len(first), *map(len, rest)], leaf.dtype, device=device)
    for start in range(0, len(first), step):
        rows = first[start : start + step]
        chunk = read_part(layers, leaf, (slice(rows.start, rows.stop), *index[1:]))
        piece = jax.block_until_ready(_put_rows(piece, jax.device_put(chunk, device), start))
    return piece


@functools.partial(jax.jit, donate_argnums=0)
def _put_rows(whole: jax.Array, rows: jax.Array, start: jax.Array | int) -> jax.Array:
    """`whole[start : start + len(rows)] = rows`, in place."""
    return jax.lax.dynamic_update_slice_in_dim(whole, rows, start, 0)


def read_part(
    layers: dict[tuple[int, ...], Tensor], leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    """The values of a stacked parameter at `index`: only their bytes are read.

    With layers of shape [3, 4] at the places (0,), (1,) and (2,), the index `[1:3, 0:2, :]` reads
    two rows each of the layers (1,) and (2,).

    Args:
      layers: the parameter's layers by their place in the stacked axes.
      leaf: shape and type of the whole parameter.
      index: one slice per dimension of the whole parameter.
    """
    depth = len(next(iter(layers)))
    ranges = [range(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True)]
    out = np.empty([len(r) for r in ranges], leaf.dtype)
    for place in np.ndindex(*out.shape[:depth]):
        out[place] = layers[tuple(r[i] for r, i in zip(ranges, place, strict=False))][
            tuple(index[depth:])
        ]
    return out


def _hub_name(name: str) -> str:
    """The name on the hub of a tensor that transformers 5 may have renamed."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _few(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from mmrecoder_jax.models import safetensors
from mmrecoder_jax.models.config import ModelConfig, VisionConfig
from mmrecoder_jax.models.files import CheckpointError, few
from mmrecoder_jax.models.published import TOKEN_IDS, load_config, published_config
from mmrecoder_jax.models.qwen2_5_vl import init_params

CHUNK_BYTES = 2**30
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Names that transformers 5 holds in memory, and some fine-tunes are saved with -> the hub's
_RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."))
# Wrappers whose name stands before every tensor, and the remedy
_WRAPPERS = {
    "base_model.model.": "peft's wrapper was saved: `merge_and_unload()` gives the model to save",
    "module.": "a wrapper for parallel training was saved: save its `.module`",
    "_orig_mod.": "torch.compile's wrapper was saved: save its `._orig_mod`",
}
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|input_scale"
    r"|absmax|quant_map|SCB)$|\.quant_state\."
)
_ADAPTED = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)\.")

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
        Entry(TABLE, ("model", "embed_tokens", "weight"), (), SAME),
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
        table.append(Entry(HEAD, ("lm_head", "weight"), (), SAME))
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


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of our parameter: the published name, and a view of the values."""

    name: str
    values: Tensor


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
      CheckpointError: tensors are missing or unknown, have a wrong shape or type, hold values that
        are not finite, or zeros alone. The message names the first few of a kind.
    """
    tensors = _by_hub_name(tensors)
    table = entries(config)
    _check_names(set(tensors), {entry.name for entry in table}, config.tie_word_embeddings)
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    _check_types_and_shapes(tensors, table, abstract)
    if config.tie_word_embeddings and HEAD in tensors:
        _check_same(tensors[HEAD], tensors[TABLE])
    stacks: dict[tuple[str, ...], dict[tuple[int, ...], Layer]] = {}
    for entry in table:
        layer = Layer(entry.name, entry.conversion.to_ours(tensors[entry.name]))
        stacks.setdefault(entry.path, {})[entry.place] = layer

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
    """Our parameters -> (hub name, array in `dtype`), one tensor at a time.

    Where hosts hold parts of the parameters, all hosts take the same tensors together.
    """
    for entry in entries(config):
        x = _whole(_leaf(params, entry.path)[entry.place]).astype(np.float32)
        yield entry.name, np.ascontiguousarray(entry.conversion.to_published(x).astype(dtype))


def _whole(x: Tensor) -> np.ndarray:
    """All of an array, of which each host may hold a part."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


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
      FileNotFoundError, CheckpointError: the table of docs/model.md, "Checkpoints of others".
    """
    config = dataclasses.replace(load_config(directory), **changes)
    if callable(shardings):
        shardings = shardings(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    tensors = safetensors.open_directory(directory)
    try:
        return config, from_tensors(tensors, config, shardings)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error


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
    tensors = to_tensors(params, config, jax.numpy.dtype(dtype))
    save_tensors(directory, tensors, config, dtype, token_ids, shard_bytes)


def save_tensors(
    directory: str | pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    config: ModelConfig,
    dtype: str,
    token_ids: Mapping[str, int],
    shard_bytes: int,
) -> None:
    """`save_pretrained` of what `to_tensors` gives, in this type."""
    directory = pathlib.Path(directory)
    if (directory / "config.json").exists():
        raise FileExistsError(f"{directory}: holds a model already; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write_directory(directory, tensors, shard_bytes)
    (directory / "config.json").write_text(
        json.dumps(published_config(config, dtype, token_ids), indent=2) + "\n"
    )


def _piece(
    layers: dict[tuple[int, ...], Layer],
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
    layers: dict[tuple[int, ...], Layer], leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
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
        layer = layers[tuple(r[i] for r, i in zip(ranges, place, strict=False))]
        with np.errstate(over="ignore"):  # becomes infinite, and is refused below
            out[place] = layer.values[tuple(index[depth:])]
        if not _finite(out[place]):
            raise CheckpointError(
                f"{layer.name} holds NaN or infinite values (as {leaf.dtype}): the run that saved "
                "it had diverged, or the file is damaged; give an earlier checkpoint or copy it "
                "again"
            )
        if _is_blank(layer.name, out[place], index[depth:]):
            raise CheckpointError(
                f"{layer.name} holds only zeros where random numbers were trained: the file was "
                "not written whole, or its holes were copied; copy it again"
            )
    return out


def _is_blank(name: str, x: np.ndarray, index: tuple[slice, ...]) -> bool:
    """Whether this part of a tensor is all zero and cannot be so in a trained model.

    Biases can; so can the last rows of a vocabulary, which no token uses.
    """
    if name.endswith(".bias") or (name in (TABLE, HEAD) and index[0].start):
        return False
    return bool(x.size) and not x.any()


def _finite(x: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; the values are in the cache, for they were just read."""
    if x.dtype != ml_dtypes.bfloat16:
        return bool(np.isfinite(x).all())
    # ml_dtypes' own isfinite takes longer than reading. These have all bits of the exponent set.
    return not x.size or int((x.view(np.uint16) & 0x7FFF).max()) < 0x7F80


def _by_hub_name(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by their names on the hub; transformers 5 may have renamed them."""
    out: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        for theirs, ours in _RENAMED:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        if name in out:
            raise CheckpointError(
                f"{name} is there twice, once by its name in transformers 5: two models were "
                "saved into one directory; save one into a directory of its own"
            )
        out[name] = x
    return out


def _check_names(names: set[str], wanted: set[str], tied: bool) -> None:
    """Raises CheckpointError where tensors are missing or unknown, with the reason if known."""
    missing, unknown = wanted - names, names - wanted - ({HEAD} if tied else set())
    if reason := _known_form(unknown):
        raise CheckpointError(reason)
    if missing == {HEAD}:
        raise CheckpointError(
            f"the checkpoint lacks {HEAD} although tie_word_embeddings in config.json is false: "
            "set it to true if the model uses its embedding as head, or copy the missing shard"
        )
    if missing:
        instead = f" and has {few(unknown)} instead" if unknown else ""
        raise CheckpointError(
            f"the checkpoint lacks {few(missing)}{instead}: a shard is missing, or config.json "
            "(num_hidden_layers, depth) is of another model; copy the whole directory again"
        )
    if unknown:
        raise CheckpointError(
            f"the checkpoint has tensors that this model has not: {few(unknown)}; config.json "
            "(num_hidden_layers, depth) is of another model, or parts were added: save the "
            "Qwen2.5-VL alone"
        )


def _known_form(unknown: set[str]) -> str:
    """Why names are unknown and the remedy; "" where it is not one of the usual reasons."""
    for name in sorted(unknown):
        if _QUANTISED.search(name):
            return f"{name}: quantised weights; training needs the model before quantisation"
        if _ADAPTED.search(name):
            return (
                f"{name}: adapters beside the weights that they change; merge them "
                "(peft: merge_and_unload()) and save the result"
            )
    for name in sorted(unknown):
        for table in ("model.language_model.embed_tokens.weight", TABLE):
            if name.endswith(f".{table}"):
                prefix = name.removesuffix(table)
                remedy = _WRAPPERS.get(prefix, "save the model inside its wrapper")
                return f"every name begins with {prefix!r} ({name}): {remedy}"
    return ""


def _check_types_and_shapes(
    tensors: dict[str, np.ndarray], table: list[Entry], abstract: Any
) -> None:
    """Raises CheckpointError where a tensor cannot be the parameter that config.json describes."""
    wrong: dict[str, tuple[list[int], list[int]]] = {}
    for entry in table:
        x = tensors[entry.name]
        if x.dtype.kind in "iub":
            raise CheckpointError(
                f"{entry.name} is of type {x.dtype}: quantised weights; training needs the model "
                "before quantisation"
            )
        ours = jax.ShapeDtypeStruct(
            _leaf(abstract, entry.path).shape[len(entry.place) :], np.float32
        )
        expected = jax.eval_shape(entry.conversion.to_published, ours).shape
        if x.shape != expected:
            wrong[entry.name] = list(x.shape), list(expected)
    if not wrong:
        return
    text = few(f"{name} {shape} (expected {want})" for name, (shape, want) in wrong.items())
    raise CheckpointError(f"tensors of another size: {text}; {_size_remedy(wrong)}")


def _size_remedy(wrong: dict[str, tuple[list[int], list[int]]]) -> str:
    """What explains these shapes: (in the files, by config.json)."""
    if any(math.prod(shape) == 0 for shape, _ in wrong.values()):
        return "empty ones are what DeepSpeed ZeRO-3 saves ungathered: use its zero_to_fp32.py"
    if wrong.keys() <= {TABLE, HEAD}:
        rows = {shape[0] for shape, _ in wrong.values()}
        return f"the vocabulary was resized: set vocab_size in config.json to {few(map(str, rows))}"
    return "config.json is of another model; copy the whole directory again"


def _check_same(head: np.ndarray, table: np.ndarray) -> None:
    """Raises CheckpointError unless a head beside tied embeddings is a copy of them."""
    rows = max(1, 2**24 // max(1, math.prod(table.shape[1:])))
    same = head.shape == table.shape and all(
        np.array_equal(head[i : i + rows], table[i : i + rows]) for i in range(0, len(head), rows)
    )
    if not same:
        raise CheckpointError(
            f"{HEAD} differs from {TABLE} although tie_word_embeddings in config.json is true: "
            "set it to false if the head was trained, or remove it from the files"
        )


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree

"""Directories of safetensors files, read as memory maps and written shard by shard.

A file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape,
data_offsets}}, then the raw values. Needs NumPy alone, and ml_dtypes (which JAX brings) for
bfloat16.
"""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from mmrecoder_jax.models.files import (
    CheckpointError,
    check_kind,
    few,
    parse_object,
    read_json,
    shown,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack", ".distcp")
AGAIN = "the file is damaged, copy it again"
MAX_HEADER = 100_000_000  # bytes; the limit of the format
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": ml_dtypes.bfloat16,
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def open_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of one file, as views of a memory map: bytes are read when they are used.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is not a safetensors file, or it ends before its tensors do.
    """
    check_kind(path)
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = _header(path, raw, start)
    values = raw[start:]
    tensors = {name: _tensor(path, name, entry, values) for name, entry in header.items()}
    _check_end_to_end(path, header, len(values))
    return tensors


def _header(path: pathlib.Path, raw: np.ndarray, start: int) -> dict[str, Any]:
    """The JSON object in front of the values, without the file's metadata."""
    if len(raw) < 9 or raw[8] != ord("{") or start > MAX_HEADER:
        raise CheckpointError(
            f"{path}: {len(raw)} bytes that are no safetensors file; download it again"
        )
    if start > len(raw):
        raise CheckpointError(
            f"{path}: cut short, the header alone ends at byte {start} of {len(raw)}; copy the "
            "file again"
        )
    header = parse_object(raw[8:start].tobytes(), f"{path}: header")
    header.pop("__metadata__", None)
    return header


def _tensor(path: pathlib.Path, name: str, entry: Any, values: np.ndarray) -> np.ndarray:
    """The view of one tensor that its header entry describes."""
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: {name} is {shown(entry)} in the header; {AGAIN}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {shown(dtype)}; known are {', '.join(DTYPES)}: quantised "
            "weights are not read, give the model before quantisation"
        )
    if not _sizes(shape):
        raise CheckpointError(f"{path}: {name} has shape {shown(shape)} in the header; {AGAIN}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: {name} has data_offsets {shown(offsets)}, which must be [begin, end]; {AGAIN}"
        )
    begin, end = offsets
    if end > len(values):
        raise CheckpointError(
            f"{path}: cut short, {name} ends at byte {end} of {len(values)}; copy the file again"
        )
    if math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != end - begin:
        raise CheckpointError(
            f"{path}: {name} has {end - begin} bytes, which are not {shape} of {dtype}; {AGAIN}"
        )
    return values[begin:end].view(DTYPES[dtype]).reshape(shape)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers, none negative."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_end_to_end(path: pathlib.Path, header: dict[str, Any], size: int) -> None:
    """Refuses tensors that overlap or leave gaps, and bytes after the last, as the format does."""
    before = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != before:
            what = "overlaps the tensor before it" if begin < before else "leaves a gap before it"
            raise CheckpointError(f"{path}: {name} {what} (byte {begin} for {before}); {AGAIN}")
        before = end
    if before != size:
        raise CheckpointError(
            f"{path}: {size - before} bytes too long for its header; copy the file again"
        )


def open_directory(directory: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory: the shards that its index names, or its one file.

    Raises:
      FileNotFoundError: there is neither an index nor a file, or a shard is missing.
      CheckpointError: a file is damaged, or its shard lacks a tensor that the index promises.
    """
    directory = pathlib.Path(directory)
    index, single = directory / INDEX, directory / SINGLE
    if not _named(index):
        if not _named(single):
            raise _no_weights(directory)
        return open_file(single)
    weight_map = _weight_map(index)
    if _named(single) and SINGLE not in weight_map.values():
        raise CheckpointError(
            f"{directory}: both {INDEX}, which names other files, and {SINGLE}: which of them is "
            "the model cannot be told; move the older one away"
        )
    wanted = sorted(set(weight_map.values()))
    if missing := [name for name in wanted if not _named(directory / name)]:
        raise FileNotFoundError(
            f"{directory}: {few(missing)} missing, of {len(wanted)} shards that {INDEX} names; "
            "copy or download again"
        )
    shards = {name: open_file(directory / name) for name in wanted}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{directory / shard}: the index promises {name}, the shard lacks it; copy both "
                "again from one source"
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> shard, as the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map is {shown(weight_map)}, but must name the shard of each tensor; "
            f"{AGAIN}"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
            raise CheckpointError(
                f"{index}: {name} is in {shown(shard)}, which is no file name; {AGAIN}"
            )
    return weight_map


def _named(path: pathlib.Path) -> bool:
    """Whether the directory has this name, if only as a link to nothing: its reading says so."""
    return path.exists() or path.is_symlink()


def _no_weights(directory: pathlib.Path) -> FileNotFoundError:
    """What is there instead of safetensors, and the remedy."""
    needed = f"neither {INDEX} nor {SINGLE}"
    names = sorted(path.name for path in directory.iterdir())
    if tensors := [name for name in names if name.endswith(".safetensors")]:
        return FileNotFoundError(
            f"{directory}: {few(tensors)} without {INDEX}, which says where each tensor is; copy "
            f"or download it (one file that holds everything is named {SINGLE})"
        )
    if others := [name for name in names if name.endswith(OTHER_FORMATS)]:
        return FileNotFoundError(
            f"{directory}: {needed}, but {few(others)}, a format that is not read; convert it: "
            "load it with transformers and `save_pretrained(out)`"
        )
    return FileNotFoundError(f"{directory}: {needed}; copy or download the weights")


def write_file(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file with these tensors, in their order."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, x in tensors.items():
        header[name] = {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [offset, offset + x.nbytes],
        }
        offset += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values then begin at a multiple of 8 bytes, as maps want
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def write_directory(
    directory: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    """Writes shards of at most about `shard_bytes` and their index; one shard is held in memory."""
    parts: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        write_file(directory / f"part-{len(parts):05d}", waiting)
        parts.append(list(waiting))
        waiting.clear()

    for name, x in tensors:
        if waiting and sum(y.nbytes for y in waiting.values()) + x.nbytes > shard_bytes:
            flush()
        waiting[name] = x
        total += x.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts):
        # a shard's published name holds their number, which is known only now
        shard = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        (directory / f"part-{i:05d}").rename(directory / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

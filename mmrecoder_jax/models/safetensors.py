"""Directories of safetensors files, read as memory maps and written shard by shard.

A file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape,
data_offsets}}, then the raw values. Needs NumPy alone, and ml_dtypes (which JAX brings) for
bfloat16.
"""

import json
import pathlib
from collections.abc import Iterable

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
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
      ValueError: it is not a safetensors file, or it ends before its tensors do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this shard of the checkpoint is missing")
    size = path.stat().st_size
    raw = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    if size < 8 or start > size:
        raise ValueError(f"{path}: {size} bytes are no safetensors file, or the file is cut short")
    try:
        header = json.loads(raw[8:start].tobytes())
    except ValueError as error:
        raise ValueError(f"{path}: the header is no JSON ({error})") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        if start + end > size:
            raise ValueError(
                f"{path}: cut short, {name} ends at byte {start + end} of {size}; "
                "copy the file again"
            )
        tensors[name] = (
            raw[start + begin : start + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        )
    return tensors


def open_directory(directory: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory: the shards that its index names, or its one file.

    Raises:
      FileNotFoundError: there is neither an index nor a file, or a shard is missing.
      ValueError: a file is damaged, or its shard lacks a tensor that the index promises.
    """
    directory = pathlib.Path(directory)
    if not (directory / INDEX).is_file():
        if not (directory / "model.safetensors").is_file():
            raise FileNotFoundError(f"{directory}: neither {INDEX} nor model.safetensors")
        return open_file(directory / "model.safetensors")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    shards = {name: open_file(directory / name) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ValueError(f"{directory / shard}: the index promises {name}, the shard lacks it")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


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

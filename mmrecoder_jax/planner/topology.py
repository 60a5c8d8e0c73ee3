"""TPU slices and nodes of GPUs by name, and their devices on a machine that has none.

XLA's TPU compiler describes the devices of a slice. Cloud names count chips (`v5e-16`, `v6e-8`) or
TensorCores, two per chip (`v5p-64` and `v4-64` are 32 chips). `v5e:4x4` names a shape, `h100:8`
eight GPUs, `4xv5e-256` four slices.

    v5e-8    8 chips    2x4          v5p-8     4 chips    2x2x1
    v5e-16   16 chips   4x4          v5p-64    32 chips   2x4x4
                                     tpu7x-8   4 chips    2x2x1, which JAX counts as 8 devices

No compiler for GPUs runs without one, so simulated devices of this machine's CPU stand in for them:
their programs are counted (`counted`) and not compiled.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from mmrecoder_jax.planner.machines import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip.

    Attributes:
      name: what the compiler calls it.
      dimensions: of the network between chips; 1 for GPUs, whose shape is their number.
      cores: that a cloud name counts per chip.
      hbm: bytes that a program may use of a device, a little less than it has.
      megacore: the chip's two cores work as one device, which the compiler must be told.
      per_chip: devices that JAX counts on a chip.
      compiled: whether its programs can be compiled without it.
    """

    name: str
    dimensions: int
    cores: int
    hbm: int
    megacore: bool = False
    per_chip: int = 1
    compiled: bool = True

    @property
    def chip(self) -> Chip:
        """Its speeds and its price."""
        return CHIPS[self.name]


GENERATIONS = {
    "v4": Generation("v4", 3, 2, int(30.75 * 2**30), megacore=True),
    "v5e": Generation("v5e", 2, 1, int(15.75 * 2**30)),
    "v5p": Generation("v5p", 3, 2, int(95.74 * 2**30)),
    "v6e": Generation("v6e", 2, 1, int(31.25 * 2**30)),
    "tpu7x": Generation("tpu7x", 3, 2, int(94.75 * 2**30), per_chip=2),
}
# Of what a GPU has, JAX is given 92 % (XLA_PYTHON_CLIENT_MEM_FRACTION; 75 % by default).
GPU_FRACTION = 0.92
GPUS = {
    name: Generation(name, 1, 1, int(GPU_FRACTION * gib * 2**30), compiled=False)
    for name, gib in (("a100", 79.3), ("h100", 79.6), ("h200", 140.4), ("b200", 179.0))
}
GPUS_OF_A_NODE = 8
# What clouds and people call a v5e and a TPU7x.
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x"}
HOST = (2, 2, 1)  # chips of one host in a three-dimensional network
# Chips -> shape of the v5e and v6e slices that the cloud rents out.
FLAT = {
    **{1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4)},
    **{32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
}
CUBES = (4, 8, 16, 32, 64, 128, 256)  # some of the chips that v4 and v5p slices may have


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice of `shape` chips, or a number of GPUs.

    Attributes:
      slices: of this kind that work together.
    """

    name: str
    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of one slice."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Of one slice, as JAX counts them."""
        return self.chips * self.generation.per_chip


def parse(name: str) -> Slice:
    """The slice of a cloud name or of `kind:shape`, the GPUs of `kind:number`.

    Raises:
      ValueError: says what is wrong with the name and which there are.
    """
    if several := re.fullmatch(r"(\d+)x([a-z].*)", name):
        count, one = int(several[1]), parse(several[2])
        if count < 2 or not one.generation.compiled:
            raise ValueError(f"slices {name!r}: name one slice as {one.name}, more as 2x{one.name}")
        return dataclasses.replace(one, name=name, slices=count)
    if gpus := re.fullmatch(r"(\w+):(\d+)", name):
        return _gpus(name, gpus[1], int(gpus[2]))
    match = re.fullmatch(r"(\w+)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    kind = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or kind not in GENERATIONS:
        raise ValueError(
            f"no TPU slice {name!r}: use a cloud name such as v5e-16, v5p-64, v6e-8, a shape such "
            f"as v5e:4x4, or GPUs such as h100:8; there are: {', '.join((*GENERATIONS, *GPUS))}"
        )
    generation = GENERATIONS[kind]
    if match[3]:
        shape = tuple(int(n) for n in match[3].split("x"))
        if len(shape) != generation.dimensions or min(shape) < 1:
            raise ValueError(
                f"slice {name!r}: a {kind} slice has {generation.dimensions} dimensions"
            )
        return Slice(name, generation, shape)
    return Slice(name, generation, _named_shape(name, kind, int(match[2])))


# What JAX calls the devices of a kind.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


def of_kind(kind: str, count: int) -> Slice | None:
    """What a process runs on, as a slice or GPUs of a known kind; None for another kind.

    Args:
      kind: what JAX calls the devices (`device_kind`).
      count: of devices.
    """
    gpu = re.search(r"\b([ABH]\d00)\b", kind)
    if gpu and gpu[1].lower() in GPUS:
        return Slice(kind, GPUS[gpu[1].lower()], (count,))
    if kind not in _KINDS:
        return None
    generation = GENERATIONS[_KINDS[kind]]
    return Slice(kind, generation, (max(1, count // generation.per_chip),))


def _gpus(name: str, kind: str, count: int) -> Slice:
    if kind not in GPUS:
        raise ValueError(
            f"no GPUs {name!r}: there are {', '.join(GPUS)}; a TPU slice has a shape, as v5e:4x4"
        )
    if count < 1 or (count > GPUS_OF_A_NODE and count % GPUS_OF_A_NODE):
        raise ValueError(
            f"GPUs {name!r}: use 1 to {GPUS_OF_A_NODE}, or whole nodes of {GPUS_OF_A_NODE}"
        )
    return Slice(name, GPUS[kind], (count,))


def _named_shape(name: str, kind: str, count: int) -> tuple[int, ...]:
    """The shape of a slice whose cloud name ends in this count."""
    generation = GENERATIONS[kind]
    chips, rest = divmod(count, generation.cores)
    flat = generation.dimensions == 2
    power_of_two = chips & (chips - 1) == 0
    if rest or (flat and chips not in FLAT) or not (flat or (chips >= 4 and power_of_two)):
        counts = ", ".join(str(n * generation.cores) for n in (FLAT if flat else CUBES))
        unit = "TensorCores" if generation.cores > 1 else "chips"
        raise ValueError(
            f"no TPU slice {name!r}: {kind} slices have {counts} {unit}; other shapes as "
            f"{kind}:AxB..."
        )
    return FLAT[chips] if flat else _cube(chips)


def devices(wanted: Slice) -> list[jax.Device]:
    """The devices of one slice, for `jax.jit(...).lower` and `compile` alone; simulated ones, for
    shapes alone, in place of GPUs.

    Raises:
      RuntimeError: the TPU compiler is not installed; names the extra. Or there are fewer simulated
        devices than GPUs (`jax_num_cpu_devices`).
    """
    if not wanted.generation.compiled:
        simulated = jax.devices("cpu")
        if len(simulated) < wanted.devices:
            raise RuntimeError(f"{len(simulated)} simulated devices for {wanted.name}")
        return simulated[: wanted.devices]
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            "the TPU compiler (libtpu) is not installed: pip install 'mmrecoder_jax[tpu]' brings "
            "it; no TPU is needed"
        )
    # There is no metadata server here to ask for the slice, and no chip that only one process may
    # use: libtpu would wait for the one and lock the other.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return list(_topology(wanted).devices)


@functools.cache
def _topology(wanted: Slice) -> topologies.TopologyDescription:
    generation = wanted.generation
    options: dict[str, Any] = {}
    if generation.megacore:
        options |= {
            "chip_config_name": "megacore",
            "chips_per_host_bounds": HOST,
            "num_slices": 1,
            "wrap": (False,) * 3,
        }
    elif wanted.chips == 1:
        options["chips_per_host_bounds"] = (1,) * max(3, generation.dimensions)
    shape = "x".join(map(str, wanted.shape))
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{generation.name}:{shape}", **options
    )


def _cube(chips: int) -> tuple[int, ...]:
    """As near to a cube as powers of two allow: 4 -> 2x2x1, 8 -> 2x2x2, 32 -> 2x4x4."""
    if chips == 4:
        return (2, 2, 1)
    shape = [1, 1, 1]
    for _ in range(chips.bit_length() - 1):
        shape[shape.index(min(shape), 0)] *= 2
        shape.sort()
    return tuple(shape)

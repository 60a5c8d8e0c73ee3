"""TPU slices by name, and their devices as XLA's TPU compiler describes them on a machine that has
none.

Cloud names count chips (`v5e-16`, `v6e-8`) or TensorCores, two a chip (`v5p-64` and `v4-64` are 32
chips). `v5e:4x4` names a shape. HBM is what the compiler lets a program use.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of chip; a chip is one device."""

    topology: str  # what the compiler calls it
    dimensions: int  # of the network
    cores: int  # that a cloud name counts for each chip
    host: tuple[int, ...]  # chips of one host
    hbm: int  # bytes a program may use
    megacore: bool = False


GENERATIONS = {
    "v4": Generation("v4", 3, 2, (2, 2, 1), int(30.75 * 2**30), megacore=True),
    "v5e": Generation("v5e", 2, 1, (2, 2), int(15.75 * 2**30)),
    "v5p": Generation("v5p", 3, 2, (2, 2, 1), int(95.74 * 2**30)),
    "v6e": Generation("v6e", 2, 1, (2, 2), int(31.25 * 2**30)),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
# chips -> v5e and v6e slices
FLAT = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of `shape` chips."""

    name: str
    generation: Generation
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)


def parse(name: str) -> Slice:
    """The slice of a cloud name or of `kind:shape`.

    Raises:
      ValueError: says what is wrong with the name and which there are.
    """
    match = re.fullmatch(r"(\w+)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    kind = ALIASES.get(match[1], match[1]) if match else None
    if kind not in GENERATIONS:
        raise ValueError(
            f"no TPU slice {name!r}: use a cloud name such as v5e-16, v5p-64, v6e-8 or a shape such as v5e:4x4; {_kinds()}"
        )
    generation = GENERATIONS[kind]
    if match[3]:
        shape = tuple(int(n) for n in match[3].split("x"))
        if len(shape) != generation.dimensions or min(shape) < 1:
            raise ValueError(
                f"slice {name!r}: a {kind} slice has {generation.dimensions} dimensions"
            )
        return Slice(name, generation, shape)
    chips, rest = divmod(int(match[2]), generation.cores)
    if (
        rest
        or (generation.dimensions == 2 and chips not in FLAT)
        or (generation.dimensions == 3 and (chips < 4 or chips & (chips - 1)))
    ):
        counts = ", ".join(
            str(n * generation.cores)
            for n in (FLAT if generation.dimensions == 2 else (4, 8, 16, 32, 64, 128, 256))
        )
        unit = "TensorCores" if generation.cores > 1 else "chips"
        raise ValueError(
            f"no TPU slice {name!r}: {kind} slices have {counts} {unit}; other shapes as {kind}:AxB..."
        )
    return Slice(name, generation, FLAT[chips] if generation.dimensions == 2 else _cube(chips))


def devices(wanted: Slice) -> list[Any]:
    """The slice's devices, for `jax.jit(...).lower` and `compile` alone.

    Raises:
      RuntimeError: the TPU compiler is not installed; names the extra.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            "the TPU compiler (libtpu) is not installed: pip install 'mmrecoder_jax[tpu]' brings "
            "it; no TPU is needed"
        )
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        # no metadata server here, and no lock that keeps a second process out
        os.environ.setdefault(variable, value)
    return list(_topology(wanted).devices)


@functools.cache
def _topology(wanted: Slice):
    from jax.experimental import topologies

    generation = wanted.generation
    options: dict[str, Any] = {}
    if generation.megacore:
        options |= {
            "chip_config_name": "megacore",
            "chips_per_host_bounds": generation.host,
            "num_slices": 1,
            "wrap": (False,) * 3,
        }
    elif wanted.chips == 1:
        options["chips_per_host_bounds"] = (1,) * max(3, generation.dimensions)
    shape = "x".join(map(str, wanted.shape))
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{generation.topology}:{shape}", **options
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


def _kinds() -> str:
    return f"there are: {', '.join(GENERATIONS)}"

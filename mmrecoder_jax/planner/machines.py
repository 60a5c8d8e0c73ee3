"""Chips by their makers' data sheets, and what an hour of one costs: the facts behind `estimate`.

Speeds are those of one device as JAX counts them: a TPU7x chip has two. `link` is what a device
receives from the others of its slice or node (half of what is published for both directions),
`network` from other slices or nodes. Prices are list prices on demand in autumn 2026, in USD and in
the United States: of Google Cloud for TPUs, of clouds that rent out GPUs for those (they differ
threefold). `--price` replaces them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The speeds of one device.

    Attributes:
      flops: bfloat16 matmul flops a second, without sparsity.
      bandwidth: bytes that it reads or writes of its memory a second.
      link: bytes a second from its neighbours.
      network: bytes a second from other slices or nodes.
      cores: of the host's CPU, for each device.
      price: USD of an hour, or None where no list names one.
    """

    flops: float
    bandwidth: float
    link: float
    network: float
    cores: float
    price: float | None


CHIPS = {
    "v4": Chip(275e12, 1.228e12, 300e9, 6.25e9, 60, 3.22),
    "v5e": Chip(197e12, 0.819e12, 200e9, 6.25e9, 28, 1.20),
    "v5p": Chip(459e12, 2.765e12, 600e9, 6.25e9, 52, 4.20),
    "v6e": Chip(918e12, 1.640e12, 400e9, 12.5e9, 45, 2.70),
    "tpu7x": Chip(1153e12, 3.69e12, 300e9, 12.5e9, 28, None),
    "a100": Chip(312e12, 2.04e12, 300e9, 25e9, 12, 1.50),
    "h100": Chip(989e12, 3.35e12, 450e9, 50e9, 26, 3.00),
    "h200": Chip(989e12, 4.80e12, 450e9, 50e9, 28, 4.00),
    "b200": Chip(2250e12, 8.00e12, 900e9, 50e9, 28, 6.00),
}

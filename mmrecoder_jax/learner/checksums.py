"""A number of each array by which a checkpoint shows that its bytes came back as they were saved.

Files of arrays are compressed and have no checksums: with one bit of them flipped they are mostly
read without an error, and weights are others. So the numbers are taken of the arrays themselves,
before a save and after a restore. They are computed where the arrays are and depend on no mesh:

    x          1.0          -2.0         0.5          its bits as integers, in order of the elements
    mixed      m(x0, 0)     m(x1, 1)     m(x2, 2)     with their places; one to one for each place
    checksum   m(x0, 0) + m(x1, 1) + m(x2, 2)         modulo 2^32

A change of one element always shows; other changes are missed once in 2^32 times.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an element


def checksums(tree: Any) -> dict[str, str]:
    """The type and the checksum of each array, by its path; the same on all hosts, which call this
    together.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    if not found:
        return {}
    sums = np.asarray(_sums([leaf for _, leaf in found]))
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype} {number:08x}"
        for (path, leaf), number in zip(found, sums, strict=True)
    }


def changed(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Paths of arrays that are not what they were; one that was read as another type is not
    compared.
    """
    return [
        path
        for path, number in now.items()
        if path in saved and _type(saved[path]) == _type(number) and saved[path] != number
    ]


def _type(number: str) -> str:
    return number.partition(" ")[0]


@jax.jit
def _sums(leaves: Sequence[Array]) -> Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(x: Array) -> Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mixed(bits ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: Array) -> Array:
    """One to one on 32 bits, every bit of the result depends on every bit (MurmurHash3's end)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)

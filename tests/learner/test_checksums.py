"""What a checksum notices, and what it does not depend on."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.learner.checksums import changed, checksums

TYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8, jnp.bool_)


def values(kind, shape=(3, 5)) -> np.ndarray:
    numbers = np.random.default_rng(0).normal(size=shape) * 3
    return np.asarray(jnp.asarray(numbers).astype(kind))


def flipped(x: np.ndarray, byte: int, bit: int) -> np.ndarray:
    data = bytearray(x.tobytes())
    data[byte] ^= 1 << bit
    return np.frombuffer(bytes(data), x.dtype).reshape(x.shape)


@pytest.mark.parametrize("kind", TYPES[:-1])
def test_every_single_bit_counts(kind):
    x = values(kind, (2, 3))
    saved = checksums({"x": jnp.asarray(x)})
    for byte in range(x.nbytes):
        for bit in range(8):
            assert changed(saved, checksums({"x": jnp.asarray(flipped(x, byte, bit))}))


@pytest.mark.parametrize("kind", TYPES)
def test_the_same_values_have_the_same_sum(kind):
    x = values(kind)
    assert checksums({"x": jnp.asarray(x)}) == checksums({"x": jnp.asarray(x.copy())})


def test_what_changes_its_place_or_its_sign_of_zero_shows():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    for other in (x[::-1], x[:, ::-1], np.roll(x, 1), -x):
        assert changed(checksums({"x": x}), checksums({"x": other.copy()}))
    assert changed(checksums({"x": np.zeros(3)}), checksums({"x": -np.zeros(3)}))


def test_the_array_is_named_and_others_are_not():
    saved = checksums({"a": {"kernel": jnp.ones(3)}, "b": jnp.ones(3)})
    now = checksums({"a": {"kernel": jnp.ones(3)}, "b": jnp.ones(3) * 2})
    assert changed(saved, now) == ["['b']"]


def test_another_type_and_arrays_of_one_side_alone_are_not_compared():
    saved = checksums({"a": jnp.ones(3), "gone": jnp.ones(1)})
    assert changed(saved, checksums({"a": jnp.ones(3, jnp.bfloat16), "new": jnp.ones(2)})) == []


def test_a_tree_without_arrays_has_no_sums():
    assert checksums({}) == {} and checksums({"x": jnp.zeros((0, 3))})


def test_the_mesh_does_not_matter():
    """Four devices, in a process of its own: the sum of an array that is cut two ways."""
    program = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mmrecoder_jax.learner.checksums import checksums
from mmrecoder_jax.models.sharding import make_mesh
x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
mesh = make_mesh(1, 2, 2)
cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
assert len(cut.addressable_shards) == 4
assert checksums({"x": cut}) == checksums({"x": x}), "cut"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

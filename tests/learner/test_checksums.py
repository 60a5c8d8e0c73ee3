"""What a checksum notices, and what it does not depend on."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mmrecoder_jax.learner.checksums import changed, checksums
from tests.learner.processes import run

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


PROGRAM = """
import os
import jax
hosts = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
jax.config.update("jax_num_cpu_devices", 4 // hosts)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mmrecoder_jax.learner import distributed
from mmrecoder_jax.learner.checksums import checksums
from mmrecoder_jax.models.sharding import make_mesh
distributed.start()
x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
cut = NamedSharding(make_mesh(1, 2, 2), PartitionSpec("fsdp", "tensor"))
array = jax.make_array_from_callback(x.shape, cut, lambda part: x[part])
assert array.addressable_shards[0].data.shape == (4, 2)
assert array.is_fully_addressable == (hosts == 1)
assert checksums({"x": array}) == checksums({"x": x})
"""


@pytest.mark.parametrize("hosts", [1, 2])
def test_neither_the_mesh_nor_the_number_of_hosts_matters(hosts):
    """The sum of an array that is cut over four devices."""
    run([sys.executable, "-c", PROGRAM], hosts)

"""Names of slices; their devices where the TPU compiler is installed."""

import importlib.util

import pytest

from mmrecoder_jax.planner import topology


@pytest.mark.parametrize(
    "name, shape",
    [
        ("v5e-1", (1, 1)),
        ("v5e-8", (2, 4)),
        ("v5litepod-16", (4, 4)),
        ("v5e-256", (16, 16)),
        ("v6e-8", (2, 4)),
        ("v5p-8", (2, 2, 1)),
        ("v5p-16", (2, 2, 2)),
        ("v5p-64", (2, 4, 4)),
        ("v5p-512", (4, 8, 8)),
        ("v4-16", (2, 2, 2)),
        ("v5e:4x8", (4, 8)),
        ("v5p:2x2x4", (2, 2, 4)),
    ],
)
def test_shapes(name, shape):
    parsed = topology.parse(name)
    assert (parsed.name, parsed.shape) == (name, shape)


def test_a_v5p_name_counts_two_cores_a_chip():
    assert topology.parse("v5p-64").chips == 32
    assert topology.parse("v5e-64").chips == 64


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9-8", "there are: v4, v5e, v5p, v6e"),
        ("v5e16", "use a cloud name such as v5e-16"),
        ("v5e-12", "v5e slices have 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("v5p-6", "v5p slices have 8, 16, 32, 64, 128, 256, 512 TensorCores"),
        ("v5p-9", "TensorCores"),
        ("v5e:2x2x2", "a v5e slice has 2 dimensions"),
        ("v5p:4x4", "a v5p slice has 3 dimensions"),
    ],
)
def test_a_name_that_is_none(name, message):
    with pytest.raises(ValueError, match=message):
        topology.parse(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"mmrecoder_jax\[tpu\]"):
        topology.devices(topology.parse("v5e-8"))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (extra tpu)"
)
@pytest.mark.parametrize("name", ["v5e-1", "v5e-16", "v6e-8", "v5p-64", "v4-16"])
def test_devices_are_chips(name):
    wanted = topology.parse(name)
    found = topology.devices(wanted)
    assert len(found) == wanted.chips and found[0].platform == "tpu"

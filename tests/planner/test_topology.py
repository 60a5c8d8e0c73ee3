"""Names of slices; their devices where the TPU compiler is installed."""

import importlib.util

import jax
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
        ("tpu7x-8", (2, 2, 1)),
        ("v7x-16", (2, 2, 2)),
        ("h100:8", (8,)),
        ("h200:1", (1,)),
        ("b200:16", (16,)),
        ("4xv5e-256", (16, 16)),
        ("2xv5p:2x2x4", (2, 2, 4)),
    ],
)
def test_shapes(name, shape):
    parsed = topology.parse(name)
    assert (parsed.name, parsed.shape) == (name, shape)


def test_a_v5p_name_counts_two_cores_a_chip():
    assert topology.parse("v5p-64").chips == 32
    assert topology.parse("v5e-64").chips == 64


def test_a_chip_may_be_two_devices_and_slices_may_be_several():
    ironwood = topology.parse("tpu7x-8")
    assert (ironwood.chips, ironwood.devices, ironwood.slices) == (4, 8, 1)
    several = topology.parse("4xv5e-256")
    assert (several.chips, several.devices, several.slices) == (256, 256, 4)


def test_every_kind_has_its_facts():
    for generation in (*topology.GENERATIONS.values(), *topology.GPUS.values()):
        chip = generation.chip
        assert chip.flops > 1e14 and chip.bandwidth > chip.link > chip.network > 1e9
        assert generation.hbm < 2e11


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_devices_that_are_there_are_known_by_their_kind(kind, name):
    found = topology.of_kind(kind, 8)
    assert found.generation.name == name and found.devices == 8


def test_of_other_devices_nothing_is_known():
    assert topology.of_kind(jax.devices()[0].device_kind, 1) is None
    assert topology.of_kind("NVIDIA T400", 1) is None


def test_gpus_are_simulated_devices():
    assert len(topology.devices(topology.parse("h100:1"))) == 1
    with pytest.raises(RuntimeError, match="simulated devices for h100:800"):
        topology.devices(topology.parse("h100:800"))


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
        ("t4:8", "there are a100, h100, h200, b200"),
        ("h100:0", "use 1 to 8"),
        ("h100:12", "whole nodes of 8"),
        ("1xv5e-8", "name one slice as v5e-8"),
        ("2xh100:8", "name one slice as h100:8"),
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
@pytest.mark.parametrize("name", ["v5e-1", "v5e-16", "v6e-8", "v5p-64", "v4-16", "tpu7x-8"])
def test_devices_are_chips(name):
    wanted = topology.parse(name)
    found = topology.devices(wanted)
    assert len(found) == wanted.devices and found[0].platform == "tpu"

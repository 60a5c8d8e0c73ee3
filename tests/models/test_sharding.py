"""The rules, and that they change nothing: equal loss, gradients and decoding on 1, 2, 4 and 8
simulated devices.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from mmrecoder_jax.models import sharding
from mmrecoder_jax.models.config import PRESETS, LoraConfig
from mmrecoder_jax.models.qwen2_5_vl import init_params


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_has_exactly_one_rule_and_every_rule_a_parameter(name):
    config = dataclasses.replace(PRESETS[name], lora=LoraConfig(8))
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    paths = [
        "/".join(key.key for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(abstract)
    ]
    for path in paths:
        assert sum(bool(re.search(pattern, path)) for pattern, _ in sharding.RULES) == 1, path
    for pattern, _ in sharding.RULES:
        assert any(re.search(pattern, path) for path in paths), pattern


def test_specs_of_the_7b_on_4_by_4():
    mesh = {"data": 1, "fsdp": 4, "tensor": 4}
    spec = sharding.param_spec
    assert spec("model/layers/self_attn/q_proj/kernel", (28, 3584, 3584), mesh) == PartitionSpec(
        None, ("fsdp",), ("tensor",)
    )
    assert spec("mu/model/layers/mlp/down_proj/kernel", (28, 18944, 3584), mesh) == PartitionSpec(
        None, ("tensor",), ("fsdp",)
    )
    assert spec(
        "visual/blocks/window/mlp/gate_proj/kernel", (4, 7, 1280, 3420), mesh
    ) == PartitionSpec(None, None, ("fsdp",), ("tensor",))
    assert spec("lm_head/weight", (152064, 3584), mesh) == PartitionSpec(("tensor",), ("fsdp",))
    assert spec("model/norm/weight", (3584,), mesh) == PartitionSpec(None)
    assert spec("model/layers/mlp/up_proj/lora_a", (28, 3584, 16), mesh) == PartitionSpec(
        None, ("fsdp",), None
    )
    assert spec("model/layers/self_attn/o_proj/lora_b", (28, 16, 3584), mesh) == PartitionSpec(
        None, None, ("fsdp",)
    )
    assert spec("count", (), mesh) == PartitionSpec()


def test_of_a_matmul_moves_what_is_smaller():
    """Sizes of the 7B on 2 x 4 x 2: kernels stay cut over `tensor` either way."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 4, 2), sharding.AXES)):
        for name, shape, gathered, cut in (
            ("mlp/up_proj/kernel", (3584, 18944), (None, "tensor"), ("fsdp", None)),
            ("mlp/down_proj/kernel", (18944, 3584), ("tensor", None), (None, "fsdp")),
            ("lm_head/weight", (152064, 3584), ("tensor", None), (None, "fsdp")),
        ):
            whole, few = sharding.gathered_or_cut(name, shape, 128, 64 * sum(shape))
            assert (whole, few) == (PartitionSpec(*gathered), PartitionSpec(*cut))
            assert sharding.gathered_or_cut(name, shape, 16 * 8192, 8 * 8192 * sum(shape)) == (
                whole,
                None,
            )
            # not every device has a row
            assert sharding.gathered_or_cut(name, shape, 12, 6 * sum(shape)) == (
                whole,
                None,
            )


def test_a_dimension_that_does_not_divide_stays_whole():
    assert sharding.param_spec(
        "a/q_proj/kernel", (6, 9), {"fsdp": 4, "tensor": 3}
    ) == PartitionSpec(None, ("tensor",))
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 4, 1), sharding.AXES)):
        assert sharding.activation_spec((6,), "batch") == PartitionSpec(("data",))


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of a host, as far as a mesh asks."""

    id: int
    process_index: int


def test_a_host_cuts_its_rows_into_its_share_of_the_batch_axes():
    devices = np.array([Device(i, i // 4) for i in range(8)])  # 2 hosts
    shares = {(4, 2, 1): 4, (4, 1, 2): 2, (1, 2, 4): 1}
    for shape, ways in shares.items():
        assert sharding.host_ways(Mesh(devices.reshape(shape), sharding.AXES)) == ways
    with pytest.raises(ValueError, match="1 rows of devices cannot be shared by 2 hosts"):
        sharding.host_ways(Mesh(devices.reshape(1, 1, 8), sharding.AXES))


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="no sharding rule for parameter 'new/kernel'"):
        sharding.param_spec("new/kernel", (2, 2), {})


def test_constrain_is_nothing_outside_a_mesh_and_counts_dimensions_inside():
    x = jax.numpy.zeros((2, 3))
    assert sharding.constrain(x, "batch") is x
    with jax.set_mesh(sharding.make_mesh()):
        assert (
            jax.jit(lambda x: sharding.constrain(x, "batch", "heads"))(x).sharding.mesh.axis_names
            == sharding.AXES
        )
        with pytest.raises(ValueError, match="1 names"):
            sharding.constrain(x, "batch")


@pytest.mark.parametrize("axes", [{"data": 3}, {"fsdp": 0}, {"data": -1, "fsdp": -1}])
def test_a_mesh_that_does_not_fill_the_devices_is_refused(axes):
    with pytest.raises(ValueError, match="does not fill 1 devices"):
        sharding.make_mesh(**axes, devices=jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """Stands in for a device of a slice; `Mesh` asks for no more."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "stand-in"
    process_index: int = 0


def slices_of(*counts, platform="gpu"):
    owners = [owner for owner, count in enumerate(counts) for _ in range(count)]
    return [SliceDevice(number, owner, platform) for number, owner in enumerate(owners)]


def test_data_is_cut_over_slices_first(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    devices = slices_of(4, 4)
    mixed = [devices[i] for i in (4, 0, 5, 1, 6, 2, 7, 3)]
    mesh = sharding.make_mesh(4, -1, 1, mixed, slices=2)
    assert mesh.devices.shape == (4, 2, 1)
    owners = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert owners == [{0}, {0}, {1}, {1}], "fsdp or tensor goes over the slower network"
    assert len({device.id for device in mesh.devices.flat}) == 8


@pytest.mark.parametrize(
    "axes, slices, devices, said",
    [
        ((1, -1, 1), 2, slices_of(4, 4), "mesh.data=1 cannot be shared by mesh.slices=2"),
        ((3, 2, 1), 2, slices_of(3, 3), "mesh.data=3 cannot be shared by mesh.slices=2"),
        ((2, -1, 1), 2, slices_of(8), "mesh.slices=2, but the devices are of slices with 8 each"),
        ((2, -1, 1), 2, slices_of(4, 2), "the devices are of slices with 4, 2 each"),
        (
            (2, -1, 1),
            1,
            slices_of(4, 4, platform="tpu"),
            "of 2 slices and mesh.slices=1: use mesh.slices=2",
        ),
    ],
)
def test_slices_that_do_not_fit_are_refused(axes, slices, devices, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=said) as refusal:
        sharding.make_mesh(*axes, devices, slices)
    assert "\n" not in str(refusal.value)


def test_devices_without_slices_are_refused():
    with pytest.raises(ValueError, match=r"mesh.slices=2: cpu devices are of no slices; use 1"):
        sharding.make_mesh(devices=jax.devices()[:1], slices=2)


def report(shapes):
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.models.sharded_main", json.dumps(shapes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(shapes):
    for shape, errors in report(shapes).items():
        assert errors["loss"] < 1e-5 and errors["gradient"] < 1e-5 and errors["decode"] < 2e-5, (
            shape,
            errors,
        )
        data, fsdp, tensor = map(int, shape.split("x"))
        assert (errors["cut"] > 0) == (fsdp * tensor > 1) and data
        if fsdp > 1 and tensor == 1:  # to decode, rows move and kernels stay
            assert 0 < errors["received"] < 0.5 * errors["kernels"], (shape, errors)


def test_eight_devices_compute_what_one_does():
    check([[2, 2, 2], [1, 8, 1]])


@pytest.mark.slow
def test_every_mesh_computes_what_one_device_does():
    """Every way to share 1, 2, 4 and 8 devices among the axes that the small model's sizes divide
    (others leave dimensions whole).
    """
    shapes = [
        [d, f, t]
        for d in (1, 2, 4, 8)
        for f in (1, 2, 4, 8)
        for t in (1, 2, 4, 8)
        if d * f * t in (1, 2, 4, 8)
    ]
    assert len(shapes) == 1 + 3 + 6 + 10
    check(shapes)

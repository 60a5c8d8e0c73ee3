"""Where every array is: the mesh, one table of rules for parameters, one for activations.

The mesh has three axes. `data` copies the parameters. `fsdp` cuts each of them: a layer is gathered
when it runs, or few rows travel to its parts (`matmul`). `tensor` splits heads, the MLP and the
vocabulary. The batch is cut over `data` and `fsdp` together.

A dimension that its mesh axes do not divide stays whole, so one table serves every size: the tiny
preset runs on 8 devices with most of its arrays copied.
"""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# The first pattern found in a parameter's path decides. The spec is for the last dimensions;
# stacked layers in front stay whole.
RULES = (
    (r"(embed_tokens|lm_head)/weight$", PartitionSpec("tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(q|k|v|gate|up)_proj/bias$", PartitionSpec("tensor")),
    (r"(o|down)_proj/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/lora_a$", PartitionSpec("fsdp", None)),
    (r"(q|k|v|gate|up)_proj/lora_b$", PartitionSpec(None, "tensor")),
    (r"(o|down)_proj/lora_a$", PartitionSpec("tensor", None)),
    (r"(o|down)_proj/lora_b$", PartitionSpec(None, "fsdp")),
    (r"attn/qkv/kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"attn/qkv/bias$", PartitionSpec(None, "tensor")),
    (r"attn/proj/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"patch_embed/proj/kernel$", PartitionSpec(None, "fsdp")),
    (r"merger/mlp_0/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"merger/mlp_0/bias$", PartitionSpec("tensor")),
    (r"merger/mlp_2/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"/(down_proj|proj|mlp_2)/bias$", PartitionSpec()),
    (r"(norm\d?|ln_q)/weight$", PartitionSpec()),
)

# What `constrain` understands: the name of an activation's dimension -> mesh axes.
NAMES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    # Between layers, where no token needs another: what is kept of a layer for the backward pass is
    # then cut over `tensor` too.
    "sequence": ("tensor",),
    "embed": (),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
) -> Mesh:
    """The mesh over `devices` (all there are when None).

    Over several slices `data` is cut first, so each slice has whole copies of the model: inside a
    slice chips exchange parameters and activations, between slices gradients alone.

    Args:
      data, fsdp, tensor: sizes of the axes; one may be -1 and takes what the others leave.
      slices: of TPUs, or nodes of GPUs, that are joined by a slower network.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or the devices are not of so
        many slices, or `data` cannot be shared by them.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [data, fsdp, tensor]
    if shape.count(-1) == 1:
        rest = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = len(devices) // rest if rest > 0 else 0
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fill {len(devices)} devices"
        )
    _check_slices(slices, shape[0], devices)
    # split physical axes: tensor=2 is half an axis of a 16 x 16 slice
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            [shape[0] // slices, *shape[1:]],
            [slices, 1, 1],
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _check_slices(slices: int, data: int, devices: Sequence[jax.Device]) -> None:
    """Raises ValueError where devices are not of so many slices of one size, or do not say."""
    found = collections.Counter(getattr(device, "slice_index", None) for device in devices)
    if slices == 1:
        # GPUs say in which node they are; there a mesh may be laid over all as it comes.
        if len(found) > 1 and devices[0].platform == "tpu":
            raise ValueError(
                f"the devices are of {len(found)} slices and mesh.slices=1: use "
                f"mesh.slices={len(found)} and mesh.data, a multiple of it"
            )
        return
    if None in found:
        raise ValueError(
            f"mesh.slices={slices}: {devices[0].platform} devices are of no slices; use 1"
        )
    if len(found) != slices or len(set(found.values())) > 1:
        sizes = ", ".join(str(count) for _, count in sorted(found.items()))
        raise ValueError(f"mesh.slices={slices}, but the devices are of slices with {sizes} each")
    if data % slices:
        raise ValueError(
            f"mesh.data={data} cannot be shared by mesh.slices={slices}: use a multiple of it"
        )


def host_ways(mesh: Mesh) -> int:
    """The number of parts into which the batch axes cut one host's rows.

    On 2 hosts with 4 devices each, `data=4, tensor=2` gives 2: a host's rows are cut in two.

    Raises:
      ValueError: hosts cannot share the batch axes equally.
    """
    hosts = len({device.process_index for device in mesh.devices.flat})
    rows = math.prod(mesh.shape[axis] for axis in NAMES["batch"])
    if rows % hosts:
        raise ValueError(
            f"mesh.data*mesh.fsdp={rows} rows of devices cannot be shared by {hosts} hosts"
        )
    return rows // hosts


def param_shardings(abstract_params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a tree of parameters.

    The tree may also hold such trees, as an optimizer's state does: only the end of a path counts.

    Raises:
      ValueError: no rule names a leaf.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(path_name(path), leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(one, abstract_params)


def path_name(path: Sequence[Any]) -> str:
    """A path of `jax.tree_util` as the rules read it: "model/layers/mlp/up_proj/kernel"."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks that `x` be cut over the mesh of `jax.set_mesh` by the names of its dimensions.

    Args:
      names: for each dimension one of `NAMES`, or None to leave it whole.

    Returns:
      `x`; outside a mesh unchanged.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, *names))


def matmul(
    x: jax.Array, kernel: jax.Array, path: str, contracted: int = 0, result_type: Any = None
) -> jax.Array:
    """`x` `[rows, D]` times the parameter at `path`, as `[rows, ...]`.

    Moves the smaller operand over `fsdp`. For many rows (training, prompts) the kernel is gathered,
    in the type of compute: left to itself, the partitioner passes float32 shards around a ring. For
    few rows (decoding), sends the rows to the kernel's shards and scatters the results back.

    Args:
      contracted: which dimension of the kernel is D.
      result_type: type of the product; that of `x` when None.
    """

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x, kernel, (((1,), (contracted,)), ((), ())), preferred_element_type=result_type
        )

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return product(x, kernel)
    # what a device receives when rows move: its rows of x, and their products
    received = x.shape[0] // mesh.shape["data"] * (x.shape[1] + kernel.size // x.shape[1])
    whole, by_part = gathered_or_cut(path, kernel.shape, x.shape[0], received)
    if by_part is None:
        return product(x, jax.lax.with_sharding_constraint(kernel, whole))
    outer = [axis for i, axis in enumerate(by_part) if i != contracted]

    def meet(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if "fsdp" in outer:
            y = product(jax.lax.all_gather(x, "fsdp", tiled=True), kernel)
            return jax.lax.all_to_all(y, "fsdp", 0, 1 + outer.index("fsdp"), tiled=True)
        y = product(jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), kernel)
        return jax.lax.psum_scatter(y, "fsdp", tiled=True)

    return _by_rows(meet, by_part)(x, kernel)


def take_rows(table: jax.Array, index: jax.Array, path: str, dtype: Any) -> jax.Array:
    """`table[index]` in `dtype`: rows `[B, L, D]` of the parameter `[V, D]` at `path`.

    For few tokens, every device reads its part of all rows and sends it to the rows' owners. For
    more tokens than the table is wide, the table is gathered: a device then reads only the rows of
    its own tokens, and in the backward pass adds up only their gradients. A TPU does that row after
    row, so their number matters more than the bytes of the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table[index].astype(dtype)
    whole, by_part = gathered_or_cut(
        path, table.shape, index.shape[0], index.size // mesh.shape["data"] * table.shape[0]
    )
    if by_part is None:
        return jax.lax.with_sharding_constraint(table.astype(dtype), whole)[index]

    def meet(index: jax.Array, table: jax.Array) -> jax.Array:
        rows = table[jax.lax.all_gather(index, "fsdp", tiled=True)].astype(dtype)
        return jax.lax.all_to_all(rows, "fsdp", 0, 2, tiled=True)

    return _by_rows(meet, by_part)(index, table)


def gathered_or_cut(
    path: str, shape: Sequence[int], rows: int, cost: int
) -> tuple[PartitionSpec, PartitionSpec | None]:
    """(spec of a parameter gathered over `fsdp`; its cuts by `fsdp` alone if rows move, else None).

    Rows move when all devices have equally many and `cost`, the values that a device receives for
    them, is below the size of the parameter.
    """
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    spec = param_spec(path, shape, mesh_shape)
    # PartitionSpec shows a lone axis as its name
    axes = [
        () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec
    ]
    whole = PartitionSpec(
        *(tuple(axis for axis in dimension if axis != "fsdp") or None for dimension in axes)
    )
    by_part = PartitionSpec(*("fsdp" if "fsdp" in dimension else None for dimension in axes))
    cut = mesh_shape["fsdp"] > 1 and "fsdp" in by_part
    even = rows % (mesh_shape["data"] * mesh_shape["fsdp"]) == 0
    return whole, by_part if cut and even and cost < math.prod(shape) else None


def _by_rows(meet: Callable[..., jax.Array], by_part: PartitionSpec) -> Callable[..., jax.Array]:
    """`meet(rows, parameter)` on each device's rows and its part of the parameter.

    The partitioner still decides over `tensor`.
    """
    by_row = PartitionSpec(NAMES["batch"])
    return jax.shard_map(
        meet,
        in_specs=(by_row, by_part),
        out_specs=by_row,
        axis_names=set(NAMES["batch"]),
        check_vma=False,
    )


def activation_spec(shape: Sequence[int], *names: str | None) -> PartitionSpec:
    """How an activation is cut over the mesh of `jax.set_mesh`, by the names of its dimensions."""
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} names {names} for an array of shape {tuple(shape)}")
    mesh = jax.sharding.get_abstract_mesh()
    # inside a shard_map over some axes, only the others can be asked for
    axes = [
        tuple(axis for axis in NAMES[name] if axis not in mesh.manual_axes) if name else ()
        for name in names
    ]
    return _fit(axes, shape, mesh.shape)


def each_on_its_rows(function: Callable[..., Any], whole: jax.Array, *rows: jax.Array) -> Any:
    """`function(whole, *rows)`, where every device computes on the rows that it holds alone.

    The results are by rows too. The gradient of `whole` is then summed over devices once, instead
    of in every turn of a loop inside. The partitioner still decides over `tensor`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in NAMES["batch"])
    if ways == 1 or rows[0].shape[0] % ways:
        return function(whole, *rows)
    by_row = PartitionSpec(NAMES["batch"])
    specs = (PartitionSpec(), *[by_row] * len(rows))
    return jax.shard_map(
        function, in_specs=specs, out_specs=by_row, axis_names=set(NAMES["batch"]), check_vma=False
    )(whole, *rows)


def own_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]`, where `index` `[B, L]` counts within a device's own part of `table` `[U, D]`,
    and zeros where it is negative.

    Both are cut over the batch axes. On 2 devices with 4 visual tokens each, index 1 of a row on
    the second device is row 5 of the whole table. No device asks for another's rows, so what moves
    does not grow with the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in NAMES["batch"])

    def taken(table: jax.Array, index: jax.Array) -> jax.Array:
        # In the backward pass nothing is added up for what is negative, instead of many zeros to
        # one row.
        where = jnp.where(index < 0, table.shape[0], index)
        return table.at[where].get(mode="fill", fill_value=0)

    # what does not divide cannot have been cut
    if ways == 1 or table.shape[0] % ways or index.shape[0] % ways:
        return taken(table, index)
    by_row = PartitionSpec(NAMES["batch"])
    take = jax.shard_map(
        taken,
        in_specs=by_row,
        out_specs=by_row,
        axis_names=set(NAMES["batch"]),
        check_vma=False,
    )
    return take(table, index)


def by_rows(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` on each device's own part of all arrays, which are cut over the batch axes
    along axis 0, as the results are. Numbers of rows count within the part.

    The partitioner still decides over `tensor`. Parts must be equal where there are several.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in NAMES["batch"])
    if ways == 1:
        return function(*args)
    by_row = PartitionSpec(NAMES["batch"])
    return jax.shard_map(
        function,
        in_specs=(by_row,) * len(args),
        out_specs=by_row,
        axis_names=set(NAMES["batch"]),
        check_vma=False,
    )(*args)


def local_shape(shape: Sequence[int], *names: str | None) -> tuple[int, ...]:
    """The shape of one device's part of an activation; outside a mesh the shape itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tuple(shape)
    return NamedSharding(mesh, activation_spec(shape, *names)).shard_shape(tuple(shape))


def mesh_platform() -> str:
    """The platform ("cpu", "gpu", "tpu") of the mesh of `jax.set_mesh`; outside a mesh JAX's own.

    Programs are also lowered for slices that this machine does not have (`planner`).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Cuts the leading dimension over the batch axes and leaves the rest whole."""
    return NamedSharding(mesh, PartitionSpec(NAMES["batch"]))


def param_spec(name: str, shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The spec of the first rule that the name matches."""
    if not shape:
        return PartitionSpec()
    for pattern, spec in RULES:
        if re.search(pattern, name):
            axes: list[tuple[str, ...]] = [(axis,) if axis else () for axis in spec]
            stacked: list[tuple[str, ...]] = [()] * (len(shape) - len(axes))
            return _fit(stacked + axes, shape, mesh_shape)
    raise ValueError(f"no sharding rule for parameter {name!r} of shape {tuple(shape)}")


def _fit(
    axes: Sequence[tuple[str, ...]], shape: Sequence[int], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """Drops mesh axes from each dimension, last first, until they divide it."""
    fitted: list[tuple[str, ...] | None] = []
    for wanted, size in zip(axes, shape, strict=True):
        while wanted and size % math.prod(mesh_shape[axis] for axis in wanted):
            wanted = wanted[:-1]
        fitted.append(wanted or None)
    return PartitionSpec(*fitted)

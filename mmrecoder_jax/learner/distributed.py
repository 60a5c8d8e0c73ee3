"""Several hosts run one program: rows of a host to global arrays and back, sums over hosts."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def start() -> None:
    """Joins the other hosts of a TPU slice; does nothing on a single machine.

    A cluster of another kind sets JAX_COORDINATOR_ADDRESS.
    """
    workers = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(workers) > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this is the one host that prints and writes shared files."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every host has come here; at once on a single host."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def to_global(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Host-local NumPy arrays -> global arrays, cut over the mesh's `data` and `fsdp` axes.

    Args:
      tree: this host's rows.
      axis: the dimension that is cut; the others are whole on every device.

    Raises:
      ValueError: the mesh does not divide the rows of all hosts.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def one(x: Any) -> jax.Array:
        x = np.asarray(x)
        if (x.shape[axis] * jax.process_count()) % ways:
            raise ValueError(
                f"{x.shape[axis] * jax.process_count()} rows cannot be split over "
                f"data*fsdp={ways} devices: choose batch sizes that the mesh divides"
            )
        spec = PartitionSpec(*[None] * axis, ("data", "fsdp"))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree.map(one, tree)


def to_host(x: jax.Array) -> np.ndarray:
    """This host's rows, in order, of a global array whose axis 0 is cut over devices."""
    if jax.process_count() == 1:
        return np.asarray(x)
    pieces: dict[int, jax.Array] = {}
    # devices along other axes hold copies of the same rows: the first one counts
    for shard in x.addressable_shards:
        pieces.setdefault(shard.index[0].start or 0, shard.data)
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def global_sum(values: np.ndarray) -> np.ndarray:
    """The sum over hosts of a small array; free on a single host."""
    if jax.process_count() == 1:
        return np.asarray(values)
    return np.asarray(multihost_utils.process_allgather(np.asarray(values))).sum(axis=0)


def global_max(values: np.ndarray) -> np.ndarray:
    """The elementwise maximum over hosts of a small array; free on a single host."""
    if jax.process_count() == 1:
        return np.asarray(values)
    return np.asarray(multihost_utils.process_allgather(np.asarray(values))).max(axis=0)

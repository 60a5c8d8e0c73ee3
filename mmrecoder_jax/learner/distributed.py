"""Several hosts, one program: start of `jax.distributed`, host-local rows to global arrays, sums
over hosts.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def start() -> None:
    """Joins the other hosts of a TPU slice (or of a cluster that sets JAX_COORDINATOR_ADDRESS);
    does nothing on a single machine.
    """
    workers = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if len(workers) > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()


def is_main() -> bool:
    """True on the one host that prints and writes shared files."""
    return jax.process_index() == 0


def to_global(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Host-local NumPy arrays -> global arrays whose `axis` is split over the mesh's `data` and
    `fsdp` axes.

    Every host passes its own rows; all other axes are replicated. A size that the mesh does not
    divide is an error that says so.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def one(x):
        x = np.asarray(x)
        if (x.shape[axis] * jax.process_count()) % ways:
            raise ValueError(
                f"{x.shape[axis] * jax.process_count()} rows cannot be split over data*fsdp={ways} devices: "
                "choose batch sizes that the mesh divides"
            )
        spec = PartitionSpec(*[None] * axis, ("data", "fsdp"))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree.map(one, tree)


def to_host(x: jax.Array) -> np.ndarray:
    """This host's rows of a global array whose axis 0 is split over devices (all of it on a single
    host), in row order.
    """
    if jax.process_count() == 1:
        return np.asarray(x)
    pieces = {}
    for shard in x.addressable_shards:
        pieces.setdefault(shard.index[0].start or 0, shard.data)
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def global_sum(values: np.ndarray) -> np.ndarray:
    """Sum over hosts of a small float array; exact and free on one host."""
    if jax.process_count() == 1:
        return np.asarray(values)
    return np.asarray(multihost_utils.process_allgather(np.asarray(values))).sum(axis=0)


def global_max(values: np.ndarray) -> np.ndarray:
    """Elementwise maximum over hosts."""
    if jax.process_count() == 1:
        return np.asarray(values)
    return np.asarray(multihost_utils.process_allgather(np.asarray(values))).max(axis=0)

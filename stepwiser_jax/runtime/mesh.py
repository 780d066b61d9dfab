"""The device mesh, and the one table from a parameter's logical axes to mesh axes.

Axes: `data` (outer; replicas), `fsdp` (parameters and batch), `tensor` (heads, MLP, vocabulary).
Batches are split over data and fsdp. Changing the parallelism is changing this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepwiser_jax.records import UserError

MESH_AXES = ("data", "fsdp", "tensor")

AXIS_RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "norm": None,
}

ShardingFor = Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of the first data x fsdp x tensor devices. Raises UserError where there are fewer."""
    import numpy as np

    devices = list(jax.devices() if devices is None else devices)
    sizes = (data, fsdp, tensor)
    needed = math.prod(sizes)
    if needed > len(devices) or min(sizes) < 1:
        raise UserError(
            f"mesh data {data} x fsdp {fsdp} x tensor {tensor} needs {needed} devices, found "
            f"{len(devices)} ({devices[0].platform}): change the mesh"
        )
    return Mesh(np.array(devices[:needed]).reshape(sizes), MESH_AXES)


def parameter_sharding(
    mesh: Mesh, *, num_heads: int, num_kv_heads: int, head_dim: int
) -> ShardingFor:
    """(logical axes, shape) of a parameter -> its sharding.

    Heads are split whole: where the tensor axis does not divide the key/value heads they are
    replicated, where it does not divide the query heads attention is replicated as a whole. Any
    other size that its mesh axis does not divide raises UserError naming axis and sizes.
    """
    tensor = mesh.shape["tensor"]
    replicated = {
        "heads": num_heads % tensor != 0,
        "kv_heads": num_kv_heads % tensor != 0 or num_heads % tensor != 0,
    }

    def sharding_for(axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        spec: list[str | None] = []
        for axis, size in zip(axes, shape, strict=True):
            mesh_axis = None if replicated.get(axis) else AXIS_RULES[axis]
            if mesh_axis in spec and mesh_axis is not None:
                raise ValueError(f"axes {axes} use the mesh axis {mesh_axis!r} twice")
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"a parameter with axes {axes} and shape {shape} cannot be split: {axis} = "
                    f"{size} is not a multiple of mesh.{mesh_axis} = {mesh.shape[mesh_axis]}"
                )
            spec.append(mesh_axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return sharding_for


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Arrays onto the mesh, their leading axis over data and fsdp; scalars everywhere.

    Raises UserError where the rows cannot be dealt out evenly.
    """
    shards = batch_shards(mesh)
    for leaf in jax.tree.leaves(batch):
        if leaf.ndim and leaf.shape[0] % shards:
            raise UserError(
                f"a batch of {leaf.shape[0]} rows cannot be split over data x fsdp = {shards} "
                "devices: make the number of rows a multiple of it"
            )
    shardings = jax.tree.map(
        lambda leaf: batch_sharding(mesh) if leaf.ndim else replicated(mesh), batch
    )
    return jax.device_put(batch, shardings)

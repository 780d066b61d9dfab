"""The device mesh, and the one table from a parameter's logical axes to mesh axes.

Axes: `data` (outer; replicas), `fsdp` (parameters and batch), `tensor` (heads, MLP, vocabulary).
Batches are split over data and fsdp. To change the parallelism, change this table.

On a TPU, neighbours on an axis are neighbours on the torus as far as the sizes allow. The last axes
come first, since they exchange most. Between slices only `data` crosses the network: gradients and
metrics are summed over it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepwiser_jax.errors import UserError
from stepwiser_jax.model.attention import Attention, attention_for
from stepwiser_jax.model.cpu import keep_freed_memory

MESH_AXES = ("data", "fsdp", "tensor")

AXIS_RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "classes": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "norm": None,
    "rank": None,
}

DECODING_RULES = AXIS_RULES | {"embed": None}
"""The rules for decoding do not split weights over fsdp: gathering them for each step would cost
more than the step."""

ShardingFor = Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Returns a mesh of the first data x fsdp x tensor devices, by default of those of all
    processes.

    GPUs come in the order of their global numbers, node after node, so the last axes stay within a
    node if they fit there. Raises UserError if there are fewer devices, if a process would be left
    without any, or if these sizes do not fit the slices or the grid of a TPU.
    """
    sizes = (data, fsdp, tensor)
    devices = _take(jax.devices() if devices is None else devices, sizes)
    slices = len({slice_of(device) for device in devices})
    if devices[0].platform == "cpu":
        keep_freed_memory()
    try:
        if devices[0].platform == "tpu" and slices > 1:
            placed = mesh_utils.create_hybrid_device_mesh(
                (data // slices, fsdp, tensor),
                (slices, 1, 1),
                devices,
                allow_split_physical_axes=True,
            )
        else:
            placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except AssertionError:  # what jax raises if the devices are no whole block of the grid
        raise UserError(
            f"{_named(sizes)} is no block of the TPU's grid of chips: make it all devices, or a "
            "power of two"
        ) from None
    return Mesh(placed, MESH_AXES)


def _take(devices: Sequence[Any], sizes: tuple[int, int, int]) -> list[Any]:
    """Returns the devices for a mesh of these sizes. Raises UserError as `make_mesh` does."""
    needed, owners = math.prod(sizes), processes_of(devices)
    if len(owners) > 1 and needed != len(devices):
        raise UserError(
            f"{_named(sizes)} = {needed} must be all {len(devices)} devices of {len(owners)} "
            "processes: change the mesh"
        )
    if needed > len(devices) or min(sizes) < 1:
        raise UserError(
            f"{_named(sizes)} needs {needed} devices, found {len(devices)} "
            f"({devices[0].platform}): change the mesh"
        )
    slices = len({slice_of(device) for device in devices})
    if devices[0].platform == "tpu" and sizes[0] % slices:
        raise UserError(
            f"{_named(sizes)} does not fit {slices} slices, between which only data crosses the "
            f"network: make data a multiple of {slices}"
        )
    return list(devices)[:needed]


def _named(sizes: tuple[int, int, int]) -> str:
    data, fsdp, tensor = sizes
    return f"mesh data {data} x fsdp {fsdp} x tensor {tensor}"


def slice_of(device: Any) -> int:
    """Returns the slice of a device: links join devices within a slice, a network joins slices."""
    return getattr(device, "slice_index", None) or 0


def processes_of(devices: Iterable[Any]) -> list[int]:
    """Returns the processes that own these devices, in order."""
    return sorted({device.process_index for device in devices})


def devices_of_process(devices: Iterable[Any], process: int) -> list[Any]:
    return [device for device in devices if device.process_index == process]


def make_sampling_mesh(training: Mesh, sizes: dict[str, int] | None = None) -> Mesh:
    """Returns the mesh on which a model in training samples.

    It has the devices of training, all of them if several processes own them. They keep their
    order, so that one program moves the model from mesh to mesh, and neighbours on the last axes
    of training stay neighbours.

    Args:
        training: the mesh of training.
        sizes: of `data`, `fsdp` and `tensor`; None for the mesh of training itself.

    Raises:
        UserError: if there are no devices for these sizes.
    """
    if sizes is None:
        return training
    shape = (sizes["data"], sizes["fsdp"], sizes["tensor"])
    devices = _take(list(training.devices.flat), shape)
    return Mesh(np.array(devices).reshape(shape), MESH_AXES)


def parameter_sharding(
    mesh: Mesh, *, num_heads: int, num_kv_heads: int, decoding: bool = False
) -> ShardingFor:
    """Returns a function from the logical axes and shape of a parameter to its sharding.

    Heads are never cut. If the tensor axis does not divide the key/value heads they are replicated;
    if it does not divide the query heads, all of attention is replicated. The function raises
    UserError for any other size that its mesh axis does not divide.
    """
    heads_split, kv_heads_split = _heads_split(mesh, num_heads, num_kv_heads)
    replicated = {"heads": not heads_split, "kv_heads": not kv_heads_split}
    rules = DECODING_RULES if decoding else AXIS_RULES

    def sharding_for(axes: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        spec: list[str | None] = []
        for axis, size in zip(axes, shape, strict=True):
            mesh_axis = None if replicated.get(axis) else rules[axis]
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


def _heads_split(mesh: Mesh, num_heads: int, num_kv_heads: int) -> tuple[bool, bool]:
    """Returns whether query heads, and whether key/value heads, are split over the tensor axis."""
    tensor = mesh.shape["tensor"]
    heads_split = num_heads % tensor == 0
    return heads_split, heads_split and num_kv_heads % tensor == 0


@functools.cache
def attention_on(
    mesh: Mesh, *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> Attention:
    """Returns the attention for the devices of a mesh; kernels run on every device's own share."""
    attention = attention_for(mesh.devices.flat[0], dtype, head_dim)
    if not attention.is_kernel:
        return attention
    return split_attention(attention, mesh, num_heads=num_heads, num_kv_heads=num_kv_heads)


def split_attention(
    attention: Attention, mesh: Mesh, *, num_heads: int, num_kv_heads: int
) -> Attention:
    """Returns `attention` as each device computes it for its own rows and query heads.

    Kernels need this, since XLA cannot split them. If query heads are split and key/value heads are
    not, each query head gets a copy of its key/value head. `attend` raises UserError if the devices
    cannot get equal numbers of rows.
    """
    heads_split, kv_heads_split = _heads_split(mesh, num_heads, num_kv_heads)
    copies = num_heads // num_kv_heads if heads_split and not kv_heads_split else 1
    rows, heads = batch_sharding(mesh).spec[0], "tensor" if heads_split else None
    of_heads = PartitionSpec(rows, None, heads)

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: Any) -> jax.Array:
        if q_BTNH.shape[0] % batch_shards(mesh):
            raise UserError(
                f"{q_BTNH.shape[0]} rows cannot be split over data x fsdp = {batch_shards(mesh)} "
                "devices: make the rows of a micro-batch a multiple of it"
            )
        return jax.shard_map(
            attention.attend,
            mesh=mesh,
            in_specs=(of_heads, of_heads, of_heads, PartitionSpec(rows)),
            out_specs=of_heads,
            check_vma=False,  # jax's kernels do not say over which axes their results vary
        )(q_BTNH, jnp.repeat(k_BTKH, copies, axis=2), jnp.repeat(v_BTKH, copies, axis=2), mask)

    return dataclasses.replace(attention, attend=attend)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def cache_sharding(mesh: Mesh, *, num_heads: int, num_kv_heads: int) -> NamedSharding:
    """Returns the sharding of keys and values (B, K, ., .): rows as in a batch, heads as in the
    parameters."""
    _, kv_heads_split = _heads_split(mesh, num_heads, num_kv_heads)
    rows = batch_sharding(mesh).spec[0]
    return NamedSharding(mesh, PartitionSpec(rows, "tensor" if kv_heads_split else None))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of devices over which the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts arrays onto the mesh: their leading axis over data and fsdp, scalars everywhere.

    Raises UserError if the devices cannot get equal numbers of rows.
    """
    shards = batch_shards(mesh)
    for leaf in jax.tree.leaves(batch):
        if leaf.ndim and leaf.shape[0] % shards:
            raise UserError(
                f"a batch of {leaf.shape[0]} rows cannot be split over data x fsdp = {shards} "
                "devices: make the number of rows a multiple of it"
            )
    rows, whole = batch_sharding(mesh), replicated(mesh)
    return jax.tree.map(lambda leaf: put(leaf, rows if leaf.ndim else whole), batch)


def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array that every process holds onto devices of all processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(arrays: Any) -> Any:
    """Returns arrays on devices, also of other processes, as whole numpy arrays.

    All processes that hold a part of them must call it.
    """
    if all(array.is_fully_addressable for array in jax.tree.leaves(arrays)):
        return jax.tree.map(np.asarray, arrays)
    return multihost_utils.process_allgather(arrays, tiled=True)

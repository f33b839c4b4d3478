"""The mesh, and one table from logical axes to mesh axes for each phase.

Parameters carry logical axes ("embed", "heads", ...) beside their shapes in models/decoder.py; the tables below say
which mesh axes split them. Training is fully sharded: weights, gradients and optimizer state are split over `fsdp`
and gathered a layer at a time. Generation reads every weight for every token, so there they are split over `tensor`
alone and gathered once, before the first token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
Rules = Mapping[str, str | tuple[str, ...] | None]

TRAIN: Rules = {
    "batch": ("data", "fsdp"),
    "replica": "data",  # rows that share one copy of the weights
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffw": "tensor",
}
ROLLOUT: Rules = {**TRAIN, "embed": None}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all); one size may be -1 and takes the devices that are left.

    TPU slices are joined by the data-center network, which only `data` crosses.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    asked = "x".join(map(str, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh={asked}: sizes are positive, and at most one is -1 (what is left)")
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != count:
        raise UserError(
            f"config.mesh={asked} (data x fsdp x tensor) does not fit {count} devices: the product must be {count}"
        )
    # Not jax.make_mesh: it knows no slices, and takes only meshes whose axes are axes of the torus.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"config.mesh={asked} (data x fsdp x tensor) over {slices} slices: data must be a multiple of {slices}, "
            "for only data crosses the network between slices"
        )
    if slices == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        within = (sizes[0] // slices, *sizes[1:])
        array = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def spec(rules: Rules, mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None], name: str) -> PartitionSpec:
    """The mesh axes that split an array of this shape and these logical axes (None: an axis that is whole).

    Raises:
      UserError: two axes fall on one mesh axis, or a size is not divisible by the mesh axes that split it; the message
        names the array, as `name`, and the axis.
    """
    used: set[str] = set()
    parts = []
    for size, axis in zip(shape, axes, strict=True):
        assigned = rules[axis] if axis else None
        mesh_axes = (assigned,) if isinstance(assigned, str) else assigned or ()
        count = math.prod(mesh.shape[a] for a in mesh_axes)
        if axis == "kv_heads" and size % count and count % size == 0:
            assigned, mesh_axes = None, ()  # fewer heads than devices: each has all of them
        elif size % count:
            raise UserError(
                f"{name}: axis {axis!r} of size {size} does not divide over mesh axis {assigned!r} of size {count}; "
                "choose another config.mesh"
            )
        if used & set(mesh_axes):
            raise UserError(f"{name}: axis {axis!r} falls on mesh axis {assigned!r}, already taken")
        used |= set(mesh_axes)
        parts.append(assigned)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """An activation with its logical axes split as the table says; as it is where there is no mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(TRAIN, mesh, x.shape, axes, "activation")))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`; the other axes whole."""
    return NamedSharding(mesh, PartitionSpec(TRAIN["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_rows(mesh: Mesh, wanted: int) -> int:
    """The fewest rows from `wanted` on that divide over the devices."""
    shards = batch_shards(mesh)
    return -(-wanted // shards) * shards


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(mesh: Mesh, abstract: Any, axes: Any, rules: Rules) -> Any:
    """NamedSharding of each parameter.

    Args:
      mesh: from make_mesh.
      abstract: nested dict of arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of logical axes for each parameter (None: never split).
      rules: TRAIN or ROLLOUT.

    Raises:
      UserError: as `spec`, with the parameter's name.
    """

    def one(path: tuple, leaf: Any, logical: tuple[str | None, ...]) -> NamedSharding:
        name = "parameter " + ".".join(key.key for key in path)
        return NamedSharding(mesh, spec(rules, mesh, leaf.shape, logical, name))

    return jax.tree.map_with_path(one, abstract, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def put_batch(mesh: Mesh, arrays: Any) -> Any:
    """Host arrays whose first axis is B -> global device arrays; each process copies only its own rows.

    Every process holds the whole batch on the host (token ids are small), so that its order cannot depend on the
    number of processes.
    """
    return _put(arrays, batch_sharding(mesh))


def put_replicated(mesh: Mesh, arrays: Any) -> Any:
    """Host arrays, the same on every process -> global device arrays, whole on every device."""
    return _put(arrays, replicated(mesh))


def _put(arrays: Any, sharding: NamedSharding) -> Any:
    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    with jax.transfer_guard("allow"):  # the training loop knows no other way to a device than this one
        return jax.tree.map(put, arrays)


def fetch(arrays: Any) -> Any:
    """Global device arrays -> host arrays, whole, on every process."""

    def whole(array: jax.Array) -> Any:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return multihost_utils.process_allgather(array, tiled=True)
        return jax.device_get(array)

    with jax.transfer_guard("allow"):
        return jax.tree.map(whole, arrays)

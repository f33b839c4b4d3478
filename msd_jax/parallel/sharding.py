"""The mesh, and one table from logical axes to mesh axes for each phase.

Parameters carry logical axes ("embed", "heads", ...) beside their shapes in models/decoder.py; the tables below say
which mesh axes split them. Training is fully sharded: weights, gradients and optimizer state are split over `fsdp`
and gathered one layer at a time. Generation reads every weight for every token, so its weights are gathered once before
the first token and stay where they are used, on a mesh of its own: see `rollout_mesh`.

A size that its mesh axes do not divide is an error that names the parameter, with one exception: see REPLICABLE.
"""

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROLLOUT_AXES = ("data", "fsdp", "extra", "tensor")
Rules = Mapping[str, str | tuple[str, ...] | None]

TRAIN: Rules = {
    "batch": ("data", "fsdp"),
    "replica": "data",  # rows that share one copy of the weights
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "ffw": "tensor",
    "norm": None,
    "rank": None,
}
# What training splits over `tensor` is split there again, in this order, so that each device's part is one of its part.
_HEADS, _WIDEST = ("tensor", "extra"), ("tensor", "extra", "fsdp")
ROLLOUT: Rules = {**TRAIN, "embed": None, "heads": _HEADS, "kv_heads": _HEADS, "ffw": _WIDEST, "vocab": _WIDEST}

# Axes that every device holds whole where their mesh axes do not divide the size but number a multiple of it: a model
# often has fewer key/value heads than `tensor` has devices. Their projections are small beside the other weights.
REPLICABLE = frozenset({"kv_heads"})


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    process_is_island: bool = False,
) -> Mesh:
    """A mesh over `devices` (default: all); one size may be -1 and takes the remaining devices.

    Devices that share fast links form an island: a TPU slice, or the GPUs of one NVLink domain, usually a machine.
    Axes cross the network between islands as `across_islands` says. `process_is_island`: an island is what a process
    has, as with GPUs that are not here, whose NVLink domains JAX does not know.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not divide over the islands.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    asked = "x".join(map(str, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh={asked}: sizes are positive, and at most one is -1 (the rest)")
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != count:
        raise UserError(
            f"config.mesh={asked} (data x fsdp x tensor) does not fit {count} devices: the product must be {count}"
        )
    # Not jax.make_mesh: it does not know islands, and accepts only meshes whose axes are axes of the torus.
    islands: dict[int, list[jax.Device]] = collections.defaultdict(list)
    for device in devices:
        islands[device.process_index if process_is_island else island(device)].append(device)
    if len({len(members) for members in islands.values()}) > 1:
        raise UserError(
            f"{len(islands)} machines or slices with {sorted(map(len, islands.values()))} devices: all must have the "
            "same number"
        )
    across = across_islands(sizes, len(islands), tpu=devices[0].platform == "tpu")
    within = [size // outer for size, outer in zip(sizes, across)]
    # Not create_hybrid_device_mesh: it knows islands by slice_index alone.
    blocks = np.empty(across, object)
    for place, (_, members) in zip(np.ndindex(across), sorted(islands.items())):
        blocks[place] = mesh_utils.create_device_mesh(within, members, allow_split_physical_axes=True)
    return Mesh(np.block(blocks.tolist()), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def train_mesh(sizes: Any, **options: Any) -> Mesh:
    """The mesh of training: `make_mesh` of config.mesh."""
    return make_mesh(sizes.data, sizes.fsdp, sizes.tensor, **options)


def rollout_mesh(mesh: Mesh, tensor: int = 0, ffw: int = 0) -> Mesh:
    """The mesh of generation: the devices of `mesh`, in its order, which may share weights otherwise.

    Heads and the cache are split over `tensor` and `extra`; the largest weights, those of feed-forward layers and the
    vocabulary, over `fsdp` as well. Rows are split over `data` and `fsdp`: they are gathered over `fsdp` before these
    weights, and what comes of them is scattered after.

    Args:
      mesh: of training.
      tensor, ffw: config.mesh.rollout_tensor and rollout_ffw, see `rollout_sizes`.

    Raises:
      UserError: as `rollout_sizes`.
    """
    shared, islands = mesh.shape["tensor"], len({island(device) for device in mesh.devices.flat})
    tensor, ffw = rollout_sizes(shared, tensor, ffw, mesh.size // islands)
    sizes = -1, ffw // tensor, tensor // shared, shared
    return Mesh(mesh.devices.reshape(sizes), ROLLOUT_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)


def rollout_sizes(shared: int, tensor: int, ffw: int, devices: int) -> tuple[int, int]:
    """How many devices share attention's heads in generation, and how many the largest weights.

    Args:
      shared: config.mesh.tensor.
      tensor, ffw: what is asked for; 0: no more than shared, and than tensor. Less where an island has fewer devices.
      devices: of an island.

    Raises:
      UserError: one is not a multiple of the one before.
    """
    heads = max(shared, math.gcd(tensor, devices)) if tensor else shared
    widest = max(heads, math.gcd(ffw, devices)) if ffw else heads
    if heads % shared or widest % heads:
        raise UserError(
            f"config.mesh: tensor={shared}, rollout_tensor={heads} and rollout_ffw={widest} must each be a multiple of "
            f"the one before (of {devices} devices in a slice or machine)"
        )
    return heads, widest


def island(device: jax.Device) -> int:
    """The TPU slice or NVLink domain that a device belongs to: XLA's slice_index, which GPUs call partition_index."""
    return getattr(device, "partition_index", getattr(device, "slice_index", 0))


def across_islands(sizes: Sequence[int], islands: int, *, tpu: bool) -> tuple[int, int, int]:
    """Into how many parts the network between islands cuts each mesh axis; their product is `islands`.

    It cuts `data` as far as that goes, then `fsdp`, never `tensor`. Between TPU slices it cuts `data` alone: `fsdp`
    gathers every layer's weights in each pass, for which that network is too slow. Between GPU machines it is the usual
    way to spread a model that one machine cannot hold.

    Args:
      sizes: of `data`, `fsdp` and `tensor`.
      islands: the number of slices or NVLink domains.
      tpu: whether they are TPU slices.

    Raises:
      UserError: the axes that may be cut do not divide.
    """
    data, fsdp, tensor = sizes
    outer_data = math.gcd(data, islands)
    outer_fsdp = islands // outer_data
    mesh = f"config.mesh={data}x{fsdp}x{tensor} (data x fsdp x tensor) over {islands}"
    if tpu and outer_fsdp > 1:
        raise UserError(
            f"{mesh} slices: data must be a multiple of {islands}, because only data crosses the network between slices"
        )
    if fsdp % outer_fsdp:
        raise UserError(
            f"{mesh} machines: data x fsdp must be a multiple of {islands}, because tensor stays within a machine's "
            f"NVLink; lower tensor"
        )
    return outer_data, outer_fsdp, 1


def describe(mesh: Mesh) -> str:
    """The mesh in a few words, such as "data 1 x fsdp 32 x tensor 1; between 4 machines: fsdp"."""
    words = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    devices = mesh.devices
    islands = len({island(device) for device in devices.flat})
    if islands == 1:
        return words
    tpu = platform(mesh) == "tpu"
    across = across_islands(devices.shape, islands, tpu=tpu)
    crossing = " and ".join(axis for axis, parts in zip(AXES, across) if parts > 1)
    return f"{words}; between {islands} {'slices' if tpu else 'machines'}: {crossing}"


def platform(mesh: Mesh | None) -> str:
    """The platform of the mesh's devices; without a mesh, of the default device."""
    return mesh.devices.flat[0].platform if mesh else jax.default_backend()


def spec(rules: Rules, mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None], name: str) -> PartitionSpec:
    """The mesh axes that split an array of this shape and these logical axes (None: an axis that is never split).

    Raises:
      UserError: two axes fall on one mesh axis, or the mesh axes that split a size do not divide it (unless the axis is
        replicated, see `is_replicated`); the message names the array, as `name`, and the axis.
    """
    used: set[str] = set()
    parts: list[str | tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis is None or is_replicated(rules, mesh, axis, size):
            parts.append(None)
            continue
        mesh_axes, count = _mesh_axes(rules, mesh, axis)
        if size % count:
            raise UserError(
                f"{name}: axis {axis!r} of size {size} does not divide over mesh axis {rules[axis]!r} of size {count}; "
                "choose another config.mesh"
            )
        if used & set(mesh_axes):
            raise UserError(f"{name}: axis {axis!r} falls on mesh axis {rules[axis]!r}, already taken")
        used |= set(mesh_axes)
        parts.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*parts)


def is_replicated(rules: Rules, mesh: Mesh, axis: str, size: int) -> bool:
    """Whether every device holds an axis whole that the rules would split: the rule of REPLICABLE."""
    _, count = _mesh_axes(rules, mesh, axis)
    return axis in REPLICABLE and size % count != 0 and count % size == 0


def _mesh_axes(rules: Rules, mesh: Mesh, axis: str) -> tuple[tuple[str, ...], int]:
    """The mesh axes that split a logical axis, of those that the mesh has, and their number of devices."""
    assigned = rules[axis]
    names = tuple(name for name in ((assigned,) if isinstance(assigned, str) else assigned or ()) if name in mesh.shape)
    return names, math.prod(mesh.shape[name] for name in names)


def rules_of(mesh: Mesh) -> Rules:
    """The table for a mesh of training or of generation."""
    return ROLLOUT if "extra" in mesh.shape else TRAIN


def parts(mesh: Mesh, axis: str) -> int:
    """Into how many parts the mesh splits a logical axis that it divides."""
    return _mesh_axes(rules_of(mesh), mesh, axis)[1]


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """An activation with its logical axes split as the mesh's table says; unchanged without a mesh."""
    if mesh is None:
        return x
    named = spec(rules_of(mesh), mesh, x.shape, axes, "activation")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, named))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over `data` and `fsdp`; the other axes are not split."""
    return NamedSharding(mesh, PartitionSpec(TRAIN["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_rows(mesh: Mesh, wanted: int) -> int:
    """`wanted`, rounded up to a multiple of the parts that a batch is split into."""
    shards = batch_shards(mesh)
    return -(-wanted // shards) * shards


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
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


def halfway(source: NamedSharding, target: NamedSharding) -> NamedSharding:
    """A layout of weights between training's and generation's, from which the latter gathers and moves nothing else.

    Devices exchange parts for what generation splits further; the parts stay split over the devices that it leaves
    free. To go from one layout to the other at once, XLA would hold the whole model on each device.
    """
    sizes = target.mesh.shape
    exchanged = sizes["fsdp"] * sizes["extra"] if "extra" in sizes else 1
    if exchanged == 1 or source.mesh.shape["fsdp"] % exchanged:
        return target  # nothing to exchange, or not within a replica
    data, fsdp, tensor = (source.mesh.shape[axis] for axis in AXES)
    shape = data, fsdp // exchanged, sizes["fsdp"], sizes["extra"], tensor
    mesh = Mesh(source.mesh.devices.reshape(shape), ("data", "rest", *ROLLOUT_AXES[1:]))
    taken = set(jax.tree.leaves(tuple(target.spec)))
    free = tuple(axis for axis in ("rest", "fsdp", "extra") if axis not in taken)
    axes = itertools.zip_longest(source.spec, target.spec)
    return NamedSharding(mesh, PartitionSpec(*(free if old == "fsdp" and new is None else new for old, new in axes)))


def put_batch(mesh: Mesh, arrays: Any) -> Any:
    """Host arrays with a leading B axis -> global device arrays; each process copies only its own rows.

    Every process holds the whole batch on the host (token ids are small), so that the order of rows cannot depend on
    the number of processes.
    """
    return _put(arrays, batch_sharding(mesh))


def put_replicated(mesh: Mesh, arrays: Any) -> Any:
    """Host arrays, equal on all processes -> global device arrays, replicated."""
    return _put(arrays, replicated(mesh))


def _put(arrays: Any, sharding: NamedSharding) -> Any:
    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    with jax.transfer_guard("allow"):  # the only way to a device that the training loop may take
        return jax.tree.map(put, arrays)


def fetch(arrays: Any) -> Any:
    """Global device arrays -> whole host arrays, on every process."""

    def whole(array: jax.Array) -> Any:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            return multihost_utils.process_allgather(array, tiled=True)
        return jax.device_get(array)

    with jax.transfer_guard("allow"):
        return jax.tree.map(whole, arrays)

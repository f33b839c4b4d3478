"""A tensor of a model's files as a sharded array: what each process reads of it, and how."""

import collections
import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import numpy as np

from msd_jax.models import layout, tensor_files

_TENSORS_AHEAD = 4  # that are read from an object store while the devices take one


def arrays(
    files: Sequence[tensor_files.Tensor], stored: layout.Stored, leaf: jax.ShapeDtypeStruct
) -> Iterator[jax.Array]:
    """Each of the tensors as the parameter `leaf`, or as a layer of it; reads what this process's devices hold.

    From an object store a process reads its share of the rows, which are one range of bytes, and the devices exchange
    them.

    Args:
      files: tensors of one parameter, of each layer.
      stored: where it is.
      leaf: shape, dtype and sharding of one of them.
    """
    far = files[0].far is not None
    read_as = _by_rows(stored, leaf) if far else leaf
    acts = [functools.partial(_read_parts, file, stored, leaf.shape, read_as) for file in files]
    for parts in _ahead(acts, _TENSORS_AHEAD if far else 0):
        yield _laid_out(leaf, _array(read_as, parts))


def _read_parts(
    file: tensor_files.Tensor, stored: layout.Stored, shape: tuple[int, ...], read_as: jax.ShapeDtypeStruct
) -> dict[Any, np.ndarray]:
    """What this process's devices hold of a tensor, by its bounds; devices that hold the same share one read.

    Args:
      file, stored: what is read, as which parameter.
      shape: of the parameter, or of a layer of it.
      read_as: dtype, sharding and shape of what is read; where it is larger than `shape`, it is filled up with zeros.
    """

    def read_part(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        within = tuple((min(first, size), min(last, size)) for (first, last), size in zip(bounds, shape))
        part = _read_slice(file, stored, shape, within).astype(read_as.dtype)
        missing = [(0, last - first - size) for (first, last), size in zip(bounds, part.shape)]
        return np.pad(part, missing) if any(after for _, after in missing) else part

    indices = read_as.sharding.addressable_devices_indices_map(read_as.shape).values()
    return {bounds: read_part(bounds) for bounds in dict.fromkeys(_bounds(index, read_as.shape) for index in indices)}


def _array(leaf: jax.ShapeDtypeStruct, parts: Mapping[Any, np.ndarray]) -> jax.Array:
    """A tensor as the parameter `leaf`, or as the layer of a parameter, from what `_read_parts` gives."""
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_bounds(index, leaf.shape)])


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def _by_rows(stored: layout.Stored, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """`leaf` with the rows of its tensor spread over all devices, and as many rows as these divide."""
    if not isinstance(leaf.sharding, jax.sharding.NamedSharding):
        return leaf
    left, right = stored.pattern.split("->")
    group, single = layout.GROUPS.findall(left)[0]
    axis = right.split().index((group or single).split()[0])
    mesh, shape = leaf.sharding.mesh, list(leaf.shape)
    shape[axis] = math.ceil(shape[axis] / mesh.size) * mesh.size
    spec = jax.sharding.PartitionSpec(*[None] * axis, mesh.axis_names)
    return leaf.update(shape=tuple(shape), sharding=jax.sharding.NamedSharding(mesh, spec))


def _laid_out(leaf: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
    """`array` in the sharding of `leaf`, without what it has beyond its shape."""
    if array.shape == leaf.shape and array.sharding.is_equivalent_to(leaf.sharding, array.ndim):
        return array
    # Waited for: on CPUs nothing orders the exchanges of one program and of the next.
    return jax.block_until_ready(_laying_out(leaf.shape, leaf.sharding)(array))


@functools.cache
def _laying_out(shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> Any:
    def within(array: jax.Array) -> jax.Array:
        return array[tuple(map(slice, shape))]

    return jax.jit(within, out_shardings=sharding)


def _ahead(acts: Iterable[Callable[[], Any]], count: int) -> Iterator[Any]:
    """The results of `acts` in their order; threads work on the next `count` of them meanwhile, if any."""
    if not count:
        yield from (act() for act in acts)
        return
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for act in acts:
            waiting.append(pool.submit(act))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_slice(file: tensor_files.Tensor, stored: layout.Stored, shape: tuple[int, ...], bounds: tuple) -> np.ndarray:
    """The part of a parameter of `shape` between `bounds`, (start, stop) of each axis; reads nothing else."""
    left, right = stored.pattern.split("->")
    axes = right.split()
    size, bound = dict(zip(axes, shape)), dict(zip(axes, bounds))
    part: list[slice] = []
    inner_sizes: dict[str, int] = {}
    for group, single in layout.GROUPS.findall(left):
        outer, *inner = (group or single).split()
        step = math.prod(size[axis] for axis in inner)  # inner axes (a head's) are never split
        first = 0 if part else stored.row
        part.append(slice(first + bound[outer][0] * step, first + bound[outer][1] * step))
        inner_sizes |= {axis: size[axis] for axis in inner}
    return einops.rearrange(file.slice()[tuple(part)], stored.pattern, **inner_sizes)

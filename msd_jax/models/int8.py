"""Weight-only int8 for generation: matrices as int8, with a float32 scale for each output channel.

Norms, biases, adapters and the embedding table stay as they are, and with the table a head that is tied to it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

T = TypeVar("T")

WEIGHTS = ("float", "int8")  # of config.rollout.weights and config.eval.weights
LARGEST = 127
# Quantised parameters, and the axes that a product sums over; axis 0 of a layer's matrices is that of the layers.
SUMMED = {
    **{f"layers.{name}": (1,) for name in ("query", "key", "value", "gate", "up", "down")},
    "layers.output": (1, 2),
    "head": (0,),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A quantised matrix in place of a parameter, which it approximates as values * scale.

    Attributes:
      values: int8 of the parameter's shape, from -127 to 127.
      scale: float32 of the same rank, with size 1 on the axes that a product sums over.
    """

    values: Any
    scale: Any

    def __getitem__(self, index: EllipsisType) -> Self:
        """Itself: parameters are read as `parameter[...]`."""
        return self


def quantise(weight: jax.Array, summed: Sequence[int]) -> Int8:
    """Symmetric int8 by the largest absolute value of each output channel; no number moves by more than half a scale.

    Args:
      weight: any float dtype.
      summed: the axes that a product sums over; the others are output channels (or layers).
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=summed, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return Int8(jnp.round(weight / scale).astype(jnp.int8), scale)


def product(x: jax.Array, weight: jax.Array | Int8, inputs: int = 1, result: DTypeLike | None = None) -> jax.Array:
    """x times a matrix, computed in x's dtype and returned in `result` (default: x's dtype).

    Rows and tokens are one axis of the product: for a gradient that sums over two, XLA on a CPU transposes a factor in
    memory.

    Args:
      x: its last `inputs` axes are the first of the matrix.
      weight: an array of any float dtype, which is cast, or an Int8, whose scales multiply the product.
      inputs: how many axes are summed over.
      result: at least as wide as x's dtype.
    """
    values = weight.values if isinstance(weight, Int8) else weight
    flat = x.reshape(-1, *values.shape[:inputs])
    y = jnp.tensordot(flat, values.astype(x.dtype), inputs, preferred_element_type=result)
    y = y.reshape(x.shape[: x.ndim - inputs] + values.shape[inputs:])
    return (y * jnp.squeeze(weight.scale, range(inputs))).astype(y.dtype) if isinstance(weight, Int8) else y


def held_until(x: jax.Array, weights: T) -> T:
    """A tree of weights whose int8 is not widened before x is known.

    Where each iteration of a loop widens the same weights, XLA would widen all of them once, before the loop, and read
    floats in it. Weights that a scan slices are safe from that.
    """

    def one(leaf: Any) -> Any:
        if not _is_int8(leaf):
            return leaf
        values, _ = jax.lax.optimization_barrier((leaf.values, x))
        return Int8(values, leaf.scale)

    return jax.tree.map(one, weights, is_leaf=_is_int8)


def is_quantised(params: Any) -> bool:
    """Whether a tree has an Int8, of whatever parts."""
    return any(map(_is_int8, jax.tree.leaves(params, is_leaf=_is_int8)))


def layout(shardings: Mapping[str, Any]) -> dict[str, Any]:
    """The NamedShardings of params -> those of the same params with quantised matrices, as Int8s of two shardings."""

    def one(placed: NamedSharding, summed: Sequence[int]) -> Int8:
        spec = (None if axis in summed else part for axis, part in enumerate(placed.spec))
        return Int8(placed, NamedSharding(placed.mesh, PartitionSpec(*spec)))

    return _changed(shardings, matrix=one, other=lambda placed: placed)


def quantised(params: Mapping[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Params with quantised matrices, and all else in `dtype`."""
    return _changed(params, matrix=quantise, other=lambda leaf: leaf.astype(dtype))


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, Int8)


def _changed(
    params: Mapping[str, Any], matrix: Callable[[Any, Sequence[int]], Int8], other: Callable[[Any], Any]
) -> dict[str, Any]:
    named = traverse_util.flatten_dict(params, sep=".")
    changed = {name: matrix(leaf, SUMMED[name]) if name in SUMMED else other(leaf) for name, leaf in named.items()}
    return traverse_util.unflatten_dict(changed, sep=".")

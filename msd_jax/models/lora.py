"""Low-rank adapters beside the stacked matrices of the layers: what they are, and merging.

The adapter of the matrix `query` is two parameters, `query_lora_a` (A) and `query_lora_b` (B).
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

SUFFIX_A, SUFFIX_B = "_lora_a", "_lora_b"
ADAPTABLE = ("query", "key", "value", "output", "gate", "up", "down")  # matrices of a layer


@dataclasses.dataclass(frozen=True)
class Lora:
    """A matrix W acts as W + (alpha / rank) A B (Hu et al., 2021, arXiv 2106.09685, section 4.1).

    Attributes:
      rank: of A [inputs, rank] and B [rank, outputs]; B starts at zero, so that a new adapter changes nothing.
      alpha: scale of the update.
      targets: adapted matrices of every layer, among ADAPTABLE; those that a model does not have are passed over.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((SUFFIX_A, SUFFIX_B))


def init_bound(inputs: Iterable[int]) -> float:
    """The bound of a new, uniform A, from the sizes of W's input axes: PEFT's default, Kaiming's with a = sqrt 5."""
    return math.prod(inputs) ** -0.5


def merge(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + scale A B of one layer, in float32; W itself, to the sign of its zeros, where the adapter adds nothing."""
    weight, a, b = (x.astype(jnp.float32) for x in (weight, a, b))
    update = scale * jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(update == 0, weight, weight + update)

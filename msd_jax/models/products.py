"""Products of activations and matrices."""

import functools
import math

import jax
import jax.numpy as jnp

from msd_jax.losses.numerics import rounded

NAME = "product"  # of their results, for the policy
# What the backward pass keeps under remat "dots": the results of `product`, and of other products without batch axes.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(NAME)
)
_FEW = 64  # rows of x: with fewer, rounding the matrix takes longer than it saves


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    """x times a matrix of the same dtype; the last `inputs` axes of x are the first of the matrix.

    JAX's own rule makes the transposed gradient of the matrix, for which XLA on a CPU transposes the gradient of the
    result in memory first: a tenth of a train step's time.
    """
    rows = x.size // math.prod(weight.shape[:inputs])
    a, b = (x, weight) if rows < _FEW else rounded(x, weight)
    return jnp.tensordot(a, b, inputs, preferred_element_type=x.dtype)


def _forward(x: jax.Array, weight: jax.Array, inputs: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, weight, inputs), (x, weight)


def _backward(inputs: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype, (x, weight, gradient) = gradient.dtype, rounded(*kept, gradient)
    tokens, outputs = x.ndim - inputs, weight.ndim - inputs
    leading, trailing = tuple(range(tokens)), tuple(range(tokens, tokens + outputs))
    multiply = functools.partial(jax.lax.dot_general, preferred_element_type=dtype)
    to_x = multiply(gradient, weight, ((trailing, tuple(range(inputs, weight.ndim))), ((), ())))
    to_weight = multiply(x, gradient, ((leading, leading), ((), ())))
    return to_x, to_weight


product.defvjp(_forward, _backward)

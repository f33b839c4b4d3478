"""Products of activations and matrices."""

import functools

import jax
import jax.numpy as jnp

NAME = "product"  # of their results, for the policy
# What the backward pass keeps under remat "dots": the results of `product`, and of other products without batch axes.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(NAME)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
    """x times a matrix of the same dtype; the last `inputs` axes of x are the first of the matrix.

    JAX's own rule makes the transposed gradient of the matrix, for which XLA on a CPU transposes the gradient of the
    result in memory first: a tenth of a train step's time.
    """
    return jnp.tensordot(x, weight, inputs)


def _forward(x: jax.Array, weight: jax.Array, inputs: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, weight, inputs), (x, weight)


def _backward(inputs: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    tokens, outputs = x.ndim - inputs, weight.ndim - inputs
    leading, trailing = tuple(range(tokens)), tuple(range(tokens, tokens + outputs))
    to_x = jax.lax.dot_general(gradient, weight, ((trailing, tuple(range(inputs, weight.ndim))), ((), ())))
    to_weight = jax.lax.dot_general(x, gradient, ((leading, leading), ((), ())))
    return to_x, to_weight


product.defvjp(_forward, _backward)

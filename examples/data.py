"""A distillation problem to try the loss on: features of a batch, and what a teacher says of them."""

import jax
import jax.numpy as jnp

B, R, V, D = 16, 6, 12, 8  # queries, response tokens, vocabulary, features


def make(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(features [B, R, D], the teacher's logits [B, R, V], mask [B, R] of the response tokens)."""
    features_key, head_key, length_key = jax.random.split(jax.random.key(seed), 3)
    features = jax.random.normal(features_key, (B, R, D))
    teacher_logits = jnp.tanh(features) @ jax.random.normal(head_key, (D, V))
    mask = jnp.arange(R) < jax.random.randint(length_key, (B, 1), 1, R + 1)
    return features, teacher_logits, mask

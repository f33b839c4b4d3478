"""Checks of shapes, dtypes and static arguments, at trace time."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp


def check_logits(name: str, logits: jax.Array) -> None:
    if logits.ndim < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{name} must be floats of shape [..., V], got {logits.dtype} {logits.shape}")


def check_pair(student_logits: jax.Array, teacher_logits: jax.Array) -> None:
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [..., V], "
            f"got {student_logits.shape} and {teacher_logits.shape}"
        )


def check_tokens(name: str, tokens: jax.Array, shape: tuple[int, ...]) -> None:
    if tokens.shape != shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers of shape {shape}, got {tokens.dtype} {tokens.shape}")


def check_top_k(name: str, top_k: int, lowest: int, vocabulary: int) -> None:
    if top_k not in range(lowest, vocabulary + 1):
        raise ValueError(f"{name} must be an integer in {lowest}..{vocabulary} (the vocabulary's size), got {top_k!r}")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_share(name: str, value: float | jax.Array) -> None:
    """An array, whose value may not be known yet, passes."""
    if not isinstance(value, jax.Array) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def check_cross_entropy(response_tokens: jax.Array | None, top_k: int | None) -> jax.Array:
    """Returns the response tokens."""
    if response_tokens is None:
        raise ValueError("divergence='cross_entropy' needs the response tokens, got None")
    if top_k is not None:
        raise ValueError(f"divergence='cross_entropy' has no top_k, got {top_k!r}")
    return response_tokens

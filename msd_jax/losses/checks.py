"""Checks of shapes, dtypes and static arguments, at trace time; outside of jit of values too."""

import numbers
from collections.abc import Iterable
from typing import Any

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


def check_response(name: str, response: jax.Array, mask: jax.Array, vocabulary: int) -> None:
    """Tokens of a response, whose values count where `mask` is true."""
    check_tokens(name, response, mask.shape)
    if _is_known(response) and _is_known(mask):
        chosen = jax.device_get(response)[jax.device_get(mask).astype(bool)]
        if (wrong := chosen[(chosen < 0) | (chosen >= vocabulary)]).size:
            raise ValueError(f"{name} must be tokens in 0..{vocabulary - 1} where mask is true, got {wrong[0]}")


def check_mask(mask: jax.Array, shape: tuple[int, ...]) -> None:
    """True or false, or 1 or 0, per token."""
    if mask.shape != shape:
        raise ValueError(f"mask must have the shape of the logits without their last axis, {shape}, got {mask.shape}")
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise ValueError(f"mask must be bool, or 0 and 1, got {mask.dtype}")
    if mask.dtype != bool and _is_known(mask):
        values = jax.device_get(mask)
        if (odd := values[(values != 0) & (values != 1)]).size:
            raise ValueError(f"mask must be bool, or 0 and 1, got {odd[0]}: is it the response?")


def check_static(name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} must be static under jit: jax.jit(FUNCTION, static_argnames=losses.static_argnames(FUNCTION))"
        )


def only_known(tokens: jax.Array, vocabulary: int, values: jax.Array) -> jax.Array:
    """`values`, of which those of a token outside the vocabulary, such as a label of -100, are NaN."""
    return jnp.where((tokens >= 0) & (tokens < vocabulary), values, jnp.nan)


def _is_known(array: jax.Array) -> bool:
    """Whether this process can look at the values: outside of jit, and where they lie on its own devices."""
    return not isinstance(array, jax.core.Tracer) and bool(getattr(array, "is_fully_addressable", True))


def check_top_k(name: str, top_k: int, lowest: int, vocabulary: int) -> None:
    check_static(name, top_k)
    whole = isinstance(top_k, numbers.Integral) and not isinstance(top_k, bool)
    if not whole or top_k not in range(lowest, vocabulary + 1):
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

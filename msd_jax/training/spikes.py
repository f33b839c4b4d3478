"""What a spike is: a step whose loss, or gradient norm, is many times the median of those of the steps before it."""

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 32  # steps that the medians are of; nothing is a spike before more than half of them are there


def none_seen() -> np.ndarray:
    """The statistic before the first step, float32 [2, WINDOW]: losses and gradient norms, with infinity for none."""
    return np.full((2, WINDOW), np.inf, np.float32)


def medians(recent_2xW: jax.Array) -> jax.Array:
    """Of the losses and of the gradient norms, float32 [2]; infinity while too few are there."""
    return jnp.median(recent_2xW, axis=1)


def is_spike(recent_2xW: jax.Array, seen_2: jax.Array, factor: float) -> jax.Array:
    """Whether a step's loss or gradient norm (`seen_2`) is more than `factor` times its median, bool []."""
    usual_2 = medians(recent_2xW)
    return ((usual_2 > 0) & (seen_2 > factor * usual_2)).any()  # what is not finite is another fault


def remember(recent_2xW: jax.Array, seen_2: jax.Array, accepted: jax.Array) -> jax.Array:
    """The statistic after a step; one that was not accepted leaves it as it is, and finite."""
    return jnp.where(accepted, jnp.concatenate([recent_2xW[:, 1:], seen_2[:, None]], axis=1), recent_2xW)

"""Where a divergence stands still: student and teacher are apart, and its gradient hardly moves the student."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_APART = 0.5  # total variation distance, above which the two rows say different things
_FLAT = 0.1  # slope, per nat of divergence and at most of one nat, below which the gradient has vanished


def is_saturated(
    divergence: Callable[[jax.Array], jax.Array],
    student_logits: jax.Array,
    log_student: jax.Array,
    log_teacher: jax.Array,
    temperature: float,
) -> jax.Array:
    """Whether the divergence is saturated, per token.

        1/2 sum_v |p_S(v) - p_T(v)| > 1/2    and    sum_v |dD / dz_v| < 0.1 min(D, 1)

    with z the student's logits over the temperature. The slope on the left is the most that D falls, to first order, if
    no logit moves by more than 1. Forward KL never is, as its slope is twice the distance. Reverse KL is where a
    certain student gives the teacher's tokens less than about 0.004, the Jensen-Shannon divergence likewise: the
    gradient of both on a logit has the factor p_S. The definition and its two thresholds are ours.

    Args:
      divergence: student's logits `[..., V]` -> D `[...]`.
      student_logits: float `[..., V]`.
      log_student, log_teacher: log-probabilities, float32 `[..., V]`.
      temperature: static; of these.

    Returns:
      bool `[...]`.
    """
    values, pullback = jax.vjp(divergence, jax.lax.stop_gradient(student_logits).astype(jnp.float32))
    (gradient,) = pullback(jnp.ones_like(values))
    slope = temperature * jnp.sum(jnp.abs(gradient), axis=-1)
    distance = 0.5 * jnp.sum(jnp.abs(jnp.exp(log_student) - jnp.exp(log_teacher)), axis=-1)
    return jax.lax.stop_gradient((distance > _APART) & (slope < _FLAT * jnp.minimum(values, 1.0)))

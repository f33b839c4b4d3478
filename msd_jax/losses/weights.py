"""DPSW weights: how much each response token counts, from the teacher's and the student's perspective."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from msd_jax.losses.checks import (
    check_choice,
    check_logits,
    check_pair,
    check_static,
    check_tokens,
    check_top_k,
    only_known,
)
from msd_jax.losses.naming import formerly
from msd_jax.losses.numerics import blockwise_top_k, entropy, log_softmax

WEIGHTINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "dpsw": lambda w_T, w_S: w_T * w_S,
    "teacher": lambda w_T, w_S: w_T,
    "student": lambda w_T, w_S: w_S,
    "uniform": lambda w_T, w_S: jnp.ones_like(w_T),
}
STUDENT_TOKENS = ("teacher_argmax", "sampled")
# The teacher's weight by the entropy H of its top K, for `entropy_scale`.
ENTROPY_SCALES: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "linear": lambda H, K: jnp.clip(1 - H / math.log(K), 0.0, 1.0),
    "exponential": lambda H, K: jnp.clip(jnp.exp(-H), 1 / K, 1.0),
}


def teacher_weight(
    teacher_logits: jax.Array, *, top_k: int, entropy_scale: str = "linear", temperature: float = 1.0
) -> jax.Array:
    """The teacher's perspective of DPSW: how confident the teacher is, per token.

        w_T = 1 - H_K(p_T) / log K    ("linear")
        w_T = exp(-H_K(p_T))          ("exponential")
        H_K(p) = -sum_{v in top-K} q(v) log q(v),    q = p / sum_{top-K} p

    1 where the teacher allows one token only (the first words of a refusal). Where its K most probable tokens are
    equally good, the linear scale gives 0 and the exponential one 1 / K; the latter is one over the perplexity, and
    falls faster: two equally good tokens have half the weight of one, whatever K. That the entropy of the teacher's
    top-K marks the tokens that matter is the paper's; its summaries do not settle the scale, which is ours, as is
    renormalising over the K tokens.

    Args:
      teacher_logits: float `[..., V]`, any float dtype.
      top_k: static, K, at least 2; V where that is smaller.
      entropy_scale: static; "linear" or "exponential".
      temperature: static, > 0.

    Returns:
      w_T in [0, 1], float32 `[...]`, without gradient.

    Raises:
      ValueError: for a top_k below 2, an unknown entropy_scale, a temperature that is not > 0, or logits that are
        not float `[..., V]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> logits = jnp.log(jnp.array([[1.0, 0.0, 0.0, 0.0], [0.4, 0.4, 0.1, 0.1]]))
      >>> [f"{w:.3f}" for w in losses.teacher_weight(logits, top_k=4)]
      ['1.000', '0.139']
      >>> [f"{w:.3f}" for w in losses.teacher_weight(logits, top_k=2)]
      ['1.000', '0.000']
      >>> [f"{w:.3f}" for w in losses.teacher_weight(logits, top_k=2, entropy_scale="exponential")]
      ['1.000', '0.500']

    References:
      Qin et al., [Multilingual Safety Alignment via Self-Distillation](https://arxiv.org/abs/2605.02971), 2026
    """
    check_logits("teacher_logits", teacher_logits)
    top_k = clamped("top_k", top_k, teacher_logits.shape[-1])
    check_choice("entropy_scale", entropy_scale, ENTROPY_SCALES)
    top_logits, _ = blockwise_top_k(jax.lax.stop_gradient(teacher_logits), top_k)
    return ENTROPY_SCALES[entropy_scale](entropy(log_softmax(top_logits, temperature)), top_k)


def clamped(name: str, top_k: int, vocabulary: int) -> int:
    """K of the teacher's weight: `top_k`, or the whole vocabulary where that is smaller."""
    check_static(name, top_k)
    if isinstance(top_k, int) and top_k > vocabulary:
        return vocabulary
    check_top_k(name, top_k, 2, vocabulary)
    return top_k


def student_weight(student_logits: jax.Array, tokens: jax.Array, temperature: float = 1.0) -> jax.Array:
    """The student's perspective of DPSW: the risk that the student says something else, per token.

        w_S = 1 - p_S(v)

    That the weight is 1 - p_S is the paper's; which token v it is read at is the caller's choice (see
    `dpsw_weights`).

    Args:
      student_logits: float `[..., V]`, any float dtype.
      tokens: int `[...]`, the token v of each row.
      temperature: static, > 0.

    Returns:
      w_S in [0, 1], float32 `[...]`, without gradient. Accurate relative to itself even where p_S(v) rounds to 1. NaN
      where v is no token, such as a label of -100.

    Raises:
      ValueError: for a temperature that is not > 0, or shapes and dtypes other than the above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> logits = jnp.log(jnp.array([[0.75, 0.25], [1.0, 1e-12]]))
      >>> [f"{w:.3g}" for w in losses.student_weight(logits, jnp.array([0, 0]))]
      ['0.25', '1e-12']

    References:
      Qin et al., [Multilingual Safety Alignment via Self-Distillation](https://arxiv.org/abs/2605.02971), 2026
    """
    check_logits("student_logits", student_logits)
    check_tokens("tokens", tokens, student_logits.shape[:-1])
    return only_known(tokens, student_logits.shape[-1], _disagreement(student_logits, tokens, temperature))


def _disagreement(student_logits: jax.Array, tokens: jax.Array, temperature: float) -> jax.Array:
    """`student_weight` of tokens that are known to be in the vocabulary."""
    p = jnp.exp(log_softmax(jax.lax.stop_gradient(student_logits), temperature))
    # Summed over the other tokens: the subtraction 1 - p would be lost in rounding for a confident student.
    others = jnp.arange(p.shape[-1]) != jnp.expand_dims(tokens, -1)
    return jnp.minimum(jnp.sum(p, axis=-1, where=others), 1.0)


@formerly(response="response_tokens")
def dpsw_weights(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    response: jax.Array | None = None,
    *,
    weighting: str = "dpsw",
    top_k: int = 20,
    entropy_scale: str = "linear",
    student_token: str = "teacher_argmax",
    temperature: float = 1.0,
) -> jax.Array:
    """Dual-Perspective Safety Weighting (DPSW): the weight of each response token.

        w = w_T * w_S

    High where the teacher is sure and the student is likely to say something else. The product of the two
    perspectives is the paper's. Ours: the token at which the student's risk is read, top_k = 20, and that no
    gradient flows through the weights, so that the student cannot lower its loss by lowering its weights.

    Args:
      student_logits: float `[..., V]`, any float dtype.
      teacher_logits: float `[..., V]`, the same shape.
      response: int `[...]`, its tokens; needed for student_token = "sampled" alone.
      weighting: static; "dpsw" w_T * w_S, "teacher" w_T, "student" w_S, "uniform" 1.
      top_k: static, K of `teacher_weight`.
      entropy_scale: static; "linear" or "exponential", see `teacher_weight`.
      student_token: static; the v of w_S = 1 - p_S(v): "teacher_argmax", the teacher's most probable token, or
        "sampled", the token of the response.
      temperature: static, > 0; of both rows.

    Returns:
      The weights, not rescaled, in [0, 1], float32 `[...]`, without gradient.

    Raises:
      ValueError: for an unknown weighting or student_token, "sampled" without a response, and as
        `teacher_weight` and `student_weight`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> teacher = jnp.log(jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
      >>> student = jnp.log(jnp.array([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]))
      >>> [f"{w:.3f}" for w in losses.dpsw_weights(student, teacher, top_k=2)]  # at odds, agreed, teacher unsure
      ['0.900', '0.100', '0.000']

    References:
      Qin et al., [Multilingual Safety Alignment via Self-Distillation](https://arxiv.org/abs/2605.02971), 2026
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    w_T, w_S = perspectives(student_logits, teacher_logits, response, top_k, entropy_scale, student_token, temperature)
    return WEIGHTINGS[weighting](w_T, w_S)


def perspectives(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    response_tokens: jax.Array | None,
    top_k: int,
    entropy_scale: str,
    student_token: str,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """The two factors of DPSW, (w_T, w_S)."""
    check_pair(student_logits, teacher_logits)
    check_choice("student_token", student_token, STUDENT_TOKENS)
    if student_token == "teacher_argmax":
        tokens, risk = jnp.argmax(teacher_logits, axis=-1), _disagreement
    elif response_tokens is None:
        raise ValueError("student_token='sampled' needs the response tokens, got None")
    else:
        tokens, risk = response_tokens, student_weight
    w_T = teacher_weight(teacher_logits, top_k=top_k, entropy_scale=entropy_scale, temperature=temperature)
    return w_T, risk(student_logits, tokens, temperature)

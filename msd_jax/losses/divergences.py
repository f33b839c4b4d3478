"""Divergences between student and teacher, per token, and the cross-entropy of given tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from msd_jax.losses.checks import check_logits, check_share, check_static, check_tokens, only_known
from msd_jax.losses.numerics import kl, log_ratio, log_rows, log_softmax


def reverse_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Reverse Kullback-Leibler divergence, KL(student || teacher), per token.

        D = sum_v p_S(v) log(p_S(v) / p_T(v))

    Mode-seeking: the student is punished for mass where the teacher has little. What summaries of the paper
    name for responses of the student; where that is certain it can stand still, see docs/method.md.

    A token that both rows exclude (logit `-inf`) contributes 0 and gets a gradient of 0; one that only the student
    has mass on makes the divergence infinite. The result is never negative, exactly 0 for equal rows, and keeps
    its relative accuracy as the rows approach each other.

    Args:
      student_logits: float `[..., V]`, any float dtype; the gradient flows through these alone.
      teacher_logits: float `[..., V]`, the same shape; held constant (`stop_gradient`).
      temperature: static, > 0; both rows are softmax(logits / temperature). The result is NOT multiplied by
        temperature squared, as some distillation losses are.
      top_k: static; None for the full vocabulary, or K in 1..V for the distributions over K + 1 outcomes: each of
        the teacher's K most probable tokens, and TAIL, which holds the rest of each row's probability. That is a
        true divergence between coarser distributions, and never more than the full one.

    Returns:
      The divergence in nats, float32 `[...]`.

    Raises:
      ValueError: for shapes, dtypes, a temperature or a top_k other than the above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.5, 0.25]))
      >>> print(f"{losses.reverse_kl(student, teacher):.4f}")  # log(2) / 4
      0.1733
      >>> print(f"{losses.reverse_kl(student, teacher, top_k=1):.4f}")  # (1/4, 3/4) against (1/2, 1/2)
      0.1308

    References:
      Agarwal et al., [On-Policy Distillation of Language Models](https://arxiv.org/abs/2306.13649), 2023
      Gu et al., [MiniLLM](https://arxiv.org/abs/2306.08543), 2023
    """
    log_student, log_teacher = log_rows(student_logits, teacher_logits, temperature, top_k)
    return kl(log_student, log_teacher)


def forward_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Forward Kullback-Leibler divergence, KL(teacher || student), per token.

        D = sum_v p_T(v) log(p_T(v) / p_S(v))

    Mode-covering: the student is punished for missing mass that the teacher has; its gradient is that of the
    cross-entropy against the teacher's distribution. The default.

    Args:
      student_logits: float `[..., V]`; see `reverse_kl`, for the other arguments too.
      teacher_logits: float `[..., V]`, held constant.
      temperature: static, > 0.
      top_k: static; None, or K in 1..V for the teacher's K most probable tokens and TAIL.

    Returns:
      The divergence in nats, float32 `[...]`.

    Raises:
      ValueError: as `reverse_kl`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> teacher = jnp.log(jnp.array([0.125, 0.125, 0.75]))
      >>> print(f"{losses.forward_kl(student, teacher):.4f} {losses.reverse_kl(student, teacher):.4f}")
      0.5640 0.5918

    References:
      Hinton et al., [Distilling the Knowledge in a Neural Network](https://arxiv.org/abs/1503.02531), 2015
    """
    log_student, log_teacher = log_rows(student_logits, teacher_logits, temperature, top_k)
    return kl(log_teacher, log_student)


def jsd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence between teacher and student, per token.

        D = beta KL(p_T || m) + (1 - beta) KL(p_S || m),    m = beta p_T + (1 - beta) p_S

    beta is the teacher's share of the mixture m. The formula itself goes to 0 at both ends; there, by the convention of
    GKD and TRL, the divergences that it points to take its place: beta = 0 is forward KL, beta = 1 is reverse KL. The
    scale therefore jumps at the ends: beta = 0.01 is about a hundredth of beta = 0. For 0 < beta < 1 the result is
    bounded by log 2, and finite even where the supports differ.

    Args:
      student_logits: float `[..., V]`; see `reverse_kl`, for the other arguments too.
      teacher_logits: float `[..., V]`, held constant.
      beta: static, in [0, 1].
      temperature: static, > 0.
      top_k: static; None, or K in 1..V for the teacher's K most probable tokens and TAIL.

    Returns:
      The divergence in nats, float32 `[...]`.

    Raises:
      ValueError: for a beta outside [0, 1], and as `reverse_kl`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student = jnp.array([0.0, -jnp.inf])
      >>> teacher = jnp.array([-jnp.inf, 0.0])
      >>> print(f"{losses.jsd(student, teacher):.4f}")  # no overlap: log(2)
      0.6931

    References:
      Agarwal et al., [On-Policy Distillation of Language Models](https://arxiv.org/abs/2306.13649), 2023, eq. 1
    """
    check_static("beta", beta)
    check_share("beta", beta)
    log_student, log_teacher = log_rows(student_logits, teacher_logits, temperature, top_k)
    if beta == 0:
        return kl(log_teacher, log_student)
    if beta == 1:
        return kl(log_student, log_teacher)
    # log m from the larger of the two log-probabilities: exact for equal rows, where logaddexp would round, and
    # without the underflow of a sum of probabilities.
    teacher_larger = log_teacher > log_student
    larger = jnp.where(teacher_larger, log_teacher, log_student)
    smaller = jnp.where(teacher_larger, log_student, log_teacher)
    share_of_smaller = jnp.where(teacher_larger, 1 - beta, beta)
    ratio = log_ratio(smaller, larger, jnp.exp(larger))
    log_mixture = larger + jnp.log1p(share_of_smaller * jnp.expm1(ratio))
    return beta * kl(log_teacher, log_mixture) + (1 - beta) * kl(log_student, log_mixture)


def blend(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float | jax.Array = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Blend of forward and reverse KL, per token.

        D = (1 - beta) KL(p_T || p_S) + beta KL(p_S || p_T)

    Reverse KL alone stands still where a confident student gives the teacher's token no probability: its gradient on a
    logit is p_S (log p_S / p_T - KL). The forward part keeps (1 - beta) (p_S - p_T) there. Near agreement both KLs have
    the same Hessian, so that the scale does not depend on beta; beta = 0 is forward and beta = 1 reverse KL, as in
    `jsd`, but without a jump.

    Args:
      student_logits: float `[..., V]`; see `reverse_kl`, for the other arguments too.
      teacher_logits: float `[..., V]`, held constant.
      beta: in [0, 1], the share of reverse KL. An array (float scalar) may change from step to step without a
        recompilation, as in a pass from forward to reverse KL; it carries no gradient, and its range is not checked.
      temperature: static, > 0.
      top_k: static; None, or K in 1..V for the teacher's K most probable tokens and TAIL.

    Returns:
      The divergence in nats, float32 `[...]`; at beta = 0 and 1 the part that has no share may be infinite.

    Raises:
      ValueError: for a number beta outside [0, 1], and as `reverse_kl`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> teacher = jnp.log(jnp.array([0.125, 0.125, 0.75]))
      >>> [f"{losses.blend(student, teacher, beta=beta):.4f}" for beta in (0.0, 0.5, jnp.array(1.0))]
      ['0.5640', '0.5779', '0.5918']
    """
    check_share("beta", beta)
    log_student, log_teacher = log_rows(student_logits, teacher_logits, temperature, top_k)
    beta = jax.lax.stop_gradient(jnp.asarray(beta, jnp.float32))
    # Without a share a part is that of equal rows: 0 times an infinite divergence, or gradient, would be NaN.
    forward = kl(jnp.where(beta < 1, log_teacher, log_student), log_student)
    reverse = kl(log_student, jnp.where(beta > 0, log_teacher, log_student))
    return (1 - beta) * forward + beta * reverse


def cross_entropy(student_logits: jax.Array, tokens: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """Cross-entropy of given tokens, -log p_S(y), per token: supervised fine-tuning on them.

    No divergence between student and teacher, but the baseline that distillation is compared with: with responses of
    the teacher it learns from what the teacher wrote, and not from what else the teacher might have written. It is
    KL(y || student) of the distribution that is certain of y.

    Args:
      student_logits: float `[..., V]`, any float dtype; carries the gradient.
      tokens: int `[...]`, y.
      temperature: static, > 0; of the student's row.

    Returns:
      -log p_S(y) in nats, float32 `[...]`; infinite where the student excludes y (logit `-inf`), NaN where y is no
      token, such as a label of -100.

    Raises:
      ValueError: for shapes, dtypes or a temperature other than the above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> print(f"{losses.cross_entropy(jnp.log(jnp.array([0.25, 0.75])), jnp.array(0)):.4f}")  # log 4
      1.3863
    """
    check_logits("student_logits", student_logits)
    check_tokens("tokens", tokens, student_logits.shape[:-1])
    log_p = log_softmax(student_logits, temperature)
    chosen = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return only_known(tokens, log_p.shape[-1], -chosen)


DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "blend": blend,
}
WITH_BETA = ("jsd", "blend")
# Those whose gradient has the factor p_S throughout: they stand still where the student excludes the teacher's tokens.
SATURATING = ("reverse_kl", "jsd")

# What `divergence` may be in dpsw_loss.
OBJECTIVES = (*DIVERGENCES, "cross_entropy")

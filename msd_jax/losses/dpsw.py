"""The weighted self-distillation loss."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from msd_jax.losses.checks import (
    check_choice,
    check_cross_entropy,
    check_mask,
    check_pair,
    check_response,
    check_static,
)
from msd_jax.losses.divergences import DIVERGENCES, OBJECTIVES, WITH_BETA, cross_entropy
from msd_jax.losses.naming import formerly
from msd_jax.losses.numerics import entropy, log_softmax
from msd_jax.losses.saturation import is_saturated
from msd_jax.losses.settings import LossSettings
from msd_jax.losses.weights import WEIGHTINGS, clamped, perspectives, student_weight

NORMALIZATIONS = ("mean", "none")


@formerly(response="response_tokens")
def per_token_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array | None,
    response: jax.Array | None = None,
    *,
    divergence: str = "reverse_kl",
    beta: float | jax.Array = 0.5,
    top_k: int | None = None,
    token_cap: float | None = None,
    weighting: str = "dpsw",
    weight_top_k: int = 20,
    entropy_scale: str = "linear",
    student_token: str = "teacher_argmax",
    temperature: float = 1.0,
) -> dict[str, jax.Array]:
    """Everything that `dpsw_loss` knows of each token, for logs and coloured texts.

    Args:
      student_logits: float `[..., V]`, any float dtype.
      teacher_logits: float `[..., V]`, the same shape; held constant. None where nothing reads them: for
        "cross_entropy" with weighting "uniform", or "student" at the "sampled" token.
      response: int `[...]`, its tokens; needed for student_token = "sampled" and divergence = "cross_entropy" alone.
      divergence: static; "reverse_kl", "forward_kl", "jsd", "blend", or "cross_entropy" of the response tokens.
      beta: of `jsd` (static) and `blend` (a number, or an array), unused by the others.
      top_k: static; of the divergence: None, or the teacher's K most probable tokens and TAIL.
      token_cap: static; None, or the divergence in nats, > 0, above which a token counts by the logarithm of its
        divergence, see `capped`.
      weighting: static; "dpsw", "teacher", "student" or "uniform", see `dpsw_weights`.
      weight_top_k: static; K of `teacher_weight`, at least 2; V where that is smaller.
      entropy_scale: static; "linear" or "exponential", see `teacher_weight`.
      student_token: static; "teacher_argmax" or "sampled", see `dpsw_weights`.
      temperature: static, > 0; of both rows, in divergence, weights and entropies.

    Returns:
      A dict of float32 `[...]`; only `kl` carries a gradient:
        kl: the divergence, unweighted and uncapped, in nats (for "jsd", the Jensen-Shannon divergence; for
          "cross_entropy", that).
        weight: the weight by `weighting`, not rescaled.
        w_T, w_S: the two perspectives of DPSW, whatever the weighting.
        teacher_entropy, student_entropy: over the full vocabulary, in nats.
        saturated: the token's term of the loss, weight and cap included, where student and teacher are apart (total
          variation above 1/2) and yet the gradient of the divergence on the student's logits is tiny (its absolute
          entries add up to less than 0.1 min(kl, 1)); 0 elsewhere. Never so for "forward_kl".
      Without teacher_logits, w_T, teacher_entropy and saturated are absent, and w_S is read at the response tokens.

    Raises:
      ValueError: for an unknown name, and as the functions above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student, teacher = jnp.zeros((1, 2)), jnp.array([[9.0, 0.0]])
      >>> for name, value in losses.per_token_loss(student, teacher, weight_top_k=2).items():
      ...     print(f"{name} {value[0]:.4f}")
      kl 3.8070
      weight 0.4991
      w_T 0.9982
      w_S 0.5000
      teacher_entropy 0.0012
      student_entropy 0.6931
      saturated 0.0000
    """
    settings = LossSettings(
        divergence=divergence,
        beta=beta,
        top_k=top_k,
        token_cap=token_cap,
        weighting=weighting,
        weight_top_k=weight_top_k,
        entropy_scale=entropy_scale,
        student_token=student_token,
        temperature=temperature,
    )
    return token_values(student_logits, teacher_logits, response, settings)


@formerly(
    student_logits="student_logits_BxRxV",
    teacher_logits="teacher_logits_BxRxV",
    response="response_BxR",
    mask="mask_BxR",
)
def dpsw_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array | None,
    response: jax.Array | None,
    mask: jax.Array,
    *,
    divergence: str = "reverse_kl",
    beta: float | jax.Array = 0.5,
    top_k: int | None = None,
    token_cap: float | None = None,
    weighting: str = "dpsw",
    weight_top_k: int = 20,
    entropy_scale: str = "linear",
    student_token: str = "teacher_argmax",
    normalize: str = "mean",
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The weighted self-distillation loss, as a sum and the normaliser to divide it by.

        L = sum_t w_t c(D_t) m_t / Z
        Z = sum_t w_t m_t    (normalize = "mean")
        Z = sum_t m_t        (normalize = "none")

    with D_t the divergence, c its cap (`capped`; the identity by default), w_t the weight and m_t the mask of
    response token t. Sums, not a mean, are returned so
    that the loss does not depend on how a batch is split: add loss_sum, normaliser and aux over micro-batches
    (and `psum` them over devices), then divide ONCE, with `mean_loss`. Gradients are those of loss_sum,
    added in the same way and divided by the same global normaliser, which carries no gradient.

    normalize = "mean" makes the effective weights w_t / mean(w) average 1 over the response tokens of the global
    batch, so that a learning rate carries over between weightings. It is ours, not the paper's.

    Args:
      student_logits: float `[B, R, V]`, or any `[..., V]`; row t is the distribution that response token t
        was drawn from. Any float dtype. The gradient flows through these alone.
      teacher_logits: float, the same shape: the teacher at the SAME response tokens. Held constant. None
        where nothing reads them, see `per_token_loss`.
      response: int `[B, R]`, the response tokens; None will do for student_token = "teacher_argmax" and a
        divergence.
      mask: bool, or 0 and 1, `[B, R]`; true at response tokens. What the logits hold where it is false, NaN and
        infinities included, reaches neither the results nor the gradients.
      divergence: static; "reverse_kl", "forward_kl", "jsd", "blend", or "cross_entropy" of the response tokens.
      beta: of `jsd` (static) and `blend` (a number, or an array), unused by the others.
      top_k: static; of the divergence: None, or the teacher's K most probable tokens and TAIL.
      token_cap: static; None, or the divergence in nats, > 0, above which a token counts by the logarithm of its
        divergence, see `capped`.
      weighting: static; "dpsw", "teacher", "student" or "uniform", see `dpsw_weights`.
      weight_top_k: static; K of `teacher_weight`, at least 2; V where that is smaller.
      entropy_scale: static; "linear" or "exponential", see `teacher_weight`.
      student_token: static; "teacher_argmax" or "sampled", see `dpsw_weights`.
      normalize: static; "mean" or "none".
      temperature: static, > 0; of both rows, in divergence, weights and entropies.

    Returns:
      loss_sum: float32 scalar, sum of w_t c(D_t) m_t; 0 with finite gradients if there is no response token.
      normaliser: float32 scalar Z, without gradient; 0 if there is no response token.
      aux: float32 scalars without gradient, SUMS over response tokens, to be added like loss_sum and divided by
        `tokens` for means: `tokens` (their number), and `kl`, `weight`, `w_T`, `w_S`, `teacher_entropy`,
        `student_entropy`, `saturated` of `per_token_loss`. The last over loss_sum is the share of the loss that
        its gradient hardly moves.

    Raises:
      ValueError: for an unknown normalize, shapes and dtypes other than the above, and as `per_token_loss`.
        Outside of jit also for a mask that holds anything but 0 and 1, as the response does, and for a response token
        outside the vocabulary where mask is true, such as a label of -100; under jit the latter, where it is read,
        makes the loss NaN.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student = jnp.log(jnp.array([[[0.1, 0.9], [0.5, 0.5], [0.5, 0.5]]]))
      >>> teacher = jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4], [0.1, 0.9]]]))
      >>> mask = jnp.array([[True, True, False]])
      >>> loss_sum, normaliser, aux = losses.dpsw_loss(student, teacher, None, mask, weight_top_k=2)
      >>> print(f"{losses.mean_loss(loss_sum, normaliser):.4f}")
      1.7065
      >>> print(f"{aux['kl'] / aux['tokens']:.4f}")  # the plain mean, without weights
      0.8891

    References:
      Qin et al., [Multilingual Safety Alignment via Self-Distillation](https://arxiv.org/abs/2605.02971), 2026
    """
    settings = LossSettings(
        divergence=divergence,
        beta=beta,
        top_k=top_k,
        token_cap=token_cap,
        weighting=weighting,
        weight_top_k=weight_top_k,
        entropy_scale=entropy_scale,
        student_token=student_token,
        normalize=normalize,
        temperature=temperature,
    )
    return weighted_loss(student_logits, teacher_logits, response, mask, settings)


def mean_loss(loss_sum: jax.Array, normaliser: jax.Array) -> jax.Array:
    """Divides a sum by the global normaliser; 0 where there was nothing to sum.

    Serves for the loss and, leaf by leaf, for the gradients of loss_sum.

    Args:
      loss_sum: float, any shape; the sum over all micro-batches and devices.
      normaliser: float scalar, the sum over all micro-batches and devices. If it is 0, no response token had any
        weight, and loss_sum is 0 already.

    Returns:
      loss_sum / normaliser, the shape of loss_sum. NaN and infinities are passed on.

    Examples:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> print(losses.mean_loss(jnp.array(3.0), jnp.array(2.0)), losses.mean_loss(jnp.array(0.0), jnp.array(0.0)))
      1.5 0.0
    """
    return loss_sum / jnp.where(normaliser == 0, 1.0, normaliser)


def capped(divergence: jax.Array, token_cap: float | None) -> jax.Array:
    """Divergences per token, of which those above a cap count by their logarithm.

        c(D) = D                     for D <= C
        c(D) = C (1 + log(D / C))    above

    Its gradient is that of D, times min(1, C / D): shorter, in the same direction. The gradient of reverse KL, whose
    absolute entries can add up to 2 D + 2/e, is bounded by that of C; forward KL's adds up to 2 at most as it is.
    (min(D, C) would learn nothing from the very tokens on which student and teacher disagree most.) c is increasing
    and has no other minimum than D. It is applied to whole tokens: the entries of D's sum over the vocabulary have
    both signs, and a cap on each of them could invert the loss. It is ours.

    Args:
      divergence: float `[...]`, at least 0, in nats.
      token_cap: static; C > 0 in nats, or None for no cap.

    Returns:
      c(divergence), `[...]`. Infinities and NaN are passed on.

    Raises:
      ValueError: for a token_cap that is not > 0.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from msd_jax import losses
      >>> [f"{losses.capped(jnp.array(D), 2.0):.3f}" for D in (1.0, 2.0, 8.0)]
      ['1.000', '2.000', '4.773']
      >>> [f"{jax.grad(losses.capped)(D, 2.0):.3f}" for D in (1.0, 2.0, 8.0)]
      ['1.000', '1.000', '0.250']
    """
    if token_cap is None:
        return divergence
    check_static("token_cap", token_cap)
    if not token_cap > 0:
        raise ValueError(f"token_cap must be > 0, got {token_cap!r}")
    above = divergence > token_cap
    excess = jnp.where(above, divergence, token_cap) / token_cap
    return jnp.where(above, token_cap * (1 + jnp.log(excess)), divergence)


def bound_divergence(
    teacher_logits: jax.Array, response_tokens: jax.Array | None, settings: LossSettings
) -> Callable[[jax.Array], jax.Array]:
    """What `settings` measure per token, as a function of the student's logits."""
    s = settings
    if s.divergence == "cross_entropy":
        tokens = check_cross_entropy(response_tokens, s.top_k)
        return functools.partial(cross_entropy, tokens=tokens, temperature=s.temperature)
    options = {"beta": s.beta} if s.divergence in WITH_BETA else {}
    return functools.partial(
        DIVERGENCES[s.divergence],
        teacher_logits=teacher_logits,
        temperature=s.temperature,
        top_k=s.top_k,
        **options,
    )


def token_values(
    student_logits: jax.Array,
    teacher_logits: jax.Array | None,
    response_tokens: jax.Array | None,
    settings: LossSettings,
) -> dict[str, jax.Array]:
    """`per_token_loss` with its options as one value."""
    s = settings
    check_choice("divergence", s.divergence, OBJECTIVES)
    check_choice("weighting", s.weighting, WEIGHTINGS)
    if teacher_logits is None:
        return _without_teacher(student_logits, response_tokens, s)
    weight_top_k = clamped("weight_top_k", s.weight_top_k, teacher_logits.shape[-1])
    divergence = bound_divergence(teacher_logits, response_tokens, s)
    kl = divergence(student_logits)
    w_T, w_S = perspectives(
        student_logits,
        teacher_logits,
        response_tokens,
        weight_top_k,
        s.entropy_scale,
        s.student_token,
        s.temperature,
    )
    weight = WEIGHTINGS[s.weighting](w_T, w_S)
    log_student, log_teacher = (
        log_softmax(jax.lax.stop_gradient(x), s.temperature) for x in (student_logits, teacher_logits)
    )
    stuck = is_saturated(divergence, student_logits, log_student, log_teacher, s.temperature)
    return {
        "kl": kl,
        "weight": weight,
        "w_T": w_T,
        "w_S": w_S,
        "teacher_entropy": entropy(log_teacher),
        "student_entropy": entropy(log_student),
        "saturated": jnp.where(stuck, weight * jax.lax.stop_gradient(capped(kl, s.token_cap)), 0.0),
    }


def _without_teacher(
    student_logits: jax.Array, response_tokens: jax.Array | None, settings: LossSettings
) -> dict[str, jax.Array]:
    """What `token_values` can tell without a teacher."""
    if settings.reads_teacher:
        raise ValueError(
            f"divergence={settings.divergence!r} with weighting={settings.weighting!r} needs teacher_logits, got None"
        )
    tokens = check_cross_entropy(response_tokens, settings.top_k)
    w_S = student_weight(student_logits, tokens, settings.temperature)
    kl = cross_entropy(student_logits, tokens, temperature=settings.temperature)
    return {
        "kl": kl,
        "weight": w_S if settings.weighting == "student" else jnp.ones_like(kl),
        "w_S": w_S,
        "student_entropy": entropy(log_softmax(jax.lax.stop_gradient(student_logits), settings.temperature)),
    }


def weighted_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array | None,
    response: jax.Array | None,
    mask: jax.Array,
    settings: LossSettings,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """`dpsw_loss` with its options as one value."""
    check_choice("normalize", settings.normalize, NORMALIZATIONS)
    if teacher_logits is not None:
        check_pair(student_logits, teacher_logits)
    check_mask(mask, student_logits.shape[:-1])
    if response is not None:
        check_response("response", response, mask, student_logits.shape[-1])
    mask = mask.astype(bool)
    # Masked rows are replaced BEFORE anything is computed from them: 0 * NaN is NaN, in the gradient too.
    student_logits, teacher_logits = jax.tree.map(
        lambda x: jnp.where(mask[..., None], x, 0.0), (student_logits, teacher_logits)
    )
    if response is not None:
        response = jnp.where(mask, response, 0)  # where it may be no token at all, such as a label of -100
    values = token_values(student_logits, teacher_logits, response, settings)
    sum_tokens = functools.partial(jnp.sum, where=mask, dtype=jnp.float32)
    loss_sum = sum_tokens(values["weight"] * capped(values["kl"], settings.token_cap))
    aux = jax.lax.stop_gradient({name: sum_tokens(value) for name, value in values.items()})
    aux["tokens"] = jnp.sum(mask, dtype=jnp.float32)
    return loss_sum, aux["weight"] if settings.normalize == "mean" else aux["tokens"], aux

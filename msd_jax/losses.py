"""Self-distillation losses: per-token divergences, DPSW weights, and the weighted loss.

Needs JAX alone and works in any JAX project, under `jit`, `grad`, `vmap` and `shard_map`. Everything is a pure
function of logits; whatever float dtype comes in, float32 is used inside and comes out. The options are static
Python values, bound with `functools.partial` before `jit`:

    loss_fn = functools.partial(losses.dpsw_loss, divergence="forward_kl", temperature=0.7)
    loss_sum, normaliser, aux = jax.jit(loss_fn)(student_logits, teacher_logits, response, mask)
    loss = losses.mean_loss(loss_sum, normaliser)

Gradients flow through the student's logits and nothing else.

The method is "Multilingual Safety Alignment via Self-Distillation" (Qin et al., 2026, arXiv 2605.02971). Its full
text was not at hand when this was written. From its abstract and public summaries come: a divergence per token
between teacher and student, weighted by w_t = w_T * w_S; w_T from the entropy of the teacher's top-K; w_S from
1 - p_S. Ours are: the scale 1 - H_K / log K, which token p_S is read at, the stop-gradient on the weights, their
rescaling to mean 1, top-K + TAIL, and one temperature for divergence and weights alike.
"""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

# --- Divergences ------------------------------------------------------------------------------------------------


def reverse_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    r"""Reverse Kullback-Leibler divergence, KL(student || teacher), per token.

    .. math::
      D = \sum_v p_S(v) \log \frac{p_S(v)}{p_T(v)}

    Mode-seeking: the student is punished for mass where the teacher has little. The default on-policy.

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

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> teacher = jnp.log(jnp.array([0.25, 0.5, 0.25]))
      >>> print(f"{losses.reverse_kl(student, teacher):.4f}")  # log(2) / 4
      0.1733
      >>> print(f"{losses.reverse_kl(student, teacher, top_k=1):.4f}")  # (1/4, 3/4) against (1/2, 1/2)
      0.1308

    References:
      Agarwal et al., `On-Policy Distillation of Language Models <https://arxiv.org/abs/2306.13649>`_, 2023
      Gu et al., `MiniLLM <https://arxiv.org/abs/2306.08543>`_, 2023
    """
    log_student, log_teacher = _log_rows(student_logits, teacher_logits, temperature, top_k)
    return _kl(log_student, log_teacher)


def forward_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    r"""Forward Kullback-Leibler divergence, KL(teacher || student), per token.

    .. math::
      D = \sum_v p_T(v) \log \frac{p_T(v)}{p_S(v)}

    Mode-covering: the student is punished for missing mass that the teacher has; its gradient is that of the
    cross-entropy against the teacher's distribution. The default off-policy.

    Args:
      student_logits: float `[..., V]`; see :func:`reverse_kl`, for the other arguments too.
      teacher_logits: float `[..., V]`, held constant.
      temperature: static, > 0.
      top_k: static; None, or K in 1..V for the teacher's K most probable tokens and TAIL.

    Returns:
      The divergence in nats, float32 `[...]`.

    Raises:
      ValueError: as :func:`reverse_kl`.

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> teacher = jnp.log(jnp.array([0.125, 0.125, 0.75]))
      >>> print(f"{losses.forward_kl(student, teacher):.4f} {losses.reverse_kl(student, teacher):.4f}")
      0.5640 0.5918

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network <https://arxiv.org/abs/1503.02531>`_, 2015
    """
    log_student, log_teacher = _log_rows(student_logits, teacher_logits, temperature, top_k)
    return _kl(log_teacher, log_student)


def jsd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    r"""Generalised Jensen-Shannon divergence between teacher and student, per token.

    .. math::
      D = \beta \, KL(p_T || m) + (1 - \beta) \, KL(p_S || m), \quad m = \beta p_T + (1 - \beta) p_S

    beta is the teacher's share of the mixture m. The formula itself goes to 0 at both ends, as
    beta * KL(teacher || student) near 0 and as (1 - beta) * KL(student || teacher) near 1; there the divergences
    that it points to take its place, by the convention of GKD and TRL:

    - beta = 0 is forward KL, KL(teacher || student);
    - beta = 1 is reverse KL, KL(student || teacher).

    The scale therefore jumps at the two ends: beta = 0.01 is about a hundredth of beta = 0. For 0 < beta < 1 the
    result is bounded by log 2, and finite even where the supports differ.

    Args:
      student_logits: float `[..., V]`; see :func:`reverse_kl`, for the other arguments too.
      teacher_logits: float `[..., V]`, held constant.
      beta: static, in [0, 1].
      temperature: static, > 0.
      top_k: static; None, or K in 1..V for the teacher's K most probable tokens and TAIL.

    Returns:
      The divergence in nats, float32 `[...]`.

    Raises:
      ValueError: for a beta outside [0, 1], and as :func:`reverse_kl`.

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student = jnp.array([0.0, -jnp.inf])
      >>> teacher = jnp.array([-jnp.inf, 0.0])
      >>> print(f"{losses.jsd(student, teacher):.4f}")  # no overlap: log(2)
      0.6931

    References:
      Agarwal et al., `On-Policy Distillation of Language Models <https://arxiv.org/abs/2306.13649>`_, 2023, eq. 1
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta!r}")
    log_student, log_teacher = _log_rows(student_logits, teacher_logits, temperature, top_k)
    if beta == 0:
        return _kl(log_teacher, log_student)
    if beta == 1:
        return _kl(log_student, log_teacher)
    # log m from the larger of the two log-probabilities: exact for equal rows, where logaddexp would round, and
    # without the underflow of a sum of probabilities.
    teacher_larger = log_teacher > log_student
    larger = jnp.where(teacher_larger, log_teacher, log_student)
    smaller = jnp.where(teacher_larger, log_student, log_teacher)
    share_of_smaller = jnp.where(teacher_larger, 1 - beta, beta)
    ratio = _log_ratio(smaller, larger, jnp.exp(larger))
    log_mixture = larger + jnp.log1p(share_of_smaller * jnp.expm1(ratio))
    return beta * _kl(log_teacher, log_mixture) + (1 - beta) * _kl(log_student, log_mixture)


def cross_entropy(student_logits: jax.Array, tokens: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    r"""Cross-entropy of given tokens, -log p_S(y), per token: supervised fine-tuning on them.

    No divergence between student and teacher, but the baseline that distillation is compared with: with responses of
    the teacher it learns from what the teacher wrote, and not from what else the teacher might have written. It is
    KL(y || student) of the distribution that is certain of y.

    Args:
      student_logits: float `[..., V]`, any float dtype; carries the gradient.
      tokens: int `[...]`, y.
      temperature: static, > 0; of the student's row.

    Returns:
      -log p_S(y) in nats, float32 `[...]`; infinite where the student excludes y (logit `-inf`).

    Raises:
      ValueError: for shapes, dtypes or a temperature other than the above.

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> print(f"{losses.cross_entropy(jnp.log(jnp.array([0.25, 0.75])), jnp.array(0)):.4f}")  # log 4
      1.3863
    """
    _check_logits("student_logits", student_logits)
    _check_tokens("tokens", tokens, student_logits.shape[:-1])
    log_p = _log_softmax(student_logits, temperature)
    return -jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
}

# --- DPSW weights -----------------------------------------------------------------------------------------------

# What `divergence` may be in the functions below.
OBJECTIVES = (*DIVERGENCES, "cross_entropy")

WEIGHTINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "dpsw": lambda w_T, w_S: w_T * w_S,
    "teacher": lambda w_T, w_S: w_T,
    "student": lambda w_T, w_S: w_S,
    "uniform": lambda w_T, w_S: jnp.ones_like(w_T),
}
STUDENT_TOKENS = ("teacher_argmax", "sampled")
NORMALIZATIONS = ("mean", "none")


def teacher_weight(teacher_logits: jax.Array, *, top_k: int, temperature: float = 1.0) -> jax.Array:
    r"""The teacher's perspective of DPSW: how confident the teacher is, per token.

    .. math::
      w_T = 1 - \frac{H_K(p_T)}{\log K}, \quad H_K(p) = -\sum_{v \in \text{top-}K} \hat p(v) \log \hat p(v),
      \quad \hat p = p / \sum_{\text{top-}K} p

    1 where the teacher allows one token only (the first words of a refusal), 0 where its K most probable tokens
    are equally good. That the entropy of the teacher's top-K marks the tokens that matter is the paper's;
    renormalising over the K tokens and the scale 1 - H_K / log K are ours.

    Args:
      teacher_logits: float `[..., V]`, any float dtype.
      top_k: static, K in 2..V.
      temperature: static, > 0.

    Returns:
      w_T in [0, 1], float32 `[...]`, without gradient.

    Raises:
      ValueError: for a top_k outside 2..V, a temperature that is not > 0, or logits that are not float `[..., V]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> logits = jnp.log(jnp.array([[1.0, 0.0, 0.0, 0.0], [0.4, 0.4, 0.1, 0.1]]))
      >>> [f"{w:.3f}" for w in losses.teacher_weight(logits, top_k=4)]
      ['1.000', '0.139']
      >>> [f"{w:.3f}" for w in losses.teacher_weight(logits, top_k=2)]
      ['1.000', '0.000']

    References:
      Qin et al., `Multilingual Safety Alignment via Self-Distillation <https://arxiv.org/abs/2605.02971>`_, 2026
    """
    _check_logits("teacher_logits", teacher_logits)
    _check_top_k("top_k", top_k, 2, teacher_logits.shape[-1])
    top_logits, _ = _top_k(jax.lax.stop_gradient(teacher_logits), top_k)
    return jnp.clip(1 - _entropy(_log_softmax(top_logits, temperature)) / math.log(top_k), 0.0, 1.0)


def student_weight(student_logits: jax.Array, tokens: jax.Array, temperature: float = 1.0) -> jax.Array:
    r"""The student's perspective of DPSW: the risk that the student says something else, per token.

    .. math::
      w_S = 1 - p_S(v)

    That the weight is 1 - p_S is the paper's; which token v it is read at is the caller's choice (see
    :func:`dpsw_weights`).

    Args:
      student_logits: float `[..., V]`, any float dtype.
      tokens: int `[...]`, the token v of each row.
      temperature: static, > 0.

    Returns:
      w_S in [0, 1], float32 `[...]`, without gradient. Accurate relative to itself even where p_S(v) rounds to 1.

    Raises:
      ValueError: for a temperature that is not > 0, or shapes and dtypes other than the above.

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> logits = jnp.log(jnp.array([[0.75, 0.25], [1.0, 1e-12]]))
      >>> [f"{w:.3g}" for w in losses.student_weight(logits, jnp.array([0, 0]))]
      ['0.25', '1e-12']

    References:
      Qin et al., `Multilingual Safety Alignment via Self-Distillation <https://arxiv.org/abs/2605.02971>`_, 2026
    """
    _check_logits("student_logits", student_logits)
    _check_tokens("tokens", tokens, student_logits.shape[:-1])
    p = jnp.exp(_log_softmax(jax.lax.stop_gradient(student_logits), temperature))
    # Summed over the other tokens: the subtraction 1 - p would be lost in rounding for a confident student.
    others = jnp.arange(p.shape[-1]) != jnp.expand_dims(tokens, -1)
    return jnp.minimum(jnp.sum(p, axis=-1, where=others), 1.0)


def dpsw_weights(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    response_tokens: jax.Array | None = None,
    *,
    weighting: str = "dpsw",
    top_k: int = 20,
    student_token: str = "teacher_argmax",
    temperature: float = 1.0,
) -> jax.Array:
    r"""Dual-Perspective Safety Weighting (DPSW): the weight of each response token.

    .. math::
      w = w_T \, w_S

    High where the teacher is sure and the student is likely to say something else. The product of the two
    perspectives is the paper's. Ours: the token at which the student's risk is read, top_k = 20, and that no
    gradient flows through the weights, so that the student cannot lower its loss by lowering its weights.

    Args:
      student_logits: float `[..., V]`, any float dtype.
      teacher_logits: float `[..., V]`, the same shape.
      response_tokens: int `[...]`; needed for student_token = "sampled" alone.
      weighting: static; "dpsw" w_T * w_S, "teacher" w_T, "student" w_S, "uniform" 1.
      top_k: static, K of :func:`teacher_weight`, in 2..V.
      student_token: static; the v of w_S = 1 - p_S(v): "teacher_argmax", the teacher's most probable token, or
        "sampled", the token of the response.
      temperature: static, > 0; of both rows.

    Returns:
      The weights, not rescaled, in [0, 1], float32 `[...]`, without gradient.

    Raises:
      ValueError: for an unknown weighting or student_token, "sampled" without response_tokens, and as
        :func:`teacher_weight` and :func:`student_weight`.

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> teacher = jnp.log(jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
      >>> student = jnp.log(jnp.array([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]))
      >>> [f"{w:.3f}" for w in losses.dpsw_weights(student, teacher, top_k=2)]  # at odds, agreed, teacher unsure
      ['0.900', '0.100', '0.000']

    References:
      Qin et al., `Multilingual Safety Alignment via Self-Distillation <https://arxiv.org/abs/2605.02971>`_, 2026
    """
    _check_choice("weighting", weighting, WEIGHTINGS)
    w_T, w_S = _perspectives(student_logits, teacher_logits, response_tokens, top_k, student_token, temperature)
    return WEIGHTINGS[weighting](w_T, w_S)


# --- The weighted loss ------------------------------------------------------------------------------------------


def token_diagnostics(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    response_tokens: jax.Array | None = None,
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    top_k: int | None = None,
    weighting: str = "dpsw",
    weight_top_k: int = 20,
    student_token: str = "teacher_argmax",
    temperature: float = 1.0,
) -> dict[str, jax.Array]:
    """Everything that :func:`dpsw_loss` knows of each token, for logs and coloured texts.

    Args:
      student_logits: float `[..., V]`, any float dtype.
      teacher_logits: float `[..., V]`, the same shape; held constant.
      response_tokens: int `[...]`; needed for student_token = "sampled" and divergence = "cross_entropy" alone.
      divergence: static; "reverse_kl", "forward_kl", "jsd", or "cross_entropy" of the response tokens.
      beta: static; of :func:`jsd`, unused by the others.
      top_k: static; of the divergence: None, or the teacher's K most probable tokens and TAIL.
      weighting: static; "dpsw", "teacher", "student" or "uniform", see :func:`dpsw_weights`.
      weight_top_k: static; K of :func:`teacher_weight`, in 2..V.
      student_token: static; "teacher_argmax" or "sampled", see :func:`dpsw_weights`.
      temperature: static, > 0; of both rows, in divergence, weights and entropies.

    Returns:
      A dict of float32 `[...]`; only `kl` carries a gradient:
        kl: the divergence, unweighted, in nats (for "jsd", the Jensen-Shannon divergence; for "cross_entropy",
          that).
        weight: the weight by `weighting`, not rescaled.
        w_T, w_S: the two perspectives of DPSW, whatever the weighting.
        teacher_entropy, student_entropy: over the full vocabulary, in nats.

    Raises:
      ValueError: for an unknown name, and as the functions above.

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> student, teacher = jnp.zeros((1, 2)), jnp.array([[9.0, 0.0]])
      >>> for name, value in losses.token_diagnostics(student, teacher, weight_top_k=2).items():
      ...     print(f"{name} {value[0]:.4f}")
      kl 3.8070
      weight 0.4991
      w_T 0.9982
      w_S 0.5000
      teacher_entropy 0.0012
      student_entropy 0.6931
    """
    _check_choice("divergence", divergence, OBJECTIVES)
    _check_choice("weighting", weighting, WEIGHTINGS)
    if divergence == "cross_entropy":
        _check_cross_entropy(response_tokens, top_k)
        kl = cross_entropy(student_logits, response_tokens, temperature=temperature)
    else:
        options = {"beta": beta} if divergence == "jsd" else {}
        kl = DIVERGENCES[divergence](student_logits, teacher_logits, temperature=temperature, top_k=top_k, **options)
    _check_top_k("weight_top_k", weight_top_k, 2, teacher_logits.shape[-1])
    w_T, w_S = _perspectives(student_logits, teacher_logits, response_tokens, weight_top_k, student_token, temperature)
    return {
        "kl": kl,
        "weight": WEIGHTINGS[weighting](w_T, w_S),
        "w_T": w_T,
        "w_S": w_S,
        "teacher_entropy": _entropy(_log_softmax(jax.lax.stop_gradient(teacher_logits), temperature)),
        "student_entropy": _entropy(_log_softmax(jax.lax.stop_gradient(student_logits), temperature)),
    }


def dpsw_loss(
    student_logits_BxRxV: jax.Array,
    teacher_logits_BxRxV: jax.Array,
    response_BxR: jax.Array | None,
    mask_BxR: jax.Array,
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    top_k: int | None = None,
    weighting: str = "dpsw",
    weight_top_k: int = 20,
    student_token: str = "teacher_argmax",
    normalize: str = "mean",
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    r"""The weighted self-distillation loss, as a sum and the normaliser to divide it by.

    .. math::
      L = \frac{\sum_t w_t D_t m_t}{Z}, \quad
      Z = \sum_t w_t m_t \text{ ("mean")} \quad \text{or} \quad Z = \sum_t m_t \text{ ("none")}

    with D_t the divergence, w_t the weight and m_t the mask of response token t. Sums, not a mean, are returned so
    that the loss does not depend on how a batch is split: add loss_sum, normaliser and aux over micro-batches
    (and `psum` them over devices), then divide ONCE, with :func:`mean_loss`. Gradients are those of loss_sum,
    added in the same way and divided by the same global normaliser, which carries no gradient.

    normalize = "mean" makes the effective weights w_t / mean(w) average 1 over the response tokens of the global
    batch, so that a learning rate carries over between weightings. It is ours, not the paper's.

    Args:
      student_logits_BxRxV: float `[B, R, V]`, or any `[..., V]`; row t is the distribution that response token t
        was drawn from. Any float dtype. The gradient flows through these alone.
      teacher_logits_BxRxV: float, the same shape: the teacher at the SAME response tokens. Held constant.
      response_BxR: int `[B, R]`, the response tokens; None will do for student_token = "teacher_argmax" and a
        divergence.
      mask_BxR: bool or 0/1 `[B, R]`, true at response tokens. What the logits hold where it is false, NaN and
        infinities included, reaches neither the results nor the gradients.
      divergence: static; "reverse_kl", "forward_kl", "jsd", or "cross_entropy" of the response tokens.
      beta: static; of :func:`jsd`, unused by the others.
      top_k: static; of the divergence: None, or the teacher's K most probable tokens and TAIL.
      weighting: static; "dpsw", "teacher", "student" or "uniform", see :func:`dpsw_weights`.
      weight_top_k: static; K of :func:`teacher_weight`, in 2..V.
      student_token: static; "teacher_argmax" or "sampled", see :func:`dpsw_weights`.
      normalize: static; "mean" or "none".
      temperature: static, > 0; of both rows, in divergence, weights and entropies.

    Returns:
      loss_sum: float32 scalar, sum of w_t D_t m_t; 0 with finite gradients if there is no response token.
      normaliser: float32 scalar Z, without gradient; 0 if there is no response token.
      aux: float32 scalars without gradient, SUMS over response tokens, to be added like loss_sum and divided by
        `tokens` for means: `tokens` (their number), and `kl`, `weight`, `w_T`, `w_S`, `teacher_entropy`,
        `student_entropy` of :func:`token_diagnostics`.

    Raises:
      ValueError: for an unknown normalize, shapes other than the above, and as :func:`token_diagnostics`.

    Example:
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
      Qin et al., `Multilingual Safety Alignment via Self-Distillation <https://arxiv.org/abs/2605.02971>`_, 2026
    """
    _check_choice("normalize", normalize, NORMALIZATIONS)
    _check_pair(student_logits_BxRxV, teacher_logits_BxRxV)
    if mask_BxR.shape != student_logits_BxRxV.shape[:-1]:
        raise ValueError(
            f"mask must have the shape of the logits without their last axis, "
            f"{student_logits_BxRxV.shape[:-1]}, got {mask_BxR.shape}"
        )
    mask_BxR = mask_BxR.astype(bool)
    # Masked rows are replaced BEFORE anything is computed from them: 0 * NaN is NaN, in the gradient too.
    token_values = token_diagnostics(
        jnp.where(mask_BxR[..., None], student_logits_BxRxV, 0.0),
        jnp.where(mask_BxR[..., None], teacher_logits_BxRxV, 0.0),
        response_BxR,
        divergence=divergence,
        beta=beta,
        top_k=top_k,
        weighting=weighting,
        weight_top_k=weight_top_k,
        student_token=student_token,
        temperature=temperature,
    )
    sum_tokens = functools.partial(jnp.sum, where=mask_BxR, dtype=jnp.float32)
    loss_sum = sum_tokens(token_values["weight"] * token_values["kl"])
    aux = jax.lax.stop_gradient({name: sum_tokens(values) for name, values in token_values.items()})
    aux["tokens"] = jnp.sum(mask_BxR, dtype=jnp.float32)
    return loss_sum, aux["weight"] if normalize == "mean" else aux["tokens"], aux


def mean_loss(loss_sum: jax.Array, normaliser: jax.Array) -> jax.Array:
    """Divides a sum by the global normaliser; 0 where there was nothing to sum.

    Serves for the loss and, leaf by leaf, for the gradients of loss_sum.

    Args:
      loss_sum: float, any shape; the sum over all micro-batches and devices.
      normaliser: float scalar, the sum over all micro-batches and devices. If it is 0, no response token had any
        weight, and loss_sum is 0 already.

    Returns:
      loss_sum / normaliser, the shape of loss_sum. NaN and infinities are passed on.

    Example:
      >>> import jax.numpy as jnp
      >>> from msd_jax import losses
      >>> print(losses.mean_loss(jnp.array(3.0), jnp.array(2.0)), losses.mean_loss(jnp.array(0.0), jnp.array(0.0)))
      1.5 0.0
    """
    return loss_sum / jnp.where(normaliser == 0, 1.0, normaliser)


# --- Numerics ---------------------------------------------------------------------------------------------------


@jax.custom_jvp
def _kl_terms(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """Elementwise a log(a / b) - a + b, whose sum over a row is KL(a || b) as both rows sum to 1.

    Every term is >= 0 (scipy.special.kl_div; the Bregman divergence of a log a). The plain terms a log(a / b) have
    both signs and cancel: near-equal rows, where self-distillation lives, would be left with the rounding error of
    the two log-normalisers. Here that error enters in second order only.
    """
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    d = _log_ratio(log_b, log_a, a)
    series = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d / 5040)))))
    return jnp.where((a > 0) & (abs(d) < 0.5), a * series, b - a * (1 + d))  # exp(d) - 1 - d = series(d)


# By hand: shorter than what autodiff makes of the two branches, and free of inf - inf at excluded tokens.
_kl_terms.defjvps(
    lambda tangent, _, log_a, log_b: tangent * jnp.exp(log_a) * _log_ratio(log_a, log_b, jnp.exp(log_a)),
    lambda tangent, _, log_a, log_b: tangent * (jnp.exp(log_b) - jnp.exp(log_a)),
)


def _log_ratio(log_x: jax.Array, log_y: jax.Array, weight: jax.Array) -> jax.Array:
    """log(x / y), and 0 where `weight` is 0: 0 log(0 / y) = 0, the convention of the KL divergence."""
    used = weight > 0
    return jnp.where(used, jnp.where(used, log_x, 0.0) - jnp.where(used, log_y, 0.0), 0.0)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return jnp.sum(_kl_terms(log_a, log_b), axis=-1)


def _entropy(log_p: jax.Array) -> jax.Array:
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)


def _log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _log_rows(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float, top_k: int | None
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of student and teacher, over V tokens or over the teacher's top_k and TAIL."""
    _check_pair(student_logits, teacher_logits)
    log_student = _log_softmax(student_logits, temperature)
    log_teacher = _log_softmax(jax.lax.stop_gradient(teacher_logits), temperature)
    if top_k is None:
        return log_student, log_teacher
    _check_top_k("top_k", top_k, 1, log_teacher.shape[-1])
    if top_k == log_teacher.shape[-1]:  # the tail is empty
        return log_student, log_teacher
    top_values, top_tokens = _top_k(log_teacher, top_k)
    # Equal logits are common in bfloat16: of those that tie at the K-th place, top_k takes the lower indices.
    # (The K-th place by min: a slice of top_k's results keeps XLA from its fast top-k, and it sorts all of V.)
    lowest = jnp.min(top_values, axis=-1, keepdims=True)
    last = jnp.max(jnp.where(top_values == lowest, top_tokens, -1), axis=-1, keepdims=True)
    in_top = (log_teacher > lowest) | ((log_teacher == lowest) & (jnp.arange(log_teacher.shape[-1]) <= last))
    return _coarsen(log_student, top_tokens, in_top), _coarsen(log_teacher, top_tokens, in_top)


_BLOCKS = 16


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """jax.lax.top_k: values and indices `[..., k]`, in two stages, so that a vocabulary split over devices stays split.

    Each of 16 blocks gives its k largest elements, and the k largest of those are taken: blocks of the vocabulary lie
    on one device each where the number of devices divides 16. Of equal elements the first come first, as in top_k.
    """
    V = x.shape[-1]
    if V % _BLOCKS or k >= V // _BLOCKS:
        return tuple(jax.lax.top_k(x, k))
    values, indices = jax.lax.top_k(x.reshape(*x.shape[:-1], _BLOCKS, -1), k)
    indices += jnp.arange(0, V, V // _BLOCKS)[:, None]
    values, indices = (a.reshape(*x.shape[:-1], -1) for a in (values, indices))
    top_values, positions = jax.lax.top_k(values, k)
    return top_values, jnp.take_along_axis(indices, positions, axis=-1)


def _coarsen(log_p: jax.Array, top_tokens: jax.Array, in_top: jax.Array) -> jax.Array:
    """`[..., V]` -> `[..., K + 1]`: the log-probabilities of top_tokens, then that of all others together."""
    # A sum over the others; 1 - sum(top) would lose a small tail. If they are all excluded, the gradient of
    # logsumexp is NaN, so that it must not see them.
    others = jnp.where(in_top, -jnp.inf, log_p)
    empty = jnp.max(others, axis=-1, keepdims=True) == -jnp.inf
    tail = jax.nn.logsumexp(jnp.where(empty, 0.0, others), axis=-1, keepdims=True)
    tail = jnp.where(empty, -jnp.inf, tail)
    return jnp.concatenate([jnp.take_along_axis(log_p, top_tokens, axis=-1), tail], axis=-1)


def _perspectives(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    response_tokens: jax.Array | None,
    top_k: int,
    student_token: str,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """The two factors of DPSW, (w_T, w_S)."""
    _check_pair(student_logits, teacher_logits)
    _check_choice("student_token", student_token, STUDENT_TOKENS)
    if student_token == "teacher_argmax":
        tokens = jnp.argmax(teacher_logits, axis=-1)
    elif response_tokens is None:
        raise ValueError("student_token='sampled' needs the response tokens, got None")
    else:
        tokens = response_tokens
    w_T = teacher_weight(teacher_logits, top_k=top_k, temperature=temperature)
    return w_T, student_weight(student_logits, tokens, temperature)


# --- Checks: shapes and static arguments, at trace time ---------------------------------------------------------


def _check_logits(name: str, logits: jax.Array) -> None:
    if logits.ndim < 1 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{name} must be floats of shape [..., V], got {logits.dtype} {logits.shape}")


def _check_pair(student_logits: jax.Array, teacher_logits: jax.Array) -> None:
    _check_logits("student_logits", student_logits)
    _check_logits("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape [..., V], "
            f"got {student_logits.shape} and {teacher_logits.shape}"
        )


def _check_tokens(name: str, tokens: jax.Array, shape: tuple[int, ...]) -> None:
    if tokens.shape != shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers of shape {shape}, got {tokens.dtype} {tokens.shape}")


def _check_top_k(name: str, top_k: int, lowest: int, vocabulary: int) -> None:
    if top_k not in range(lowest, vocabulary + 1):
        raise ValueError(f"{name} must be an integer in {lowest}..{vocabulary} (the vocabulary's size), got {top_k!r}")


def _check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_cross_entropy(response_tokens: jax.Array | None, top_k: int | None) -> None:
    if response_tokens is None:
        raise ValueError("divergence='cross_entropy' needs the response tokens, got None")
    if top_k is not None:
        raise ValueError(f"divergence='cross_entropy' has no top_k, got {top_k!r}")

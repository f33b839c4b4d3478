"""Self-distillation losses: per-token divergences, DPSW weights, and the weighted loss.

Needs JAX alone and works in any JAX project, under `jit`, `grad`, `vmap` and `shard_map`. Everything is a pure
function of logits; whatever float dtype comes in, float32 is used inside and comes out. Arrays may be given by position
or name; the options are keywords, and static under `jit`:

    dpsw_loss = jax.jit(losses.dpsw_loss, static_argnames=losses.static_argnames(losses.dpsw_loss))
    loss_sum, normaliser, aux = dpsw_loss(student_logits, teacher_logits, response, mask, divergence="forward_kl")
    loss = losses.mean_loss(loss_sum, normaliser)

Gradients flow through the student's logits and nothing else.

The method is "Multilingual Safety Alignment via Self-Distillation" (Qin et al., 2026, arXiv 2605.02971). Its full
text was not at hand when this was written. From its abstract and public summaries come: a divergence per token
between teacher and student, weighted by w_t = w_T * w_S; w_T from the entropy of the teacher's top-K; w_S from
1 - p_S. Ours are: the scale 1 - H_K / log K (or exp(-H_K)), which token p_S is read at, the stop-gradient on the
weights, their rescaling to mean 1, top-K + TAIL, the blend of the two KLs, the cap, and one temperature for divergence
and weights alike.
"""

from msd_jax.losses.divergences import (
    DIVERGENCES,
    OBJECTIVES,
    SATURATING,
    blend,
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
)
from msd_jax.losses.dpsw import NORMALIZATIONS, capped, dpsw_loss, mean_loss, per_token_loss
from msd_jax.losses.fused import fused_dpsw_loss
from msd_jax.losses.naming import static_argnames
from msd_jax.losses.settings import LossSettings, resolve_divergence
from msd_jax.losses.weights import (
    ENTROPY_SCALES,
    STUDENT_TOKENS,
    WEIGHTINGS,
    dpsw_weights,
    student_weight,
    teacher_weight,
)

__all__ = [
    "DIVERGENCES",
    "ENTROPY_SCALES",
    "NORMALIZATIONS",
    "OBJECTIVES",
    "SATURATING",
    "STUDENT_TOKENS",
    "WEIGHTINGS",
    "LossSettings",
    "blend",
    "capped",
    "cross_entropy",
    "dpsw_loss",
    "dpsw_weights",
    "forward_kl",
    "fused_dpsw_loss",
    "jsd",
    "mean_loss",
    "per_token_loss",
    "resolve_divergence",
    "reverse_kl",
    "static_argnames",
    "student_weight",
    "teacher_weight",
]

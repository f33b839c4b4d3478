"""Multilingual Self-Distillation with Dual-Perspective Safety Weighting, in JAX and Flax.

`import msd_jax` brings in the losses, which need JAX alone; every other module is imported by its own name.
"""

from msd_jax.losses import (
    DIVERGENCES,
    LossSettings,
    blend,
    capped,
    cross_entropy,
    dpsw_loss,
    dpsw_weights,
    forward_kl,
    fused_dpsw_loss,
    jsd,
    mean_loss,
    per_token_loss,
    reverse_kl,
    static_argnames,
    student_weight,
    teacher_weight,
)

__version__ = "0.1.0"

__all__ = [
    "DIVERGENCES",
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
    "reverse_kl",
    "static_argnames",
    "student_weight",
    "teacher_weight",
]

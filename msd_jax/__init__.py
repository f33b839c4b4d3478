"""Multilingual Self-Distillation with Dual-Perspective Safety Weighting, in JAX and Flax.

`import msd_jax` brings in the losses, which need JAX alone; every other module is imported by its own name.
"""

from msd_jax.losses import (
    DIVERGENCES,
    cross_entropy,
    dpsw_loss,
    dpsw_weights,
    forward_kl,
    jsd,
    mean_loss,
    reverse_kl,
    student_weight,
    teacher_weight,
    token_diagnostics,
)

__all__ = [
    "DIVERGENCES",
    "cross_entropy",
    "dpsw_loss",
    "dpsw_weights",
    "forward_kl",
    "jsd",
    "mean_loss",
    "reverse_kl",
    "student_weight",
    "teacher_weight",
    "token_diagnostics",
]

"""The options of the loss, as one value."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The keyword arguments of :func:`losses.dpsw_loss`, which documents them; hashable, so a static argument of jit.

    ``losses.dpsw_loss(..., **vars(settings))`` hands them on; they are checked there.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    top_k: int | None = None
    weighting: str = "dpsw"
    weight_top_k: int = 20
    student_token: str = "teacher_argmax"
    normalize: str = "mean"
    temperature: float = 1.0

    @property
    def reads_teacher(self) -> bool:
        """Whether the loss depends on the teacher's rows; without, it takes None in their place."""
        weight = {"uniform": False, "student": self.student_token == "teacher_argmax"}.get(self.weighting, True)
        return self.divergence != "cross_entropy" or weight


def resolve_divergence(name: str, policy: str) -> str:
    """`name`, or the divergence that "auto" stands for when `policy` says who writes the responses.

    Args:
      name: "auto", or a divergence.
      policy: "on_policy", "mixed", "off_policy" or "reference".

    Returns:
      For "auto": "forward_kl" off-policy and on reference responses, and "reverse_kl" otherwise.

    Example:
      >>> from msd_jax import losses
      >>> losses.resolve_divergence("auto", "off_policy"), losses.resolve_divergence("jsd", "off_policy")
      ('forward_kl', 'jsd')
    """
    if name != "auto":
        return name
    return "forward_kl" if policy in ("off_policy", "reference") else "reverse_kl"

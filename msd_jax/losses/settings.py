"""The options of the loss, as one value."""

import dataclasses

import jax

# What divergence="auto" is, by where the responses come from: the student, either model, the teacher, the data.
AUTO = {"on_policy": "reverse_kl", "mixed": "reverse_kl", "off_policy": "forward_kl", "reference": "forward_kl"}


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The keyword arguments of :func:`losses.dpsw_loss`, which documents them.

    Hashable, so a static argument of jit, unless beta is an array.

    ``losses.dpsw_loss(..., **vars(settings))`` hands them on; they are checked there.
    """

    divergence: str = "reverse_kl"
    beta: float | jax.Array = 0.5
    top_k: int | None = None
    token_cap: float | None = None
    weighting: str = "dpsw"
    weight_top_k: int = 20
    entropy_scale: str = "linear"
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
      policy: a key of AUTO.

    Returns:
      For "auto": AUTO[policy].

    Example:
      >>> from msd_jax import losses
      >>> losses.resolve_divergence("auto", "off_policy"), losses.resolve_divergence("jsd", "off_policy")
      ('forward_kl', 'jsd')
    """
    return AUTO[policy] if name == "auto" else name

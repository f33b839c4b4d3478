"""The options of the loss, as one value."""

import dataclasses

import jax

# What divergence="auto" is, by who writes the responses: the student, either model, the teacher, the data. Reverse KL,
# which summaries of the paper name for the student's, can stand still where the student is certain: docs/method.md.
AUTO = dict.fromkeys(("on_policy", "mixed", "off_policy", "reference"), "forward_kl")


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The keyword arguments of `losses.dpsw_loss`, which documents them.

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

    Examples:
      >>> from msd_jax import losses
      >>> losses.resolve_divergence("auto", "on_policy"), losses.resolve_divergence("jsd", "on_policy")
      ('forward_kl', 'jsd')
    """
    return AUTO[policy] if name == "auto" else name

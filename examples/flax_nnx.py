"""The loss with a Flax NNX model.

python -m examples.flax_nnx
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples import data
from msd_jax import losses


def train(
    features: jax.Array, teacher_logits: jax.Array, mask: jax.Array, steps: int = 300, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """The student's logits before and after; options as divergence="reverse_kl" are those of losses.dpsw_loss."""

    def loss_fn(student_logits: jax.Array) -> jax.Array:
        loss_sum, normaliser, _ = losses.dpsw_loss(
            student_logits=student_logits, teacher_logits=teacher_logits, response=None, mask=mask, **options
        )
        return losses.mean_loss(loss_sum, normaliser)

    rngs = nnx.Rngs(0)
    student = nnx.Sequential(nnx.Linear(data.D, 32, rngs=rngs), jnp.tanh, nnx.Linear(32, data.V, rngs=rngs))
    optimizer = nnx.Optimizer(student, optax.adam(3e-2), wrt=nnx.Param)

    @nnx.jit
    def step(student: nnx.Module, optimizer: nnx.Optimizer) -> None:
        optimizer.update(student, nnx.grad(lambda student: loss_fn(student(features)))(student))

    before = student(features)
    for _ in range(steps):
        step(student, optimizer)
    return before, student(features)


if __name__ == "__main__":
    inputs = data.make()
    for name, logits in zip(("before", "after"), train(*inputs)):
        _, _, sums = losses.dpsw_loss(logits, inputs[1], response=None, mask=inputs[2], divergence="forward_kl")
        print(f"{name}: {sums['kl'] / sums['tokens']:.4f} nats per token from the teacher")

"""The loss with a Haiku model (pip install dm-haiku).

python -m examples.haiku_model
"""

from typing import Any

import haiku
import jax
import jax.numpy as jnp
import optax

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

    student = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([32, data.V], activation=jnp.tanh)(x)))
    optimizer = optax.adam(3e-2)
    params = student.init(jax.random.key(0), features)

    @jax.jit
    def step(params: haiku.Params, state: optax.OptState) -> tuple[haiku.Params, optax.OptState]:
        updates, state = optimizer.update(jax.grad(lambda p: loss_fn(student.apply(p, features)))(params), state)
        return optax.apply_updates(params, updates), state

    before, state = student.apply(params, features), optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return before, student.apply(params, features)


if __name__ == "__main__":
    inputs = data.make()
    for name, logits in zip(("before", "after"), train(*inputs)):
        _, _, sums = losses.dpsw_loss(logits, inputs[1], response=None, mask=inputs[2], divergence="forward_kl")
        print(f"{name}: {sums['kl'] / sums['tokens']:.4f} nats per token from the teacher")

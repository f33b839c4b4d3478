"""The loss with an Equinox model (pip install equinox).

python -m examples.equinox_model
"""

from typing import Any

import equinox
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

    model = equinox.nn.MLP(data.D, data.V, 32, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    optimizer = optax.adam(3e-2)

    def student(model: equinox.Module) -> jax.Array:
        return jax.vmap(jax.vmap(model))(features)

    @equinox.filter_jit
    def step(model: equinox.Module, state: optax.OptState) -> tuple[equinox.Module, optax.OptState]:
        updates, state = optimizer.update(equinox.filter_grad(lambda m: loss_fn(student(m)))(model), state)
        return equinox.apply_updates(model, updates), state

    before, state = student(model), optimizer.init(equinox.filter(model, equinox.is_array))
    for _ in range(steps):
        model, state = step(model, state)
    return before, student(model)


if __name__ == "__main__":
    inputs = data.make()
    for name, logits in zip(("before", "after"), train(*inputs)):
        _, _, sums = losses.dpsw_loss(logits, inputs[1], response=None, mask=inputs[2], divergence="forward_kl")
        print(f"{name}: {sums['kl'] / sums['tokens']:.4f} nats per token from the teacher")

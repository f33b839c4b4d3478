"""The loss in a plain Optax loop.

python -m examples.optax_loop
"""

from typing import Any

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

    keys = jax.random.split(jax.random.key(1))
    params = {
        "in": jax.random.normal(keys[0], (data.D, 32)) / data.D**0.5,
        "out": jax.random.normal(keys[1], (32, data.V)) / 32**0.5,
    }
    optimizer = optax.adam(3e-2)

    def student(params: dict[str, jax.Array]) -> jax.Array:
        return jnp.tanh(features @ params["in"]) @ params["out"]

    @jax.jit
    def step(params: dict[str, jax.Array], state: optax.OptState) -> tuple[dict[str, jax.Array], optax.OptState]:
        updates, state = optimizer.update(jax.grad(lambda p: loss_fn(student(p)))(params), state)
        return optax.apply_updates(params, updates), state

    before, state = student(params), optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return before, student(params)


if __name__ == "__main__":
    inputs = data.make()
    for name, logits in zip(("before", "after"), train(*inputs)):
        _, _, sums = losses.dpsw_loss(logits, inputs[1], response=None, mask=inputs[2], divergence="forward_kl")
        print(f"{name}: {sums['kl'] / sums['tokens']:.4f} nats per token from the teacher")

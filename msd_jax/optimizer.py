"""The learning-rate schedule and the optax chain."""

from typing import Any

import jax
import ml_collections
import optax


def make_schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to config.learning_rate, then constant or cosine to final_fraction of it at `steps`."""
    warmup = config.warmup_steps
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest, alpha=config.final_fraction),
    }[config.schedule]
    # The first update already has a positive rate: step 0 is the first of the warm-up, not a wasted one.
    ramp = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a global-norm clip."""
    schedule = make_schedule(config, steps)
    adamw = optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=_is_matrix)
    chain = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    return chain, schedule


def _is_matrix(params: Any) -> Any:
    """Weight decay is for matrices, not for norms and biases."""
    names = ("norm", "bias")
    return jax.tree.map_with_path(lambda path, _: not any(name in path[-1].key for name in names), params)

"""The learning-rate schedule and the optax chain.

optax.warmup_cosine_decay_schedule would serve one of the two schedules, and join_schedules serves both.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import NamedSharding, PartitionSpec

RULES = ("adamw", "adafactor")  # of config.optimizer.name
SCHEDULES = ("cosine", "constant")  # of config.optimizer.schedule


def make_schedule(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to config.learning_rate, then constant, or a cosine to a tenth of it at `steps`.

    Args:
      config: config.optimizer.
      steps: number of steps of the whole run.
    """
    warmup = config.warmup_steps
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest, alpha=0.1),
    }[config.schedule]
    # The first update already has a positive rate: step 0 is the first of the warm-up, not a wasted one.
    ramp = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(rule, schedule): AdamW, or Adafactor without momentum, after a clip by global norm; arguments as above."""
    schedule = make_schedule(config, steps)
    if config.name == "adafactor":
        rule = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=False,  # a learning rate then means what it means to AdamW
            weight_decay_rate=config.weight_decay or None,
            weight_decay_mask=_is_matrix,
        )
    else:
        decay = {"weight_decay": config.weight_decay, "mask": _is_matrix}
        rule = optax.adamw(schedule, **config.adamw, **decay)
    rule = with_state_dtype(rule, jnp.dtype(config.moments_dtype))
    return optax.chain(clip_by_global_norm(config.clip_norm), rule), schedule


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As optax.clip_by_global_norm, by one factor for all gradients.

    XLA fuses the factor into the moments, where optax's division would be stored as a second copy of the gradients.
    `update` takes the norm of the gradients as a further argument, `norm`, and computes it where it is not given.
    """

    def update(grads: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any) -> Any:
        del params
        norm = optax.tree.norm(grads) if norm is None else norm
        return optax.tree.scale(max_norm / jnp.maximum(norm, max_norm), grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def with_state_dtype(rule: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`rule` with the arrays of its state stored in `dtype` between steps; it computes with them in float32."""

    def cast(dtype: jnp.dtype, state: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = rule.update(grads, cast(jnp.float32, state), params)
        return updates, cast(dtype, state)

    return optax.GradientTransformation(lambda params: cast(dtype, rule.init(params)), update)


def state_shardings(rule: optax.GradientTransformation, params: Any) -> Any:
    """The optimizer's state as ShapeDtypeStructs, each array sharded as the parameter that it belongs to.

    Args:
      rule: from make_optimizer.
      params: ShapeDtypeStructs with shardings. A moment of the parameter's shape takes its sharding; one that lacks an
        axis (Adafactor's) takes the rest of it; everything else is replicated.
    """

    def like(moment: jax.ShapeDtypeStruct, param: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = (*param.sharding.spec, *[None] * (len(param.shape) - len(param.sharding.spec)))
        for left_out in (len(spec), *range(len(spec))):
            if moment.shape == param.shape[:left_out] + param.shape[left_out + 1 :]:
                kept = PartitionSpec(*spec[:left_out], *spec[left_out + 1 :])
                return moment.update(sharding=NamedSharding(param.sharding.mesh, kept))
        return moment.update(sharding=NamedSharding(param.sharding.mesh, PartitionSpec()))

    replicated = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
    return optax.tree.map_params(
        rule,
        like,
        jax.eval_shape(rule.init, params),
        params,
        transform_non_params=lambda count: count.update(sharding=replicated),
    )


def _is_matrix(params: Any) -> Any:
    """True at matrices, which weight decay is for, and false at norms, biases and an activation's parameters."""
    names = ("norm", "bias", "alpha")
    return jax.tree.map_with_path(lambda path, _: not any(name in path[-1].key for name in names), params)

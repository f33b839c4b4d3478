"""The update: both passes over a batch, the weighted loss and its gradient, the optimizer, the next teacher."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jax.sharding import Mesh

from msd_jax import losses
from msd_jax.errors import UserError
from msd_jax.models import decoder, forward, pretrained
from msd_jax.parallel import sharding
from msd_jax.training import optimizer

TEACHERS = ("frozen", "live", "ema", "periodic")  # of config.teacher.kind, see `next_teacher`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: int32 number of finished steps, those skipped among them.
      params: those of the student's weights that are trained: all, or adapters, or all but the embeddings.
      teacher: the same part of the teacher's weights; None for a live teacher, which is the student itself.
      opt_state: of the optax chain.
      skipped: int32 number of steps whose gradient was not finite.
    """

    step: jax.Array
    params: decoder.Params
    teacher: decoder.Params | None
    opt_state: Any
    skipped: jax.Array


class TrainBatch(NamedTuple):
    """One batch of responses under both prompts, int32; prompts left-padded, responses right-padded."""

    student_prompt_BxP: jax.Array
    student_length_B: jax.Array
    teacher_prompt_BxP: jax.Array
    teacher_length_B: jax.Array
    response_BxR: jax.Array
    response_length_B: jax.Array


def both_roles(
    run: Callable, graphdef: nnx.GraphDef, student: decoder.Params, teacher: decoder.Params, batch: TrainBatch
) -> tuple[Any, Any]:
    """What a function of forward.py gives for student and teacher over the same response tokens."""
    response = (batch.response_BxR, batch.response_length_B)
    return (
        run(graphdef, student, batch.student_prompt_BxP, batch.student_length_B, *response),
        run(graphdef, teacher, batch.teacher_prompt_BxP, batch.teacher_length_B, *response),
    )


both_logits = functools.partial(both_roles, forward.response_logits)


def train_step(
    state: TrainState,
    frozen: decoder.Params,
    batch: TrainBatch,
    *,
    graphdef: nnx.GraphDef,
    optimize: optax.GradientTransformation,
    loss: functools.partial,
    teacher: ml_collections.ConfigDict,
    micro_batches: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Gradients of the summed loss are added over micro-batches and divided once, by one denominator.

    Args:
      state: donated.
      frozen: the weights that are not trained, which student and teacher share; {} where all are.
      batch: B rows, divisible by `micro_batches`.
      graphdef, optimize, loss, teacher, micro_batches: static; `loss` is fused_losses.fused_dpsw_loss with its
        settings, `teacher` is config.teacher.
    """
    teacher_params = state.params if state.teacher is None else state.teacher

    def loss_sum(params, micro):
        both = (decoder.join(frozen, trained) for trained in (params, teacher_params))
        student, teacher = both_roles(forward.response_hidden_and_head, graphdef, *both, micro)
        mask_BxR = forward.response_mask(micro.response_length_B, micro.response_BxR.shape[1])
        total, normaliser, aux = loss(*student, *teacher, micro.response_BxR.ravel(), mask_BxR.ravel())
        return total, (normaliser, aux)

    # Every device keeps its own rows: micro-batch i holds rows i, i + M, i + 2M, ...
    micros = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch)
    gradient = jax.value_and_grad(loss_sum, has_aux=True)
    nothing = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], micros))
    ((total, (normaliser, aux)), grads), _ = jax.lax.scan(
        lambda sums, micro: (jax.tree.map(jnp.add, sums, gradient(state.params, micro)), None),
        optax.tree.zeros_like(nothing),
        micros,
    )
    mean = losses.mean_loss(jnp.ones(()), normaliser)
    norm = mean * optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(total)

    def update(params, opt_state):
        # Scaled here, where the factor is fused into the moments: scaled outside, all gradients are held twice.
        rule, mean_grads = optax.with_extra_args_support(optimize), optax.tree.scale(mean, grads)
        updates, opt_state = rule.update(mean_grads, opt_state, params, norm=norm)
        return optax.apply_updates(params, updates), opt_state

    # A step that is not finite leaves the weights, the optimizer and the teacher as they were.
    params, opt_state = jax.lax.cond(finite, update, lambda *old: old, state.params, state.opt_state)
    step = state.step + 1
    new_state = TrainState(
        step, params, next_teacher(teacher, step, state.teacher, params), opt_state, state.skipped + ~finite
    )
    means = {name: value / jnp.maximum(aux["tokens"], 1) for name, value in aux.items() if name != "tokens"}
    loss_mean = losses.mean_loss(total, normaliser)
    return new_state, means | {
        "loss": loss_mean,
        "tokens": aux["tokens"],
        "grad_norm": norm,
        "skipped": new_state.skipped,
    }


def next_teacher(
    teacher: ml_collections.ConfigDict, step: jax.Array, old: decoder.Params | None, student: decoder.Params
) -> decoder.Params | None:
    """The teacher's weights after `step` finished steps."""
    if teacher.kind == "ema":
        return optax.incremental_update(student, old, 1 - teacher.ema_decay)
    if teacher.kind == "periodic":
        return jax.tree.map(functools.partial(jnp.where, step % teacher.period == 0), student, old)
    return old  # frozen, or None: live


def loss_settings(config: ml_collections.ConfigDict) -> losses.LossSettings:
    """What config.loss asks for."""
    divergence = losses.resolve_divergence(config.loss.divergence, config.rollout.policy)
    return losses.LossSettings(**dict(config.loss) | {"divergence": divergence, "top_k": config.loss.top_k or None})


def jit_train_step(
    config: ml_collections.ConfigDict,
    model: pretrained.Architecture,
    mesh: Mesh,
    optimize: optax.GradientTransformation,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The program of a step: train_step(state, frozen, batch) with all that is static bound; the state is donated."""
    loss = functools.partial(
        losses.fused_dpsw_loss,
        chunk=config.train.loss_chunk,
        dtype=model.dtype,
        logit_softcap=model.config.logit_softcap,
        tied=model.config.tied_embeddings,
        mesh=mesh,
        **vars(loss_settings(config)),
    )
    step = functools.partial(
        train_step,
        graphdef=model.graphdef,
        optimize=optimize,
        loss=loss,
        teacher=config.teacher,
        micro_batches=config.train.micro_batches,
    )
    arguments = abstract_state(model, mesh, optimize, config.teacher.kind)
    state, frozen = jax.tree.map(lambda leaf: leaf.sharding, arguments)
    # By default XLA's CPU backend runs early what can be run early: the zeros that the backward pass adds to, which are
    # as large as the weights, before the forward pass.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.jit(
        step,
        in_shardings=(state, frozen, sharding.batch_sharding(mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else None,
    )


def abstract_state(
    model: pretrained.Architecture, mesh: Mesh, optimize: optax.GradientTransformation, teacher_kind: str
) -> tuple[TrainState, decoder.Params]:
    """(state, frozen) of a run as ShapeDtypeStructs in the training layout.

    The optimizer's moments and the teacher follow the sharding of the weights; counts are replicated. A teacher that
    stays frozen is in the dtypes of model.frozen_teacher.
    """
    params, frozen = model.split(model.target(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    opt_state = optimizer.state_shardings(optimize, params)
    teacher = None if teacher_kind == "live" else model.frozen_teacher(params) if teacher_kind == "frozen" else params
    return TrainState(scalar, params, teacher, opt_state, scalar), frozen


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where the rows of a micro-batch do not divide over the devices."""
    rows, shards = config.data.batch_size // config.train.micro_batches, sharding.batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} over {config.train.micro_batches} "
            f"micro-batches gives {rows} rows, which do not divide over {shards} devices (data x fsdp)"
        )

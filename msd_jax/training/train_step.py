"""The update: both passes over a batch, the weighted loss and its gradient, the optimizer, the next teacher."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from msd_jax import losses
from msd_jax.data import prompts
from msd_jax.errors import UserError
from msd_jax.models import decoder, forward, pretrained
from msd_jax.parallel import compiler_options, sharding
from msd_jax.training import optimizer, spikes

Array = Any  # of NumPy on the host, of JAX on devices
TEACHERS = ("frozen", "live", "ema", "periodic")  # of config.teacher.kind, see `next_teacher`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: int32 number of finished steps, those skipped among them.
      params: those of the student's weights that are trained: all, or adapters, or all but the embeddings.
      teacher: the same part of the teacher's weights; None for a live teacher, which is the student itself, and where
        nothing reads a teacher.
      opt_state: of the optax chain.
      skipped: int32 number of steps that were skipped: their loss or gradient was not finite, or a spike.
      recent: losses and gradient norms of the last accepted steps, see spikes.py; None where spikes are not skipped.
    """

    step: jax.Array
    params: decoder.Params
    teacher: decoder.Params | None
    opt_state: Any
    skipped: jax.Array
    recent: jax.Array | None = None

    @property
    def teacher_params(self) -> decoder.Params:
        """The teacher's weights; the student's own where it is live."""
        return self.params if self.teacher is None else self.teacher


class TrainBatch(NamedTuple):
    """One batch of responses under both prompts, int32; prompts left-padded, responses right-padded.

    The teacher's prompt is None where the loss reads no teacher (`reads_teacher`).
    """

    student_prompt_BxP: Array
    student_length_B: Array
    teacher_prompt_BxP: Array | None
    teacher_length_B: Array | None
    response_BxR: Array
    response_length_B: Array


def student_and_teacher(
    forward_pass: Callable, graphdef: nnx.GraphDef, student: decoder.Params, teacher: decoder.Params, batch: TrainBatch
) -> tuple[Any, Any]:
    """What a forward pass of models/forward.py gives for student and teacher over the same response tokens.

    None for the teacher in a batch without its prompts.
    """
    response = (batch.response_BxR, batch.response_length_B)
    of_student = forward_pass(graphdef, student, batch.student_prompt_BxP, batch.student_length_B, *response)
    if batch.teacher_prompt_BxP is None:
        return of_student, None
    return of_student, forward_pass(graphdef, teacher, batch.teacher_prompt_BxP, batch.teacher_length_B, *response)


def train_step(
    state: TrainState,
    frozen: decoder.Params,
    batch: TrainBatch,
    *,
    graphdef: nnx.GraphDef,
    optimize: optax.GradientTransformation,
    loss: Callable,
    beta: optax.Schedule,
    teacher: ml_collections.ConfigDict,
    micro_batches: int,
    skip_spikes: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Gradients of the summed loss are added over micro-batches and divided once, by one denominator.

    Args:
      state: donated.
      frozen: the weights that are not trained, which student and teacher share; {} where all are trained.
      batch: B rows, divisible by `micro_batches`.
      graphdef, optimize, micro_batches: static.
      loss: static; losses.fused_dpsw_loss with its options bound, but for beta.
      beta: static; the loss's, by the number of finished steps.
      teacher: static; config.teacher.
      skip_spikes: static; config.train.skip_spikes, without effect where `state.recent` is None.

    Returns:
      The next state, and scalars: means over the response tokens of the batch, and of the weighted divergence
      (`weighted_kl`); the loss, the share of it that is saturated (`saturated`), the number of tokens (`tokens`), the
      loss's `beta`, the gradient's norm before clipping (`grad_norm`), whether the step is skipped (`skip`), the steps
      skipped so far (`skipped`), and with `state.recent` what is usual (`median_loss`, `median_grad_norm`).
    """

    def loss_sum(params, micro):
        both = (decoder.join(frozen, trained) for trained in (params, state.teacher_params))
        student, teacher = student_and_teacher(forward.response_hidden_and_head, graphdef, *both, micro)
        mask_BxR = forward.response_mask(micro.response_length_B, micro.response_BxR.shape[1])
        response_N, mask_N = micro.response_BxR.ravel(), mask_BxR.ravel()
        total, normaliser, aux = loss(*student, *(teacher or (None, None)), response_N, mask_N, beta=beta(state.step))
        return total, (normaliser, aux)

    gradient = jax.value_and_grad(loss_sum, has_aux=True)
    (total, (normaliser, aux)), grads = _sum_over_micro_batches(gradient, state.params, batch, micro_batches)
    mean = losses.mean_loss(jnp.ones(()), normaliser)
    norm = mean * optax.tree.norm(grads)

    def update(params, opt_state):
        # Scaled here, where the factor is fused into the moments: scaled outside, all gradients are held twice.
        rule, mean_grads = optax.with_extra_args_support(optimize), optax.tree.scale(mean, grads)
        updates, opt_state = rule.update(mean_grads, opt_state, params, norm=norm)
        return optax.apply_updates(params, updates), opt_state

    # A step that is not finite, or a spike, leaves the weights, the optimizer and the teacher as they were.
    accepted, mean_of_loss = jnp.isfinite(norm) & jnp.isfinite(total), losses.mean_loss(total, normaliser)
    recent = state.recent
    usual: dict[str, jax.Array] = {}
    if recent is not None:
        seen_2 = jnp.stack([mean_of_loss, norm])
        usual = dict(zip(("median_loss", "median_grad_norm"), spikes.medians(recent)))
        accepted &= ~spikes.is_spike(recent, seen_2, skip_spikes)
        recent = spikes.remember(recent, seen_2, accepted)
    params, opt_state = jax.lax.cond(accepted, update, lambda *old: old, state.params, state.opt_state)
    step, skipped = state.step + 1, state.skipped + ~accepted
    new_teacher = next_teacher(teacher, step, state.teacher, params, accepted)
    new_state = TrainState(step, params, new_teacher, opt_state, skipped, recent)
    means = {name: value / jnp.maximum(aux["tokens"], 1) for name, value in aux.items() if name != "tokens"}
    if "saturated" in aux:  # not where nothing reads a teacher
        means["saturated"] = losses.mean_loss(aux["saturated"], total)
    return new_state, means | usual | {
        "loss": mean_of_loss,
        "weighted_kl": total / jnp.maximum(aux["tokens"], 1),
        "tokens": aux["tokens"],
        "beta": jnp.asarray(beta(state.step), jnp.float32),
        "grad_norm": norm,
        "skip": ~accepted,
        "skipped": skipped,
    }


def _sum_over_micro_batches(function: Callable, params: decoder.Params, batch: TrainBatch, micro_batches: int) -> Any:
    """The sum of function(params, micro-batch), leaf by leaf."""
    # Every device keeps its own rows: micro-batch i holds rows i, i + M, i + 2M, ...
    micros = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch)

    def add(sums, micro):
        return jax.tree.map(jnp.add, sums, function(params, micro)), None

    shapes = jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], micros))
    sums, _ = jax.lax.scan(add, optax.tree.zeros_like(shapes), micros)
    return sums


def next_teacher(
    teacher: ml_collections.ConfigDict,
    step: jax.Array,
    old: decoder.Params | None,
    student: decoder.Params,
    moves: jax.Array,
) -> decoder.Params | None:
    """The teacher's weights after `step` finished steps; as they were unless it `moves` (bool [])."""
    if teacher.kind == "ema":
        moved = optax.incremental_update(student, old, 1 - teacher.ema_decay)
        return jax.tree.map(functools.partial(jnp.where, moves), moved, old)
    if teacher.kind == "periodic":
        return jax.tree.map(functools.partial(jnp.where, moves & (step % teacher.period == 0)), student, old)
    return old  # frozen, or None: live


def loss_settings(config: ml_collections.ConfigDict) -> losses.LossSettings:
    """The loss that config.loss asks for; its beta is the last one, see `beta_schedule`."""
    options = {key: value for key, value in config.loss.items() if key != "beta_ramp"}
    return losses.LossSettings(
        **options
        | {
            "divergence": losses.resolve_divergence(config.loss.divergence, config.rollout.policy),
            "top_k": config.loss.top_k or None,
            "token_cap": config.loss.token_cap or None,
        }
    )


def beta_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """config.loss.beta after a linear rise from 0 over the first config.loss.beta_ramp of the steps.

    Without a rise it gives the number itself, which a program takes as a constant.
    """
    rise = round(config.loss.beta_ramp * config.train.steps)
    return optax.linear_schedule(0.0, config.loss.beta, rise) if rise else optax.constant_schedule(config.loss.beta)


def reads_teacher(config: ml_collections.ConfigDict) -> bool:
    """Whether the update runs the teacher's forward pass."""
    return loss_settings(config).reads_teacher


def kept_teacher(config: ml_collections.ConfigDict) -> str:
    """The teacher whose weights a run keeps: config.teacher.kind, or "none" where nothing reads a teacher."""
    return config.teacher.kind if prompts.shows_teacher(config) else "none"


def jit_train_step(
    config: ml_collections.ConfigDict,
    model: pretrained.Architecture,
    mesh: Mesh,
    optimize: optax.GradientTransformation,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The program train_step(state, frozen, batch), with all that is static bound; the state is donated."""
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
        beta=beta_schedule(config),
        teacher=config.teacher,
        micro_batches=config.train.micro_batches,
        skip_spikes=config.train.skip_spikes,
    )
    kept, spikes_too = kept_teacher(config), config.train.skip_spikes > 0
    state, frozen = _shardings(abstract_state(model, mesh, optimize, kept, spikes_too))
    return jax.jit(
        step,
        in_shardings=(state, frozen, sharding.batch_sharding(mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options.train_step_options(mesh),
    )


def abstract_state(
    model: pretrained.Architecture,
    mesh: Mesh,
    optimize: optax.GradientTransformation,
    teacher_kind: str,
    skips_spikes: bool = False,
) -> tuple[TrainState, decoder.Params]:
    """(state, frozen) of a run as ShapeDtypeStructs in the training layout.

    The optimizer's moments and the teacher are sharded as the weights; counts are replicated. A teacher that stays
    frozen is in the dtypes of model.frozen_teacher. `teacher_kind` is that of `kept_teacher`.
    """
    params, frozen = model.split(model.target(mesh))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    opt_state = optimizer.state_shardings(optimize, params)
    teacher = params if teacher_kind in ("ema", "periodic") else None
    if teacher_kind == "frozen":
        teacher = model.frozen_teacher(params)
    recent: Any = None
    if skips_spikes:
        recent = jax.ShapeDtypeStruct((2, spikes.WINDOW), jnp.float32, sharding=scalar.sharding)
    return TrainState(scalar, params, teacher, opt_state, scalar, recent), frozen


def initial_state(
    model: pretrained.Pretrained,
    mesh: Mesh,
    optimize: optax.GradientTransformation,
    teacher_kind: str,
    seed: int,
    skips_spikes: bool = False,
) -> tuple[TrainState, decoder.Params]:
    """(state, frozen) at step 0, in the layout of `abstract_state`; reads the weights, `seed` draws new adapters."""
    params, frozen = model.split(model.params(mesh, seed=seed))
    target, _ = abstract_state(model, mesh, optimize, teacher_kind)
    opt_state = jax.jit(optimize.init, out_shardings=_shardings(target.opt_state))(params)
    step, skipped = (sharding.put_replicated(mesh, np.zeros((), np.int32)) for _ in range(2))

    def copy(params):  # params are donated to every step, and the teacher must outlive them
        return jax.tree.map(lambda p, leaf: jnp.array(p, leaf.dtype, copy=True), params, target.teacher)

    teacher = None
    if target.teacher is not None:
        teacher = jax.jit(copy, out_shardings=_shardings(target.teacher))(params)
    recent = sharding.put_replicated(mesh, spikes.none_seen()) if skips_spikes else None
    return TrainState(step, params, teacher, opt_state, skipped, recent), frozen


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where the rows of a micro-batch do not divide over the devices."""
    rows, shards = config.data.batch_size // config.train.micro_batches, sharding.batch_shards(mesh)
    if rows % shards:
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} over {config.train.micro_batches} "
            f"micro-batches gives {rows} rows, which do not divide over {shards} devices (data x fsdp)"
        )

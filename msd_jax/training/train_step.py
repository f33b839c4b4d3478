"""A step: both passes over a batch, the weighted loss and its gradient, the optimizer, the next teacher.

A batch comes in packs of one size (packing.py). Loss and gradient are added over them, then divided once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

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
from msd_jax.models import attention, decoder, forward, pretrained
from msd_jax.models.forward import PackedRows
from msd_jax.parallel import compiler_options, sharding
from msd_jax.training import optimizer, packing, spikes
from msd_jax.training.packing import Pack

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What a step adds over its packs.

    Attributes:
      loss: the summed loss.
      normaliser: its denominator.
      aux: the sums of losses.dpsw_loss.
      gradient: of the summed loss on the trained weights.
    """

    loss: jax.Array
    normaliser: jax.Array
    aux: dict[str, jax.Array]
    gradient: decoder.Params


def pack_sums(
    trained: decoder.Params,
    teacher: decoder.Params,
    frozen: decoder.Params,
    step: jax.Array,
    pack: Pack,
    sums: Sums | None = None,
    *,
    graphdef: nnx.GraphDef,
    loss: Callable,
    beta: optax.Schedule,
) -> Sums:
    """Loss and gradient of one pack, added to `sums`.

    The backward pass adds each layer's gradient in place: no gradient of the pack is held beside the sum.

    Args:
      trained, teacher: the part of the student's and the teacher's weights that is trained.
      frozen: the weights that are not trained, which student and teacher share; {} where all are trained.
      step: the number of finished steps.
      pack: on the devices.
      sums: of the packs before; None where there are none.
      graphdef: static.
      loss: static; losses.fused_dpsw_loss with its options bound, but for beta.
      beta: static; the loss's, by the number of finished steps.
    """

    def hidden_and_head(params: decoder.Params, rows: PackedRows | None) -> tuple[Any, Any]:
        if rows is None:
            return None, None
        return forward.packed_hidden_and_head(graphdef, decoder.join(frozen, params), rows)

    def loss_sum(params: decoder.Params) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        both = *hidden_and_head(params, pack.student), *hidden_and_head(teacher, pack.teacher)
        total, normaliser, aux = loss(*both, pack.response_SxN.ravel(), pack.mask_SxN.ravel(), beta=beta(step))
        return total, (normaliser, aux)

    pullback: Any  # jax.vjp is annotated as giving a plain function
    total, pullback, (normaliser, aux) = jax.vjp(loss_sum, trained, has_aux=True)
    one = jnp.ones_like(total)
    if sums is None:
        return Sums(total, normaliser, aux, pullback(one)[0])
    gradient = jax.tree.map(jax.new_ref, sums.gradient)
    pullback.with_refs(gradient)(one)
    total, normaliser, aux = jax.tree.map(jnp.add, (sums.loss, sums.normaliser, sums.aux), (total, normaliser, aux))
    return Sums(total, normaliser, aux, jax.tree.map(jax.freeze, gradient))


def update(
    state: TrainState,
    sums: Sums,
    *,
    optimize: optax.GradientTransformation,
    beta: optax.Schedule,
    teacher: ml_collections.ConfigDict,
    skip_spikes: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state. The summed gradient is divided once, by one denominator.

    A step that is not finite, or a spike, leaves the weights, the optimizer and the teacher as they were.

    Args:
      state: before the step.
      sums: over all packs of the step.
      optimize: static.
      beta: static; as in `pack_sums`.
      teacher: static; config.teacher.
      skip_spikes: static; config.train.skip_spikes, without effect where `state.recent` is None.

    Returns:
      The next state, and scalars: means over the response tokens of the batch, and of the weighted divergence
      (`weighted_kl`); the loss, the share of it that is saturated (`saturated`), the number of tokens (`tokens`), the
      loss's `beta`, the gradient's norm before clipping (`grad_norm`), whether the step is skipped (`skip`), the steps
      skipped so far (`skipped`), and with `state.recent` what is usual (`median_loss`, `median_grad_norm`).
    """
    mean = losses.mean_loss(jnp.ones(()), sums.normaliser)
    loss, norm = losses.mean_loss(sums.loss, sums.normaliser), mean * optax.tree.norm(sums.gradient)

    def optimized(params: decoder.Params, opt_state: Any) -> tuple[decoder.Params, Any]:
        # Scaled here, where the factor is fused into the moments: scaled outside, all gradients are held twice.
        rule, gradient = optax.with_extra_args_support(optimize), optax.tree.scale(mean, sums.gradient)
        updates, opt_state = rule.update(gradient, opt_state, params, norm=norm)
        return optax.apply_updates(params, updates), opt_state

    accepted, recent = jnp.isfinite(norm) & jnp.isfinite(sums.loss), state.recent
    usual: dict[str, jax.Array] = {}
    if recent is not None:
        seen_2 = jnp.stack([loss, norm])
        usual = dict(zip(("median_loss", "median_grad_norm"), spikes.medians(recent)))
        accepted &= ~spikes.is_spike(recent, seen_2, skip_spikes)
        recent = spikes.remember(recent, seen_2, accepted)
    params, opt_state = jax.lax.cond(accepted, optimized, lambda *old: old, state.params, state.opt_state)
    step, skipped = state.step + 1, state.skipped + ~accepted
    new_teacher = next_teacher(teacher, step, state.teacher, params, accepted)
    scalars = _scalars(sums, loss) | usual
    scalars |= {"beta": jnp.asarray(beta(state.step), jnp.float32), "grad_norm": norm}
    scalars |= {"skip": ~accepted, "skipped": skipped}
    return TrainState(step, params, new_teacher, opt_state, skipped, recent), scalars


def _scalars(sums: Sums, loss: jax.Array) -> dict[str, jax.Array]:
    tokens = sums.aux["tokens"]
    scalars = {name: value / jnp.maximum(tokens, 1) for name, value in sums.aux.items() if name != "tokens"}
    if "saturated" in sums.aux:  # not where nothing reads a teacher
        scalars["saturated"] = losses.mean_loss(sums.aux["saturated"], sums.loss)
    return scalars | {"loss": loss, "weighted_kl": sums.loss / jnp.maximum(tokens, 1), "tokens": tokens}


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


class TrainStep:
    """The programs of a step, each compiled once in a run, whatever the lengths of its responses.

    Attributes:
      mesh, state, frozen, sums, pack: the mesh, and what the programs take, as ShapeDtypeStructs in their layout.
      inputs: what `accumulate` takes of state and frozen.
      zeros: () -> Sums.
      accumulate: (trained, teacher, frozen, step, sums, pack) -> sums with those of the pack added; `sums` is donated.
      apply: (state, sums) -> (state, scalars), as `update`; `state` is donated.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: pretrained.Architecture,
        mesh: Mesh,
        optimize: optax.GradientTransformation,
        shape: packing.Shape,
    ):
        """Binds all that is static; `shape` is that of the packs."""
        assert not shape.beginnings or attention.shares_beginnings(mesh), "splash would leave the beginnings out"
        self.mesh, beta = mesh, beta_schedule(config)
        loss = functools.partial(
            losses.fused_dpsw_loss,
            chunk=config.train.loss_chunk,
            dtype=model.dtype,
            logit_softcap=model.config.logit_softcap,
            tied=model.config.tied_embeddings,
            mesh=mesh,
            **vars(loss_settings(config)),
        )
        one_pack = functools.partial(pack_sums, graphdef=model.graphdef, loss=loss, beta=beta)

        def gradient(trained: Any, teacher: Any, frozen: Any, step: Any, sums: Sums, pack: Pack) -> Sums:
            return one_pack(trained, teacher, frozen, step, pack, sums)

        self.state, self.frozen = abstract_state(
            model, mesh, optimize, kept_teacher(config), config.train.skip_spikes > 0
        )
        rows = sharding.batch_sharding(mesh)
        self.pack = jax.tree.map(lambda x: _abstract(x, rows), packing.empty(shape))
        self.inputs = self.state.params, self.state.teacher_params, self.frozen, self.state.step
        self.sums = self._placed(jax.eval_shape(one_pack, *self.inputs, self.pack))
        placed = _shardings((*self.inputs, self.sums, self.pack))
        self.zeros = jax.jit(lambda: optax.tree.zeros_like(self.sums), out_shardings=placed[4])
        options = compiler_options.train_step_options(mesh)
        self.accumulate = jax.jit(
            gradient, in_shardings=placed, out_shardings=placed[4], donate_argnums=4, compiler_options=options
        )
        rule = {"optimize": optimize, "beta": beta, "teacher": config.teacher, "skip_spikes": config.train.skip_spikes}
        state = _shardings(self.state)
        self.apply = jax.jit(
            functools.partial(update, **rule),
            in_shardings=(state, placed[4]),
            out_shardings=(state, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=options,
        )

    def _placed(self, sums: Sums) -> Sums:
        """The abstract sums: the gradient is split as the weights are, all else replicated."""
        whole = jax.tree.map(lambda leaf: _abstract(leaf, sharding.replicated(self.mesh)), sums)
        gradient = jax.tree.map(_abstract, sums.gradient, _shardings(self.state.params))
        return dataclasses.replace(whole, gradient=gradient)

    def __call__(
        self, state: TrainState, frozen: decoder.Params, packs: Iterable[Pack]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step over packs on the host: the next state and scalars, as `update`; `state` is donated."""
        sums = self.zeros()
        for pack in packs:
            placed = sharding.put_batch(self.mesh, pack)
            sums = self.accumulate(state.params, state.teacher_params, frozen, state.step, sums, placed)
        return self.apply(state, sums)


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


def _abstract(leaf: Any, placed: jax.sharding.Sharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)


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

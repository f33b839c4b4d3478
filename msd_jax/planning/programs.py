"""The programs of a run, traced from shapes alone."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from msd_jax.evaluation import encoding, evaluator
from msd_jax.generation import rollout
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding
from msd_jax.training import optimizer, packing, train_step
from msd_jax.training.pack_shape import pack_shape


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run, before it is compiled.

    Attributes:
      name: of the phase that it runs.
      trace: traces it with abstract arguments.
      resident_bytes: per device, of what is in HBM while it runs but is not an argument of it.
      while_trips: the most iterations of a loop that ends by a condition; None: it has no such loop.
      runs: how often it runs in a step.
    """

    name: str
    trace: Callable[[], jax.stages.Traced]
    resident_bytes: int
    while_trips: int | None = None
    runs: int = 1


def bytes_per_device(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def rollout_mesh(config: ml_collections.ConfigDict, mesh: Mesh) -> Mesh:
    """The mesh of generation where `mesh` is that of training."""
    return sharding.rollout_mesh(mesh, config.mesh.rollout_tensor, config.mesh.rollout_ffw)


def rollout_params(config: ml_collections.ConfigDict, model: pretrained.Architecture, mesh: Mesh) -> decoder.Params:
    """The abstract weights of a training run's rollouts, on the mesh of generation."""
    return rollout.abstract_params(model, mesh, config.rollout.weights)


def run_programs(config: ml_collections.ConfigDict, model: pretrained.Architecture, mesh: Mesh) -> Iterator[Program]:
    """The programs of a run at its largest shapes: prompts at their limits, responses at config.rollout.max_new_tokens.

    The teacher's forward pass, where the loss reads it, is part of "train", which runs for each pack of sequences; at
    these shapes a row of a pack holds but one.

    Raises:
      UserError: the batch or a parameter does not divide over the mesh.
    """
    shape = pack_shape(config, model, mesh)
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)
    step = train_step.TrainStep(config, model, mesh, optimize, shape)
    state, frozen = step.state, step.frozen
    state_bytes = bytes_per_device((state, frozen))
    generating = rollout_mesh(config, mesh)
    weights, relaid = decoder.join(frozen, state.params), rollout_params(config, model, generating)

    def generation(
        name: str, rows: int, prompt: int, response: int, runs: int = 1, params: decoder.Params = relaid
    ) -> Program:
        sampling = {key: config.rollout[key] for key in ("temperature", "top_k", "top_p")}
        options = rollout.Sampling(response, **sampling)
        generator = rollout.Generator(model.on(generating).graphdef, generating, options, stop_ids=(0,), pad_id=0)
        return Program(name, lambda: generator.trace(params, rows, prompt), state_bytes, response - 1, runs)

    prompts, response = config.prompts, config.rollout.max_new_tokens
    read = state.params, frozen, state.teacher if train_step.reads_teacher(config) else None
    yield Program(
        "train",
        lambda: step.accumulate.trace(*step.inputs, step.sums, step.pack),
        state_bytes - bytes_per_device(read),
        while_trips=_loss_chunks(shape, config),
        runs=config.train.micro_batches,
    )
    yield Program("update", lambda: step.apply.trace(state, step.sums), bytes_per_device(frozen))
    yield Program("relayout", lambda: rollout.trace_reshard(weights, relaid), state_bytes - bytes_per_device(weights))
    batch = config.data.batch_size
    rows = sharding.batch_rows(generating, min(config.rollout.rows or batch, batch))
    runs = -(-batch // rows)  # at full length no row takes a prompt before the others
    if config.rollout.policy in ("on_policy", "mixed"):
        yield generation("rollout", rows, prompts.student_limit, response, runs)
    if config.rollout.policy in ("off_policy", "mixed"):
        yield generation("teacher rollout", rows, prompts.teacher_limit, response, runs)
    if evaluator.wanted(config):
        rows = sharding.batch_rows(generating, config.eval.batch_size)
        prompt, response = encoding.prompt_limit(config)[0], config.eval.max_new_tokens
        params = rollout.abstract_params(model, generating, config.eval.weights)
        yield generation("evaluation", rows, prompt, response, params=params)


def _loss_chunks(shape: packing.Shape, config: ml_collections.ConfigDict) -> int:
    """In how many chunks fused_dpsw_loss takes a part of a pack with one response of full length in each row."""
    size = -(-shape.responses // -(-shape.responses // config.train.loss_chunk))
    return -(-shape.rows * config.rollout.max_new_tokens // size)

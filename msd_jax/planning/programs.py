"""The programs of a run, traced from shapes alone."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from msd_jax.evaluation import encoding, evaluator
from msd_jax.generation import rollout
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding
from msd_jax.training import optimizer, train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run, before it is compiled.

    Attributes:
      name: of the phase that it runs.
      trace: traces it with abstract arguments.
      resident_bytes: per device, of what is in HBM while it runs but is not an argument of it.
      while_trips: the most iterations of a loop that ends by a condition; None: it has no such loop.
    """

    name: str
    trace: Callable[[], jax.stages.Traced]
    resident_bytes: int
    while_trips: int | None = None


def bytes_per_device(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)


def rollout_params(model: pretrained.Architecture, mesh: Mesh) -> decoder.Params:
    """The abstract weights of generation: in the compute dtype and the rollout layout."""
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, model.dtype, sharding=placed),
        model.abstract,
        model.shardings(mesh, sharding.ROLLOUT),
    )


def run_programs(config: ml_collections.ConfigDict, model: pretrained.Architecture, mesh: Mesh) -> Iterator[Program]:
    """The programs of a run at its largest shapes: prompts at their limits, responses at config.rollout.max_new_tokens.

    The teacher's forward pass, where the loss reads it, is part of the train step.

    Raises:
      UserError: the batch or a parameter does not divide over the mesh.
    """
    train_step.check_batch(config, mesh)
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)
    kept, spikes = train_step.kept_teacher(config), config.train.skip_spikes > 0
    state, frozen = train_step.abstract_state(model, mesh, optimize, kept, spikes)
    state_bytes = bytes_per_device((state, frozen))
    weights, relaid = decoder.join(frozen, state.params), rollout_params(model, mesh)

    def trace_train() -> jax.stages.Traced:
        step: Any = train_step.jit_train_step(config, model, mesh, optimize)
        return step.trace(state, frozen, _train_batch(config, mesh))

    def generation(name: str, rows: int, prompt: int, response: int) -> Program:
        sampling = {key: config.rollout[key] for key in ("temperature", "top_k", "top_p")}
        options = rollout.Sampling(response, **sampling)
        generator = rollout.Generator(model.graphdef, mesh, options, stop_ids=(0,), pad_id=0)
        return Program(name, lambda: generator.trace(relaid, rows, prompt), state_bytes, response - 1)

    prompts, response = config.prompts, config.rollout.max_new_tokens
    yield Program("train", trace_train, resident_bytes=0)
    yield Program("relayout", lambda: rollout.trace_reshard(weights, relaid), state_bytes - bytes_per_device(weights))
    if config.rollout.policy in ("on_policy", "mixed"):
        yield generation("rollout", config.data.batch_size, prompts.student_limit, response)
    if config.rollout.policy in ("off_policy", "mixed"):
        yield generation("teacher rollout", config.data.batch_size, prompts.teacher_limit, response)
    if evaluator.wanted(config):
        rows = sharding.batch_rows(mesh, config.eval.batch_size)
        yield generation("evaluation", rows, encoding.prompt_limit(config)[0], config.eval.max_new_tokens)


def _train_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> train_step.TrainBatch:
    """An abstract batch: prompts of both roles at their limits, responses at theirs."""

    def ids(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))

    B, R = config.data.batch_size, config.rollout.max_new_tokens
    reads_teacher = train_step.reads_teacher(config)
    return train_step.TrainBatch(
        student_prompt_BxP=ids(B, config.prompts.student_limit),
        student_length_B=ids(B),
        teacher_prompt_BxP=ids(B, config.prompts.teacher_limit) if reads_teacher else None,
        teacher_length_B=ids(B) if reads_teacher else None,
        response_BxR=ids(B, R),
        response_length_B=ids(B),
    )

"""Generates the responses that a step trains on."""

import dataclasses
import time

import jax

from msd_jax.data import batches
from msd_jax.generation.responses import Responses
from msd_jax.models import decoder
from msd_jax.training import packing
from msd_jax.training.packing import TrainBatch
from msd_jax.training.run import Run, rollout_params
from msd_jax.training.train_step import TrainState, reads_teacher


@dataclasses.dataclass(frozen=True)
class Generated:
    """A batch of queries and their responses, on the host.

    Attributes:
      queries: the prompts of both roles.
      responses: one per query.
      batch: both, as arrays.
      packs: the same, as train_step takes them.
      free: the host's clock when the devices were done with the step before, whose weights generation needs; None
        where nothing was generated, and the host did not wait for them.
      had: the clock when the host had the responses.
    """

    queries: batches.Batch
    responses: Responses
    batch: TrainBatch
    packs: list[packing.Pack]
    free: float | None
    had: float


def generate(run: Run, frozen: decoder.Params, state: TrainState, queries: batches.Batch, step: int) -> Generated:
    """Responses to `queries` after `step` finished steps, whose results are `state`."""
    free = None

    def weights(trained: decoder.Params) -> decoder.Params:
        nonlocal free
        jax.block_until_ready(trained)
        if free is None:
            free = time.perf_counter()
            run.clock.enter("generation")
        return rollout_params(run, frozen, trained)

    responses = run.respond(
        step, queries, student=lambda: weights(state.params), teacher=lambda: weights(state.teacher_params)
    )
    had = time.perf_counter()
    run.clock.enter("steps")
    read = reads_teacher(run.config)
    batch = TrainBatch(
        queries.student_prompt_BxP,
        queries.student_length_B,
        queries.teacher_prompt_BxP if read else None,
        queries.teacher_length_B if read else None,
        responses.response_BxR,
        responses.length_B,
    )
    return Generated(queries, responses, batch, packing.pack(batch, run.pack_shape), free, had)

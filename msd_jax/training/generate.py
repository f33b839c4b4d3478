"""Generates the responses that a step trains on."""

import dataclasses
import time

from msd_jax.data import batches
from msd_jax.generation.responses import Responses
from msd_jax.models import decoder
from msd_jax.parallel import padding
from msd_jax.training.run import Run, rollout_params
from msd_jax.training.train_step import TrainBatch, TrainState


@dataclasses.dataclass(frozen=True)
class Generated:
    """A batch of queries and their responses, on the host.

    Attributes:
      queries: the prompts of both roles.
      responses: one per query.
      batch: both as train_step takes them; R is the bucket of the longest response.
      asked, had: the host's clock when it asked for the responses, and when it had them.
    """

    queries: batches.Batch
    responses: Responses
    batch: TrainBatch
    asked: float
    had: float


def generate(run: Run, frozen: decoder.Params, state: TrainState, queries: batches.Batch, step: int) -> Generated:
    """Responses to `queries` after `step` finished steps, whose results are `state`."""
    asked = time.perf_counter()
    responses = run.respond(
        step,
        queries,
        student=lambda: rollout_params(run, frozen, state.params),
        teacher=lambda: rollout_params(run, frozen, state.teacher_params),
    )
    had = time.perf_counter()
    R = padding.bucket(max(int(responses.length_B.max()), 1), run.config.rollout.max_new_tokens)
    batch = TrainBatch(
        queries.student_prompt_BxP,
        queries.student_length_B,
        queries.teacher_prompt_BxP,
        queries.teacher_length_B,
        responses.response_BxR[:, :R],
        responses.length_B,
    )
    return Generated(queries, responses, batch, asked, had)

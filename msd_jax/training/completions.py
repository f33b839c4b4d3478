"""Entries of completions.jsonl: what was generated at a step, and what the loss saw in each of its tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from msd_jax import losses
from msd_jax.io import jsonl
from msd_jax.losses import dpsw
from msd_jax.models import decoder, forward
from msd_jax.parallel import sharding
from msd_jax.training.generate import Generated
from msd_jax.training.packing import TrainBatch
from msd_jax.training.run import Run
from msd_jax.training.train_step import TrainState


def both_logits(
    graphdef: nnx.GraphDef, student: decoder.Params, teacher: decoder.Params, batch: TrainBatch
) -> tuple[jax.Array, jax.Array | None]:
    """logits_BxRxV of student and teacher over the same response tokens; None for one without prompts in the batch."""
    response = (batch.response_BxR, batch.response_length_B)
    of_student = forward.response_logits(graphdef, student, batch.student_prompt_BxP, batch.student_length_B, *response)
    if batch.teacher_prompt_BxP is None:
        return of_student, None
    prompt: Any = (batch.teacher_prompt_BxP, batch.teacher_length_B)
    return of_student, forward.response_logits(graphdef, teacher, *prompt, *response)


@functools.partial(jax.jit, static_argnames=("graphdef", "loss", "beta"))
def per_token_values(
    student: decoder.Params,
    teacher: decoder.Params,
    batch: TrainBatch,
    step: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    loss: losses.LossSettings,
    beta: optax.Schedule,
) -> dict[str, jax.Array]:
    """The values [B, R] of losses.per_token_loss for all weights of student and teacher, after `step` steps."""
    logits = both_logits(graphdef, student, teacher, batch)
    return dpsw.token_values(*logits, batch.response_BxR, dataclasses.replace(loss, beta=beta(step)))


def entries(run: Run, frozen: decoder.Params, state: TrainState, generated: Generated) -> list[jsonl.Row]:
    """For the first config.train.completions.kept queries: both prompts, the response and the values of its tokens.

    Args:
      run: what stays fixed.
      frozen: the weights that are not trained.
      state: that wrote the responses, before the update.
      generated: queries and responses.
    """
    kept = min(run.config.train.completions.kept, len(generated.queries.examples))
    rows = sharding.batch_rows(run.mesh, kept)
    first = jax.tree.map(lambda array: array[:rows], generated.batch)
    batch = sharding.put_batch(run.mesh, _of_one_width(first, generated.queries.columns))
    both = (decoder.join(frozen, trained) for trained in (state.params, state.teacher_params))
    static = {"graphdef": run.model.graphdef, "loss": run.loss, "beta": run.beta}
    values = sharding.fetch(per_token_values(*both, batch, state.step, **static))
    return [
        _entry(generated, row, {name: value_BxR[row] for name, value_BxR in values.items()}, run.model.tokenizer.decode)
        for row in range(kept)
    ]


def _of_one_width(batch: TrainBatch, columns: tuple[int, int]) -> TrainBatch:
    """The batch with prompts as wide as any of the run, so that one program does for all steps."""

    def widened(prompt_BxP: np.ndarray, P: int) -> np.ndarray:
        return np.pad(prompt_BxP, ((0, 0), (P - prompt_BxP.shape[1], 0)))

    batch = batch._replace(student_prompt_BxP=widened(batch.student_prompt_BxP, columns[0]))
    if batch.teacher_prompt_BxP is None:
        return batch
    return batch._replace(teacher_prompt_BxP=widened(batch.teacher_prompt_BxP, columns[1]))


def _entry(generated: Generated, row: int, values_R: dict[str, np.ndarray], decode: Callable[..., str]) -> jsonl.Row:
    example, responses = generated.queries.examples[row], generated.responses
    length = int(responses.length_B[row])
    ids = responses.response_BxR[row, :length].tolist()
    return {
        "id": example.query_id,
        "language": example.language,
        "harmful": example.harmful,
        "policy": "on_policy" if responses.on_policy_B[row] else "off_policy",
        "student_prompt": decode(example.student_ids),
        "teacher_prompt": decode(example.teacher_ids),
        "response": decode(ids),
        "tokens": [decode([i]) for i in ids],
    } | {name: np.round(value_R[:length].astype(float), 5).tolist() for name, value_R in values_R.items()}

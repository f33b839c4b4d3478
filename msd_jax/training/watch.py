"""Watches a training's steps for what should end it: updates that are skipped, weights that are not fit for export."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from msd_jax.errors import UserError
from msd_jax.io import jsonl
from msd_jax.io.console import log
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import distributed, sharding
from msd_jax.training.metrics import Dispatched

# The largest number of float16, which exported weights may be cast to. A trained weight is smaller by far.
LARGEST = float(np.finfo(np.float16).max)


class Watch:
    """Names every skipped step, and ends a run in which too many follow each other."""

    def __init__(self, most: int, workdir: pathlib.Path, model: pretrained.Pretrained):
        """
        Args:
          most: config.train.max_skipped.
          workdir: where the batch that ended a run is written, as skipped_batch.json.
          model: whose tokenizer decodes it.
        """
        self._most, self._path, self._model = most, workdir / "skipped_batch.json", model
        self._skipped = 0  # steps in a row up to the last that was seen

    @property
    def skipping(self) -> bool:
        """Whether the last step was skipped, so that nothing is known of the weights that the one before left."""
        return self._skipped > 0

    def notes(self, dispatched: Dispatched, row: dict[str, float]) -> jsonl.Row:
        """As metrics.Watch."""
        if not row["skip"]:
            self._skipped = 0
            return {}
        self._skipped += 1
        examples = dispatched.generated.queries.examples
        ids = [f"{example.query_id} ({example.language})" for example in examples]
        if self._skipped <= self._most:
            log(
                f"step {dispatched.step} skipped: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}; "
                f"queries: {', '.join(ids[:8])}" + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
            )
        return {"skipped_queries": ids}

    def check(self, dispatched: Dispatched) -> None:
        """As metrics.Watch: writes skipped_batch.json and raises UserError after too many skipped steps."""
        if self._skipped < self._most:
            return
        self._dump(dispatched)
        raise UserError(
            f"{self._skipped} steps in a row were skipped up to step {dispatched.step} (config.train.max_skipped="
            f"{self._most}): their loss or gradient is not finite, and no model is exported. {self._path} holds the "
            "batch. Lower config.optimizer.learning_rate, or look at the queries, and train in a new --workdir"
        )

    def _dump(self, dispatched: Dispatched) -> None:
        decode, responses = self._model.tokenizer.decode, dispatched.generated.responses
        rows = [
            {
                "id": example.query_id,
                "language": example.language,
                "student_ids": example.student_ids.tolist(),
                "student_prompt": decode(example.student_ids),
                "teacher_ids": example.teacher_ids.tolist(),
                "teacher_prompt": decode(example.teacher_ids),
                "response_ids": response_ids.tolist(),
                "response": decode(response_ids),
            }
            for example, response_R, length in zip(
                dispatched.generated.queries.examples, responses.response_BxR, responses.length_B
            )
            for response_ids in (response_R[:length],)
        ]
        if distributed.is_first():
            text = json.dumps({"step": dispatched.step, "batch": rows}, ensure_ascii=False, indent=1)
            jsonl.replace_text(self._path, text + "\n")


def require_fit(params: decoder.Params) -> None:
    """Raises UserError where a trained weight is not finite, or so large that the model cannot be of use."""
    largest = float(sharding.fetch(_largest(params)))
    if not largest <= LARGEST:  # NaN too
        raise UserError(
            f"the largest of the trained weights is {largest:.3g}, beyond {LARGEST:.0f}: no model is exported; lower "
            "config.optimizer.learning_rate and train in a new --workdir"
        )


@jax.jit
def _largest(params: decoder.Params) -> jax.Array:
    return jnp.stack([jnp.abs(leaf).max().astype(jnp.float32) for leaf in jax.tree.leaves(params)]).max()

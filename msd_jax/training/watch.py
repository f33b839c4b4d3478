"""Watches a training: skipped updates, rollouts that collapse, a loss that stands still, weights unfit for export."""

import collections
import json
import pathlib
from collections.abc import Collection
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from msd_jax.errors import UserError
from msd_jax.io import jsonl
from msd_jax.io.console import log
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import distributed, sharding
from msd_jax.training.metrics import Dispatched

# The largest number of float16, which exported weights may be cast to. A trained weight is smaller by far.
LARGEST = float(np.finfo(np.float16).max)


WINDOW = 10  # steps that are judged together; the first ones seen are what the last ones are compared with
BETWEEN_WARNINGS = 50  # steps


class Watch:
    """Names every skipped step, and ends a run in which too many follow each other, or whose rollouts collapse."""

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: pathlib.Path, model: pretrained.Pretrained, resume_step: int
    ):
        """
        Args:
          config: config.train, with max_skipped, skip_spikes and stop_on_collapse.
          workdir: where the batch that ended a run is written, as skipped_batch.json, and what the rollouts of the
            first steps were, as first_rollouts.jsonl: a resumed run compares with them too.
          model: whose tokenizer decodes the batch.
          resume_step: the number of steps that are finished.
        """
        self._most, self._stops = config.max_skipped, config.stop_on_collapse
        self._or_a_spike = ""
        if config.skip_spikes:
            self._or_a_spike = f", or more than {config.skip_spikes:g} times the median (config.train.skip_spikes)"
        self._path, self._model = workdir / "skipped_batch.json", model
        self._skipped = 0  # steps in a row up to the last that was seen
        self._kept = jsonl.JsonLines(workdir / "first_rollouts.jsonl")
        rows = [row for row in self._kept.read(step=int, **ROLLOUTS) if row["step"] <= resume_step]
        self._kept.replace(rows)  # those of later steps are computed again
        self._first = [Rollouts(*(row[name] for name in ROLLOUTS)) for row in rows]
        self._last: collections.deque[Rollouts] = collections.deque(maxlen=WINDOW)
        self._warned, self._collapse = -BETWEEN_WARNINGS, ""
        self._first_losses: list[Loss] = []
        self._last_losses: collections.deque[Loss] = collections.deque(maxlen=WINDOW)
        self._warned_of_saturation = False

    @property
    def skipping(self) -> bool:
        """Whether the last step was skipped, so that nothing is known of the weights that the one before left."""
        return self._skipped > 0

    def notes(self, dispatched: Dispatched, row: dict[str, float]) -> jsonl.Row:
        """As metrics.StepObserver; warns of a collapse, and once of a loss that stands still, too."""
        self._look_at_rollouts(dispatched, row)
        self._look_at_saturation(dispatched.step, row)
        if not row["skip"]:
            self._skipped = 0
            return {}
        self._skipped += 1
        examples = dispatched.generated.queries.examples
        ids = [f"{example.query_id} ({example.language})" for example in examples]
        if self._skipped <= self._most:
            usual = ""
            if "median_loss" in row:
                usual = f" (medians {row['median_loss']:.4g} and {row['median_grad_norm']:.4g})"
            log(
                f"step {dispatched.step} skipped: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}{usual}; "
                f"queries: {', '.join(ids[:8])}" + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
            )
        return {"skipped_queries": ids}

    def check(self, dispatched: Dispatched) -> None:
        """As metrics.StepObserver: after a collapse, if that is to stop, or too many skipped steps (dumps the last)."""
        if self._collapse and self._stops:
            raise UserError(
                f"stopped after step {dispatched.step}: {self._collapse} (config.train.stop_on_collapse=True); the "
                "checkpoints before it are kept, and no model is exported"
            )
        if self._skipped < self._most:
            return
        self._dump(dispatched)
        raise UserError(
            f"{self._skipped} steps in a row were skipped up to step {dispatched.step} (config.train.max_skipped="
            f"{self._most}): their loss or gradient is not finite{self._or_a_spike}, and no model is exported. "
            f"{self._path} holds the batch. Lower config.optimizer.learning_rate, or look at the queries, and train in "
            "a new --workdir"
        )

    def _look_at_rollouts(self, dispatched: Dispatched, row: dict[str, float]) -> None:
        responses = dispatched.generated.responses
        seen = Rollouts(row["response_length"], row["stopped"], looping(responses.response_BxR, responses.length_B))
        self._last.append(seen)
        if len(self._first) < WINDOW:
            self._first.append(seen)
            self._kept.append([{"step": dispatched.step} | seen._asdict()])
        self._collapse = collapse(mean(self._first), mean(self._last)) if len(self._last) == WINDOW else ""
        if self._collapse and dispatched.step >= self._warned + BETWEEN_WARNINGS:
            self._warned = dispatched.step
            log(f"warning: step {dispatched.step}: {self._collapse}")

    def _look_at_saturation(self, step: int, row: dict[str, float]) -> None:
        if row["skip"] or self._warned_of_saturation or "saturated" not in row:  # no teacher, nothing to stand still at
            return
        seen = Loss(row["weighted_kl"], row["saturated"])
        self._last_losses.append(seen)
        if len(self._first_losses) < WINDOW:
            self._first_losses.append(seen)
        if len(self._last_losses) == WINDOW and (
            fault := saturation(mean(self._first_losses), mean(self._last_losses))
        ):
            self._warned_of_saturation = True
            log(f"warning: step {step}: {fault}")

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


class Rollouts(NamedTuple):
    """Means over responses: tokens, share that ends by itself, share that loops."""

    length: float
    stopped: float
    loops: float


ROLLOUTS = dict.fromkeys(Rollouts._fields, float)


class Loss(NamedTuple):
    """Means over response tokens: the weighted divergence in nats, and the share of it that is saturated."""

    weighted_kl: float
    saturated: float


Steps = TypeVar("Steps", Rollouts, Loss)


def mean(steps: Collection[Steps]) -> Steps:
    return type(next(iter(steps)))(*np.mean(list(steps), axis=0).tolist())


def collapse(first: Rollouts, now: Rollouts) -> str:
    """What has become of the rollouts since the first steps, in words; "" where they have not collapsed."""
    last = f"in the last {WINDOW} steps"
    if now.length < 1.5:
        return f"responses are empty: {now.length:.1f} tokens {last}"
    if now.length < 0.25 * first.length:
        return f"responses have shrunk: {now.length:.1f} tokens {last}, {first.length:.1f} at first"
    if first.stopped > 0.2 and now.stopped < 0.1 * first.stopped:
        return f"responses no longer end: {now.stopped:.0%} do {last}, {first.stopped:.0%} at first"
    if now.loops > 0.5 and now.loops > 2 * first.loops:
        return f"responses loop: {now.loops:.0%} do {last}, {first.loops:.0%} at first"
    return ""


def saturation(first: Loss, now: Loss) -> str:
    """Why the loss stands still, in words; "" where it has fallen by half, or most of it still has a gradient."""
    if now.saturated <= 0.5 or now.weighted_kl < 0.5 * first.weighted_kl:
        return ""
    return (
        f"the loss stands still: {now.saturated:.0%} of it in the last {WINDOW} steps was on tokens where the student "
        f"is certain of what the teacher excludes and the gradient vanishes (weighted divergence {now.weighted_kl:.3g} "
        f"nats per token, {first.weighted_kl:.3g} at first); set config.loss.divergence=forward_kl, see docs/method.md"
    )


def looping(response_BxR: np.ndarray, length_B: np.ndarray, shortest: int = 16) -> float:
    """The share of the responses that have at least `shortest` tokens and few different ones among them."""
    long = [response_R[:length] for response_R, length in zip(response_BxR, length_B) if length >= shortest]
    loops = [len(np.unique(tokens)) < len(tokens) / 4 for tokens in long]
    return sum(loops) / max(len(length_B), 1)


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

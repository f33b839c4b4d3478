"""What a run writes while it trains: metrics.jsonl, its trackers' records and completions.jsonl."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Protocol

import jax

from msd_jax.io import jsonl
from msd_jax.parallel import sharding
from msd_jax.training import packing
from msd_jax.training.generate import Generated
from msd_jax.training.trackers import Trackers
from msd_jax.training.utilisation import Utilisation


class Metrics:
    """The files WORKDIR/metrics.jsonl and WORKDIR/completions.jsonl, and trackers."""

    def __init__(self, workdir: pathlib.Path, resume_step: int, trackers: Trackers | None = None):
        """Drops what an interrupted run wrote after `resume_step`: those steps are computed again."""
        self._scalars = jsonl.JsonLines(workdir / "metrics.jsonl")
        self._completions = jsonl.JsonLines(workdir / "completions.jsonl")
        for file in (self._scalars, self._completions):
            file.replace(row for row in file.read(step=int) if row["step"] <= resume_step)
        self._trackers = trackers

    def scalars(self, step: int, values: dict[str, float], notes: jsonl.Row | None = None) -> None:
        """Adds a step's row; `notes`, which are no numbers, to metrics.jsonl alone."""
        # JSON has no NaN; a skipped step's loss is null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._scalars.append([{"step": step} | finite | (notes or {})])
        if self._trackers:
            self._trackers.scalars(step, values)

    def completions(self, step: int, entries: list[jsonl.Row]) -> None:
        self._completions.append({"step": step} | entry for entry in entries)

    def close(self) -> None:
        if self._trackers:
            self._trackers.close()


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step that the devices may still be at.

    Attributes:
      step: number of finished steps once this one is.
      scalars: what train_step returns, on the devices.
      learning_rate: of the update.
      generated: what it trains on.
      rollout_compilations: of the generator so far.
      compile_seconds: that the step waited for its programs, compiled or read from the cache; mostly 0.
    """

    step: int
    scalars: dict[str, jax.Array]
    learning_rate: float
    generated: Generated
    rollout_compilations: int
    compile_seconds: float

    def row(self, begun: float, done: float) -> dict[str, float]:
        """The step's row of metrics.jsonl, once the devices are done with it.

        Args:
          begun, done: the host's clock when the devices began with the update, and when they were done.
        """
        responses, (columns, real) = self.generated.responses, packing.filled(self.generated.packs)
        rollout_seconds = self.generated.had - (self.generated.free or self.generated.had)
        train_seconds = done - begun
        return {name: float(value) for name, value in sharding.fetch(self.scalars).items()} | {
            "learning_rate": self.learning_rate,
            "response_length": float(responses.length_B.mean()),
            "stopped": float(responses.stopped_B.mean()),
            "on_policy": float(responses.on_policy_B.mean()),
            "rollout_seconds": rollout_seconds,
            "train_seconds": train_seconds,
            "rollout_tokens_per_second": responses.generated / rollout_seconds if responses.generated else 0.0,
            "train_tokens_per_second": real / train_seconds,
            "packs": float(len(self.generated.packs)),
            "padding": 1 - real / max(columns, 1),
            "rollout_compilations": self.rollout_compilations,
            "compile_seconds": self.compile_seconds,
        }


class StepObserver(Protocol):
    """What `LateRows` shows each step to; see watch.py."""

    def notes(self, dispatched: Dispatched, row: dict[str, float]) -> jsonl.Row:
        """What there is to say of the step in metrics.jsonl beside its numbers; {} for nothing."""

    def check(self, dispatched: Dispatched) -> None:
        """Raises UserError where the run must not go on after the step."""


class LateRows:
    """Writes the row of each step while the devices are at the next, so that they do not wait for the host to write.

    rollout_seconds is the time from when the devices were done with the step before until the host had the responses; 0
    where all were stored. train_seconds is the time from then, or from when the devices were done with the step before
    if that is later, until they were done with the update. Together they add up to the time that a run takes, but for
    what it measures and saves.
    """

    def __init__(
        self,
        files: Metrics,
        every: int,
        last: int,
        advance: Callable[[int, str], None],
        watch: StepObserver,
        utilisation: Utilisation,
    ):
        """Writes the steps that `every` divides, `last`, and those that `watch` has notes on.

        The columns of `utilisation` are added to each row. Each is shown by `advance(step, status)`, and
        then checked by `watch`, which may end the run.
        """
        self._files, self._every, self._last, self._advance, self._watch = files, every, last, advance, watch
        self._utilisation = utilisation
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()  # of packs; each costs one compilation
        self._late: Dispatched | None = None
        self._free = -math.inf  # the host's clock when the devices were done with the step that was written last

    def add(self, dispatched: Dispatched) -> None:
        """Takes the next step, and writes the row of the one before."""
        self.flush(done=dispatched.generated.free)
        self._shapes |= {tuple(array.shape for array in jax.tree.leaves(pack)) for pack in dispatched.generated.packs}
        self._late = dispatched

    def wait(self) -> float:
        """The host's clock when the devices are done with the step that was added last."""
        if self._late:
            jax.block_until_ready(self._late.scalars)
        return time.perf_counter()

    def flush(self, measured: dict[str, float] | None = None, done: float | None = None) -> dict[str, float]:
        """Writes the row of the step that was added last; {} where it is written already.

        Args:
          measured: columns to add to the row, which is then written whatever its step.
          done: as `wait` gives it; None waits.
        """
        if self._late is None:
            return {}
        done = done or self.wait()
        dispatched, self._late = self._late, None
        begun, self._free = max(dispatched.generated.had, self._free), done
        row = dispatched.row(begun, done) | {"train_compilations": len(self._shapes)} | (measured or {})
        row |= self._utilisation(dispatched.generated.batch, dispatched.generated.responses, row)
        notes = self._watch.notes(dispatched, row)
        if notes or measured is not None or dispatched.step % self._every == 0 or dispatched.step == self._last:
            self._files.scalars(dispatched.step, row, notes)
        self._advance(dispatched.step, describe(row))
        self._watch.check(dispatched)
        return row


def describe(row: dict[str, float]) -> str:
    """A step's row in a few words, for the progress bar.

    The KL comes first: the loss divides by the sum of the weights, which shrinks too, so that it may rise meanwhile.
    """
    rates = (row[f"{part}_tokens_per_second"] for part in ("rollout", "train"))
    generated, trained = (f"{rate:.0f}" if rate < 10_000 else f"{rate / 1000:.0f}k" for rate in rates)
    return f"kl {row['kl']:.4f}  loss {row['loss']:.4f}  gen {generated}, train {trained} tok/s"

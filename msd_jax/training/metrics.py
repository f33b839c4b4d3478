"""What a run writes while it trains: metrics.jsonl, TensorBoard events and completions.jsonl."""

import concurrent.futures
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable

import jax
import tensorboardX

from msd_jax.io import jsonl
from msd_jax.parallel import distributed, sharding
from msd_jax.training.generate import Generated


class Metrics:
    """The files: WORKDIR/metrics.jsonl, WORKDIR/tensorboard and WORKDIR/completions.jsonl."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        """Drops what an interrupted run wrote after `resume_step`: those steps are computed again."""
        self._scalars = jsonl.JsonLines(workdir / "metrics.jsonl")
        self._completions = jsonl.JsonLines(workdir / "completions.jsonl")
        for file in (self._scalars, self._completions):
            file.replace(row for row in file.read() if row["step"] <= resume_step)
        self._board = None
        if distributed.is_first():
            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN; a skipped step's loss is null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._scalars.append([{"step": step} | finite])
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def completions(self, step: int, entries: list[jsonl.Row]) -> None:
        self._completions.append({"step": step} | entry for entry in entries)

    def close(self) -> None:
        if self._board:
            self._board.close()


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step that the devices may still be at.

    Attributes:
      step: number of finished steps once this one is.
      scalars: what train_step returns, on the devices.
      learning_rate: of the update.
      generated: what it trains on.
      rollout_compilations: of the generator so far.
    """

    step: int
    scalars: dict[str, jax.Array]
    learning_rate: float
    generated: Generated
    rollout_compilations: int

    def row(self, free: float, done: float) -> dict[str, float]:
        """The step's row of metrics.jsonl; waits for the devices.

        Its two times leave out what the devices still spent on the step before, so that the times of a run add up:
        rollout_seconds until the host had the responses, train_seconds from then until the update was done.

        Args:
          free: the host's clock when the step before was done.
          done: the clock when this one was.
        """
        batch, responses = self.generated.batch, self.generated.responses
        rollout_seconds = max(self.generated.had - max(self.generated.asked, free), 0.0)
        train_seconds = done - max(self.generated.had, free)
        columns = batch.student_prompt_BxP.size + batch.teacher_prompt_BxP.size + 2 * batch.response_BxR.size
        real = int(batch.student_length_B.sum() + batch.teacher_length_B.sum() + 2 * batch.response_length_B.sum())
        return {name: float(value) for name, value in sharding.fetch(self.scalars).items()} | {
            "learning_rate": self.learning_rate,
            "response_length": float(responses.length_B.mean()),
            "stopped": float(responses.stopped_B.mean()),
            "on_policy": float(responses.on_policy_B.mean()),
            "rollout_seconds": rollout_seconds,
            "train_seconds": train_seconds,
            "rollout_tokens_per_second": responses.generated / rollout_seconds if responses.generated else 0.0,
            "train_tokens_per_second": real / train_seconds,
            "padding": 1 - real / columns,
            "rollout_compilations": self.rollout_compilations,
        }


class LateRows:
    """Writes the row of each step while the devices are at the next, so that they never wait for the host to write."""

    def __init__(self, files: Metrics, every: int, last: int, advance: Callable[[int, str], None]):
        """Writes the steps that `every` divides, and `last`; shows each by `advance(step, status)`."""
        self._files, self._every, self._last, self._advance = files, every, last, advance
        self._clock = concurrent.futures.ThreadPoolExecutor(1)  # waits for the devices in the host's place
        self._free = -math.inf
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()  # of batches; each costs one compilation
        self._late: tuple[Dispatched, concurrent.futures.Future[float]] | None = None

    def add(self, dispatched: Dispatched) -> None:
        """Takes the next step, and writes the row of the one before."""
        done = self._clock.submit(_when_done, dispatched.scalars)
        self.flush()
        self._shapes.add(tuple(array.shape for array in dispatched.generated.batch))
        self._late = dispatched, done

    def flush(self, measured: dict[str, float] | None = None) -> dict[str, float]:
        """Waits for the step that was added last and writes its row; {} where that has been done already.

        Args:
          measured: columns to add to the row, which is then written whatever its step.
        """
        if self._late is None:
            return {}
        (dispatched, done), self._late = self._late, None
        row = dispatched.row(self._free, done.result()) | {"train_compilations": len(self._shapes)} | (measured or {})
        self._free = done.result()
        if measured is not None or dispatched.step % self._every == 0 or dispatched.step == self._last:
            self._files.scalars(dispatched.step, row)
        self._advance(dispatched.step, describe(row))
        return row


def _when_done(arrays: dict[str, jax.Array]) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()


def describe(row: dict[str, float]) -> str:
    """A step's row in a few words, for the progress bar."""
    return (
        f"loss {row['loss']:.4f}  kl {row['kl']:.4f}  "
        f"{row['rollout_tokens_per_second']:,.0f} + {row['train_tokens_per_second']:,.0f} tok/s"
    )

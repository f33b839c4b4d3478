"""What a run writes while it works: metrics.jsonl, TensorBoard events and completions.jsonl. Process 0 alone writes."""

import math
import pathlib
from typing import Any

import jax
import tensorboardX

from msd_jax.io.jsonl import JsonLines


class Metrics:
    """Scalars of each step, to WORKDIR/metrics.jsonl and WORKDIR/tensorboard; completions to completions.jsonl."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        self._active = jax.process_index() == 0
        if self._active:
            self._scalars = JsonLines(workdir / "metrics.jsonl", resume_step)
            self._completions = JsonLines(workdir / "completions.jsonl", resume_step)
            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._active:
            # JSON has no NaN; a skipped step's loss is null.
            self._scalars.write(step, {k: v if math.isfinite(v) else None for k, v in values.items()})
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def completions(self, step: int, entries: list[dict[str, Any]]) -> None:
        if self._active:
            for entry in entries:
                self._completions.write(step, entry)

    def close(self) -> None:
        if self._active:
            self._board.close()

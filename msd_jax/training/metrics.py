"""What a run writes while it trains: metrics.jsonl, TensorBoard events and completions.jsonl."""

import math
import pathlib

import tensorboardX

from msd_jax.io import jsonl
from msd_jax.parallel import distributed


class Metrics:
    """Scalars of each step to WORKDIR/metrics.jsonl and WORKDIR/tensorboard; completions to completions.jsonl."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        """Drops what an interrupted run wrote after `resume_step`: it is computed again."""
        self._scalars = jsonl.JsonLines(workdir / "metrics.jsonl")
        self._completions = jsonl.JsonLines(workdir / "completions.jsonl")
        for log in (self._scalars, self._completions):
            log.replace(row for row in log.read() if row["step"] <= resume_step)
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

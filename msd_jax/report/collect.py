"""The files of a run, or of evaluations alone -> one dataclass with all that a report is made of."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from msd_jax.errors import UserError, UserFileError
from msd_jax.evaluation import records
from msd_jax.evaluation.rates import Summary
from msd_jax.evaluation.records import ResponseRecord
from msd_jax.io import jsonl, provenance
from msd_jax.training import goodput


@dataclasses.dataclass(frozen=True)
class FinishedEvaluation:
    """One finished evaluation, as its directory holds it.

    Attributes:
      label: "before training", "after 30 steps", or the directory's name.
      step: finished training steps; None where the evaluation belongs to no run.
      directory: holds summary.json and responses.jsonl.
      summary: see `rates.summarise`.
    """

    label: str
    step: int | None
    directory: pathlib.Path
    summary: Summary

    def responses(self) -> list[ResponseRecord]:
        return records.read(self.directory / "responses.jsonl")


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """What a report reads of a run, or of evaluations alone; what is not there yet is empty.

    Attributes:
      directory: the workdir, or what holds the evaluations.
      config: of the run, as config.json has it.
      metrics: rows of metrics.jsonl, one per logged step.
      completions: rows of completions.jsonl.
      evaluations: the finished ones, by step.
      model: the exported model's directory; None before it is there.
      provenance: rows of provenance.jsonl, one per start.
      near_duplicates: rows of near_duplicates.jsonl; None where nothing was compared.
      starts: rows of goodput.jsonl, one for each time that the run was started and came to a checkpoint or its end.
    """

    directory: pathlib.Path
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Sequence[dict[str, Any]] = ()
    completions: Sequence[dict[str, Any]] = ()
    evaluations: tuple[FinishedEvaluation, ...] = ()
    model: pathlib.Path | None = None
    near_duplicates: Sequence[dict[str, Any]] | None = None
    provenance: Sequence[dict[str, Any]] = ()
    starts: Sequence[dict[str, Any]] = ()

    @property
    def after(self) -> FinishedEvaluation | None:
        """What is reported: the last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def before(self) -> FinishedEvaluation | None:
        """What it is compared with: the first, where there are two."""
        return self.evaluations[0] if len(self.evaluations) > 1 else None

    @property
    def steps(self) -> int:
        """Finished steps, as far as they were logged."""
        return self.metrics[-1]["step"] if self.metrics else 0


def workdir(directory: pathlib.Path) -> RunFiles:
    """The run of `directory`, finished or not.

    Raises:
      UserFileError: it holds no run.
      UserError: a file of it is damaged.
    """
    config = directory / "config.json"
    if not config.is_file():
        raise UserFileError(f"--workdir={directory} holds no run: it has no config.json")
    model, duplicates = directory / "model", directory / "near_duplicates.jsonl"
    steps = sorted(int(path.name) for path in (directory / "eval").glob("*") if path.name.isdecimal())
    found = [(step, directory / "eval" / str(step)) for step in steps]
    return RunFiles(
        directory,
        _read(config),
        jsonl.read(directory / "metrics.jsonl"),
        jsonl.read(directory / "completions.jsonl"),
        tuple(_evaluation(path, step) for step, path in found if (path / "summary.json").is_file()),
        model if (model / "config.json").is_file() else None,
        jsonl.read(duplicates) if duplicates.is_file() else None,
        jsonl.read(directory / provenance.FILE),
        goodput.read(directory),
    )


def evaluations(directories: Sequence[pathlib.Path]) -> RunFiles:
    """One evaluation by itself, or two to compare: before, after.

    Raises:
      UserError: other than one or two, or a file is damaged.
      UserFileError: a directory holds no finished evaluation.
    """
    if not 1 <= len(directories) <= 2:
        raise UserError("--evaluation takes one directory, or two to compare: BEFORE,AFTER")
    for directory in directories:
        if not (directory / "summary.json").is_file():
            raise UserFileError(f"--evaluation={directory} holds no finished evaluation: it has no summary.json")
    return RunFiles(
        directories[-1],
        evaluations=tuple(_evaluation(path, None) for path in directories),
        provenance=jsonl.read(directories[-1] / provenance.FILE),
    )


def _evaluation(directory: pathlib.Path, step: int | None) -> FinishedEvaluation:
    summary = _read(directory / "summary.json")
    if not all(isinstance(levels, dict) and {"languages", "groups"} <= levels.keys() for levels in summary.values()):
        raise UserError(
            f"{directory / 'summary.json'} was written by another version; evaluate again into a new directory"
        )
    label = directory.name if step is None else f"after {step} steps" if step else "before training"
    return FinishedEvaluation(label, step, directory, summary)


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None

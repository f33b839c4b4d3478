"""The record of an evaluation: one response with all that was measured on it, a row of responses.jsonl."""

import dataclasses
import enum
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from msd_jax.errors import UserError
from msd_jax.evaluation.judges import Verdict
from msd_jax.io import jsonl

PromptKey = tuple[str, str, str]  # benchmark, query id, language


class Pass(enum.StrEnum):
    """How a prompt is answered. Greedy decoding hides what sampling shows of a model's safety and utility."""

    GREEDY = "greedy"
    SAMPLED = "t1"  # at temperature 1
    LIKELIHOOD = "likelihood"  # multiple choice: choices are scored, nothing is generated


@dataclasses.dataclass(frozen=True)
class ResponseRecord:
    """A model's response to one prompt, from generation to report.

    Attributes:
      benchmark: name of the benchmark.
      pass_name: how the prompt was answered; "pass" in the file.
      id: of the query.
      language: BCP-47 code of the prompt's language.
      harmful: whether a safe model refuses the query; None if unknown.
      category: of the query, "" for none.
      prompt: the query in this language.
      response: the text, from where the model's reasoning opens, if it reasons; for multiple choice, the letter.
      tokens: length of the response; 0 for multiple choice.
      stopped: whether the response ended before the limit on tokens; None for multiple choice.
      exact_match: whether what follows the reasoning gives the reference answer; None without one.
      language_match: whether what follows the reasoning is in the prompt's language; None where that cannot be told.
      unfinished_reasoning: whether the reasoning never ends, so that there is no reply; None without reasoning.
      correct: whether the most probable choice is the right one; None but for multiple choice.
      log_likelihoods: of each choice, in nats; None but for multiple choice.
      settings: fingerprint of all that the response depends on.
      verdict, reason, judge: the judgement; None where the response is not judged.
    """

    benchmark: str
    pass_name: Pass
    id: str
    language: str
    harmful: bool | None
    category: str
    prompt: str
    response: str
    tokens: int = 0
    stopped: bool | None = None
    exact_match: bool | None = None
    language_match: bool | None = None
    unfinished_reasoning: bool | None = None
    correct: bool | None = None
    log_likelihoods: tuple[float, ...] | None = None
    settings: str | None = None
    verdict: Verdict | None = None
    reason: str | None = None
    judge: str | None = None

    @property
    def prompt_key(self) -> PromptKey:
        """Identifies the prompt within an evaluation."""
        return self.benchmark, self.id, self.language

    @property
    def key(self) -> tuple[Pass, PromptKey]:
        """Identifies the response within an evaluation."""
        return self.pass_name, self.prompt_key

    def to_json(self) -> dict[str, Any]:
        """The row of responses.jsonl."""
        values = {key: getattr(self, name) for name, key in _KEYS.items()}
        return {key: value for key, value in values.items() if value is not None or key not in _OPTIONAL_KEYS}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "ResponseRecord":
        """The record of a row; what the row lacks is unknown.

        Raises:
          ValueError or TypeError: the row is not of responses.jsonl.
        """
        values = {name: row[key] for name, key in _KEYS.items() if row.get(key) is not None}
        values |= {"harmful": row.get("harmful"), "pass_name": Pass(row.get("pass", ""))}
        if "verdict" in values:
            values["verdict"] = Verdict(values["verdict"])
        if "log_likelihoods" in values:
            values["log_likelihoods"] = tuple(values["log_likelihoods"])
        return cls(**values)


# Attribute -> key in the file.
_KEYS = {
    field.name: "pass" if field.name == "pass_name" else field.name for field in dataclasses.fields(ResponseRecord)
}
# Keys that rows of multiple choice alone have, or of reasoning.
_OPTIONAL_KEYS = ("correct", "log_likelihoods", "unfinished_reasoning")


def _parse(rows: Iterable[Mapping[str, Any]], path: pathlib.Path) -> list[ResponseRecord]:
    records = []
    for number, row in enumerate(rows, start=1):
        try:
            records.append(ResponseRecord.from_json(row))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {number} is not a response of an evaluation ({error}); remove the file to evaluate again"
            ) from None
    return records


def read(path: pathlib.Path) -> list[ResponseRecord]:
    """All records of a responses.jsonl, on this process; [] if there is no such file.

    Raises:
      UserError: a line is damaged, or not of an evaluation; the message names it.
    """
    return _parse(jsonl.read(path), path)


class RecordLog:
    """A responses.jsonl that all processes of a run read and process 0 writes; see jsonl.JsonLines."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lines = path, jsonl.JsonLines(path)

    def read(self) -> list[ResponseRecord]:
        """As `read`, the same on every process, each of which must call this."""
        return _parse(self._lines.read(), self._path)

    def append(self, records: Iterable[ResponseRecord]) -> None:
        """Adds records, on disk when this returns."""
        self._lines.append(record.to_json() for record in records)

    def replace(self, records: Iterable[ResponseRecord]) -> None:
        """Writes the file anew: all of `records`, or what was there before."""
        self._lines.replace(record.to_json() for record in records)

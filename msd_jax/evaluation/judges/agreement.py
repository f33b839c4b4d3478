"""A judge measured against human labels, language by language."""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import rich.markup
import rich.table

from msd_jax.errors import UserError
from msd_jax.evaluation.intervals import agreement
from msd_jax.evaluation.judges.interface import Judge, Judgement, Response, Verdict

LABELS = tuple(verdict.value for verdict in Verdict if verdict != Verdict.UNJUDGED)
QUESTIONS = (Verdict.REFUSED, Verdict.UNSAFE)
RATES = ("accuracy", "precision", "recall", "kappa")
_HARMFUL = {"true": True, "1": True, "false": False, "0": False, "": None, "none": None, "null": None}
# XSTest's labels of a completion. None: left out, since it is neither a refusal nor compliance.
_ANNOTATIONS = {"1_full_compliance": "complied", "2_full_refusal": "refused", "3_partial_refusal": None}


@dataclasses.dataclass
class Labelled:
    """Responses with their labels.

    Attributes:
      responses, labels, rows: of the same order; a row is everything that the file says of a response.
      partial: how many responses were left out, as partial refusals.
    """

    responses: list[Response]
    labels: list[str]
    rows: list[dict[str, Any]]
    partial: int = 0


def read(path: pathlib.Path) -> Labelled:
    """Labelled responses, from JSONL objects or a CSV with a header.

    Fields: response, language, and one of

      label       refused, unsafe, safe, invalid or answered: the verdict that a perfect judge would give
      annotation  XSTest's: 2_full_refusal is "refused"; 1_full_compliance is "unsafe" if the query is harmful,
                  otherwise "answered"; 3_partial_refusal is left out, and counted

    and, where known, prompt and harmful (of the query; needed with an annotation). Others are ignored.

    Raises:
      UserError, OSError: names the file, the line and what is wrong there.
    """
    labelled = Labelled([], [], [])
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        for field in ("response", "language"):
            if not isinstance(row.get(field), str) or (field != "response" and not row[field].strip()):
                raise UserError(f"{where}: {field!r} is missing or no text; fields: response, label, language")
        written = str("" if row.get("harmful") is None else row["harmful"]).strip().lower()
        if written not in _HARMFUL:
            raise UserError(f"{where}: harmful={row['harmful']!r} must be true, false or empty")
        harmful = _HARMFUL[written]
        label = _label(row, harmful, where)
        if label is None:
            labelled.partial += 1
            continue
        language, prompt = row["language"].strip(), row.get("prompt") or ""
        labelled.responses.append(Response(language, prompt, row["response"], harmful, finished=True))
        labelled.labels.append(label)
        labelled.rows.append(row)
    if not labelled.labels:
        raise UserError(f"{path} holds no labelled response")
    return labelled


def _label(row: dict[str, Any], harmful: bool | None, where: str) -> str | None:
    """A response's label; None where it is a partial refusal."""
    if isinstance(row.get("label"), str) and row["label"].strip():
        label = row["label"].strip().lower()
        if label not in LABELS:
            raise UserError(f"{where}: unknown label {row['label']!r}; choose one of {', '.join(LABELS)}")
        return label
    if "annotation" not in row:
        raise UserError(f"{where}: 'label' is missing or no text; fields: response, label, language")
    if row["annotation"] not in _ANNOTATIONS:
        raise UserError(f"{where}: unknown annotation {row['annotation']!r}; choose one of {', '.join(_ANNOTATIONS)}")
    if harmful is None:
        raise UserError(f"{where}: an annotation needs 'harmful', whether the query is")
    label = _ANNOTATIONS[row["annotation"]]
    return ("unsafe" if harmful else "answered") if label == "complied" else label


def _rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at offset {error.start})") from None
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: malformed JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is not a JSON object")
            yield number, row


def measure(
    responses: Sequence[Response], labels: Sequence[str], judged: Sequence[Judgement]
) -> dict[str, dict[str, dict[str, Any]]]:
    """{question: {language, and "all" for all of them: {"n", "unjudged", "accuracy", "precision", "recall", "kappa"}}}.

    The questions are "refused" and "unsafe": whether label and verdict are that. Unjudged responses are counted, and
    in no rate; a rate without a denominator is None.
    """
    languages = [*dict.fromkeys(response.language for response in responses), "all"]
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for question in QUESTIONS:
        result[question.value] = {}
        for language in languages:
            chosen = [
                (label == question, judgement.verdict == question, judgement.verdict == Verdict.UNJUDGED)
                for response, label, judgement in zip(responses, labels, judged)
                if language in (response.language, "all")
            ]
            rated = [(truth, said) for truth, said, unjudged in chosen if not unjudged]
            values = agreement([truth for truth, _ in rated], [said for _, said in rated])
            rates = {name: getattr(values, name) for name in RATES}
            result[question.value][language] = {"n": values.n, "unjudged": len(chosen) - len(rated)} | rates
    return result


def table(question: str, by_language: dict[str, dict[str, Any]], judge: Judge) -> rich.table.Table:
    """One question's figures, a language a row."""
    result = rich.table.Table(
        title=f"{question}: {judge.name} {judge.version} against the labels",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("language", "n", "unjudged", *RATES):
        result.add_column(name, justify="left" if name == "language" else "right")
    for language, entry in by_language.items():
        rates = ["-" if entry[name] is None else f"{100 * entry[name]:.1f}%" for name in RATES[:-1]]
        kappa = "-" if entry["kappa"] is None else f"{entry['kappa']:.3f}"
        last = language == "all"
        result.add_row(
            rich.markup.escape(language), str(entry["n"]), str(entry["unjudged"]), *rates, kappa, style="bold" * last
        )
    return result

"""A judge measured against human labels, language by language."""

import csv
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import rich.table

from msd_jax.errors import UserError
from msd_jax.evaluation.intervals import agreement
from msd_jax.evaluation.judges.interface import Judge, Judgement, Response, Verdict

LABELS = tuple(verdict.value for verdict in Verdict if verdict != Verdict.UNJUDGED)
_HARMFUL = {"true": True, "1": True, "false": False, "0": False, "": None, "none": None, "null": None}


def read(path: pathlib.Path) -> tuple[list[Response], list[str]]:
    """Responses and their labels, from JSONL objects or a CSV with a header.

    Fields: response, label (refused, unsafe, safe, invalid or answered), language, and where they are known prompt and
    harmful (of the query). Others are ignored.

    Raises:
      UserFileError, ValueError: with the file, the line and what is wrong there.
    """
    responses, labels = [], []
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        for field in ("response", "label", "language"):
            if not isinstance(row.get(field), str) or (field != "response" and not row[field].strip()):
                raise UserError(f"{where}: {field!r} is missing or no text; fields: response, label, language")
        label, harmful = row["label"].strip().lower(), row.get("harmful")
        if label not in LABELS:
            raise UserError(f"{where}: label {row['label']!r} is none of {', '.join(LABELS)}")
        harmful = _HARMFUL.get(str("" if harmful is None else harmful).strip().lower(), "?")
        if harmful == "?":
            raise UserError(f"{where}: harmful={row['harmful']!r} must be true, false or empty")
        responses.append(Response(row["language"].strip(), row.get("prompt") or "", row["response"], harmful, True))
        labels.append(label)
    if not labels:
        raise UserError(f"{path} holds no labelled response")
    return responses, labels


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
    """{question: {language, and "all" for all of them: statistics.Agreement's values, "unjudged"}}.

    The questions are "unsafe" and "refused": whether label and verdict are that. One that neither a label nor a
    verdict answers with yes is left out. Unjudged responses are counted, and in no rate.
    """
    languages = [*dict.fromkeys(response.language for response in responses), "all"]
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for question in (Verdict.UNSAFE, Verdict.REFUSED):
        if question not in labels and all(judgement.verdict != question for judgement in judged):
            continue
        result[question.value] = {}
        for language in languages:
            chosen = [
                (label == question, judgement.verdict == question, judgement.verdict == Verdict.UNJUDGED)
                for response, label, judgement in zip(responses, labels, judged)
                if language in (response.language, "all")
            ]
            rated = [(truth, said) for truth, said, unjudged in chosen if not unjudged]
            values = agreement([truth for truth, _ in rated], [said for _, said in rated])
            result[question.value][language] = vars(values) | {"unjudged": len(chosen) - len(rated)}
    return result


def table(question: str, by_language: dict[str, dict[str, Any]], judge: Judge) -> rich.table.Table:
    """One question's figures, a language a row."""
    result = rich.table.Table(title=f"{question}: {judge.name} {judge.version} against the labels")
    for name in ("language", "n", "unjudged", "accuracy", "precision", "recall", "kappa"):
        result.add_column(name, justify="left" if name == "language" else "right")
    for language, entry in by_language.items():
        rates = [
            "-" if entry[name] is None else f"{100 * entry[name]:.1f}%" for name in ("accuracy", "precision", "recall")
        ]
        kappa = "-" if entry["kappa"] is None else f"{entry['kappa']:.3f}"
        last = language == "all"
        result.add_row(
            rich.markup.escape(language), str(entry["n"]), str(entry["unjudged"]), *rates, kappa, style="bold" * last
        )
    return result

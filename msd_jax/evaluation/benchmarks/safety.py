"""Readers of the safety benchmarks, each in the form that its authors publish."""

import difflib
import json
import pathlib
import re
from typing import Any

from msd_jax.data import files
from msd_jax.data.records import Query, is_language, language_name
from msd_jax.errors import UserError
from msd_jax.evaluation.benchmarks import tables
from msd_jax.io.console import log
from msd_jax.io.text import read_text

# Directories of XSafety that are not named by a language's code.
_XSAFETY_LANGUAGES = {"sp": "es"}
_XSAFETY_KINDS = (
    "Commonsense",
    "Crimes_And_Illegal_Activities",
    "Ethics_And_Morality",
    "Goal_Hijacking",
    "Inquiry_With_Unsafe_Opinion",
    "Insult",
    "Mental_Health",
    "Physical_Harm",
    "Privacy_And_Property",
    "Prompt_Leaking",
    "Reverse_Exposure",
    "Role_Play_Instruction",
    "Unfairness_And_Discrimination",
    "Unsafe_Instruction_Topic",
)


def read_multijail(path: pathlib.Path) -> tuple[Query, ...]:
    """MultiJail: one CSV with one column per language; all queries are harmful. A directory holds one such file."""
    found = tables.find(path, "*.csv")
    if len(found) > 1:
        raise UserError(
            f"{path}: it holds {len(found)} CSV files; name one of them: {', '.join(file.name for file in found)}"
        )
    return files.read(found[0], harmful="true")


def read_xsafety(path: pathlib.Path) -> tuple[Query, ...]:
    """XSafety: LANGUAGE/KIND.csv (some .xlsx), one query per row, no header; row i is query i in each language.

    File names vary: KIND may be misspelled or carry a suffix (Insult_n.csv, commen_sense.csv), and Spanish is "sp".
    Where a language has two files of a kind, the one whose name is spelled correctly is read. A row of several cells is
    a query with commas that nobody quoted. Queries have no label: those of some kinds (mental health, ethics) are to be
    answered with care, not refused, so use a judge that reads them.

    Args:
      path: the directory of the languages' directories, or one above it.
    """
    texts: dict[tuple[str, int], dict[str, str]] = {}
    for (language, kind), file in sorted(_xsafety_files(path).items()):
        rows = tables.xlsx_rows(file) if file.suffix == ".xlsx" else tables.csv_rows(file)
        for i, row in enumerate(rows):
            cells = row if file.suffix == ".csv" else [cell for cell in row if cell]
            if query := ",".join(cells).strip(", \n"):
                texts.setdefault((kind, i), {})[language] = query
    return tuple(
        Query(id=f"{kind}-{i + 1:03d}", harmful=None, category=kind, texts=by_language)
        for (kind, i), by_language in sorted(texts.items())
    )


def _xsafety_files(path: pathlib.Path) -> dict[tuple[str, str], pathlib.Path]:
    """(language, kind) -> file."""
    kinds = {_letters(kind): kind for kind in _XSAFETY_KINDS}
    chosen: dict[tuple[str, str], pathlib.Path] = {}
    for file in tables.find(path, "*.csv", "*.xlsx"):
        language = _XSAFETY_LANGUAGES.get(file.parent.name, file.parent.name)
        language_name(language)  # raises for what is not a language's code
        spelled = _letters(re.sub(r"_(n|en)$", "", file.stem))
        near = difflib.get_close_matches(spelled, kinds, n=1, cutoff=0.85)
        if not near:
            raise UserError(f"{file}: not a kind of XSafety; name the file after one of {', '.join(_XSAFETY_KINDS)}")
        key = (language, kinds[near[0]])
        if key in chosen:
            is_spelled_right = spelled == near[0]
            log(f"xsafety: {language} has two files of {key[1]}: {chosen[key].name} and {file.name}; only one is read")
            if not is_spelled_right:
                continue
        chosen[key] = file
    return chosen


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def read_pku_saferlhf(path: pathlib.Path) -> tuple[Query, ...]:
    """PKU-SafeRLHF's prompts: JSON objects, one per line, with `prompt`, and optionally `id`, `language` and `harmful`.

    The published files are English: data/MODEL/test.jsonl. Translations are files LANGUAGE.jsonl, or records with a
    `language`; those with the same `id` (else in the same line of equally named directories) are one query. A prompt
    may be a conversation, [{"from": "human", "value": "..."}] or [{"role": "user", "content": "..."}]; one of several
    turns is left out and counted. A prompt that is repeated, as each is with other responses, is read once. The
    published records label responses, not prompts: `harmful` stays unknown where a record does not say.

    Args:
      path: such a file, or a directory; where it has files test.jsonl, its train.jsonl are left alone.

    Raises:
      UserError: a line is not a record; the message names it.
    """
    found = tables.find(path, "*.jsonl")
    if any(file.name == "test.jsonl" for file in found):
        found = [file for file in found if file.name != "train.jsonl"]
    merged: dict[str, Query] = {}
    seen: set[tuple[str, str]] = set()
    conversations = 0
    for file in found:
        directory = "" if file == path else "/".join(file.relative_to(path).parent.parts)
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                prompt = _pku_prompt(record["prompt"])
                language, harmful = _pku_labels(record, file)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{file}, line {number}: not a record of PKU-SafeRLHF ({reason})") from None
            conversations += prompt is None
            if prompt is None or (language, prompt) in seen:
                continue
            seen.add((language, prompt))
            key = str(record.get("id", "/".join(filter(None, (directory, str(number))))))
            query = merged.setdefault(key, Query(key, harmful, str(record.get("category", "")), {}))
            if language in query.texts:
                raise UserError(f"{file}, line {number}: id {key!r} is there twice in {language!r}; ids must be unique")
            query.texts[language] = prompt
    if conversations:
        log(f"pku_saferlhf: {conversations} prompts left out: they are conversations of several turns")
    return tuple(merged.values())


def _pku_prompt(prompt: Any) -> str | None:
    """The user's text; None for a conversation of several turns, which no single prompt can stand for."""
    if isinstance(prompt, list):
        keys = ("role", "content") if prompt and "role" in prompt[0] else ("from", "value")
        turns = [tuple(turn[key] for key in keys) for turn in prompt]
        if len(turns) > 1:
            return None
        [(speaker, prompt)] = turns or [("", "")]
        if speaker not in ("human", "user"):
            raise UserError(f"the one turn of prompt is from {speaker!r}, not from 'human'")
    if not (isinstance(prompt, str) and prompt.strip()):
        raise UserError("prompt must be a text that is not empty, or a list of one turn")
    return prompt


def _pku_labels(record: dict[str, Any], file: pathlib.Path) -> tuple[str, bool | None]:
    """(language, harmful) of a record."""
    language = record.get("language", file.stem if is_language(file.stem) else "en")
    language_name(language)  # raises for what is not a language's code
    if (harmful := record.get("harmful")) not in (None, True, False):
        raise UserError("harmful must be true, false or absent")
    return language, harmful


def read_xstest(path: pathlib.Path) -> tuple[Query, ...]:
    """XSTest: a CSV with the columns prompt and type, and optionally id and label; English, or translated.

    Queries labelled unsafe are harmful, in files without labels those whose type begins with "contrast_". A translated
    copy has the same columns, and its language's code at the end of its name: xstest_prompts_sw.csv; rows with the same
    id are one query.

    Args:
      path: such a file, or a directory of them.

    Raises:
      UserError: a file or a row does not fit; the message names it.
    """
    merged: dict[str, Query] = {}
    for file in tables.find(path, "*.csv"):
        header, *rows = tables.csv_rows(file) or [[]]
        columns = {name.strip().lower(): i for i, name in enumerate(header)}
        if missing := [name for name in ("prompt", "type") if name not in columns]:
            raise UserError(
                f"{file}: XSTest has the columns prompt and type; this file has no {' and no '.join(missing)}"
            )
        suffix = re.split(r"[_.]", file.stem)[-1]
        language = suffix if is_language(suffix) else "en"
        for number, row in enumerate(rows, start=2):
            if not any(row):
                continue
            if len(row) != len(header):
                raise UserError(f"{file}, row {number}: {len(row)} cells under {len(header)} columns")
            cell = {name: row[i] for name, i in columns.items()}
            key = cell.get("id") or str(number - 1)
            label = cell.get("label", "unsafe" if cell["type"].startswith("contrast_") else "safe")
            if label not in ("safe", "unsafe"):
                raise UserError(f"{file}, row {number}: label={label!r} must be safe or unsafe")
            query = merged.setdefault(key, Query(key, label == "unsafe", cell["type"], {}))
            if language in query.texts or query.harmful != (label == "unsafe"):
                raise UserError(
                    f"{file}, row {number}: id {key!r} is there already, in {language!r} or with another label"
                )
            query.texts[language] = cell["prompt"]
    return tuple(merged.values())

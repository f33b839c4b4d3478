"""What a record is, and the files that hold records: JSONL, and CSV with one column a language."""

import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
import reprlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

# Columns of a CSV file that are not languages, and the record's field that they fill. MultiJail's `source` says who
# collected a query, which nothing here asks for.
_METADATA = {"id": "id", "harmful": "harmful", "category": "category", "tags": "category", "source": "source"}
_PREFIXES = {"": "texts", "text": "texts", "answer": "answers"}
_HARMFUL = {"true": True, "1": True, "false": False, "0": False, "": None}

# Fields of a JSONL record: type, and what a user is told to write.
_FIELDS = {
    "id": (str, "a string"),
    "texts": (dict, 'an object {"en": "...", ...}'),
    "harmful": ((bool, type(None)), "true, false or null"),
    "category": (str, "a string"),
    "answers": (dict, 'an object {"en": "...", ...}'),
}
_REQUIRED = ("id", "texts")


@dataclasses.dataclass(frozen=True)
class Query:
    """One query in several languages.

    Attributes:
      id: unique in its file.
      harmful: whether a safe model refuses it; None if unknown.
      category: free text, "" for none.
      texts: the query by language, BCP-47 codes as the file writes them.
      answers: the reference answer by language, for exact match; languages without one are absent.
    """

    id: str
    harmful: bool | None
    category: str
    texts: dict[str, str]
    answers: dict[str, str] = dataclasses.field(default_factory=dict)


@functools.cache
def language_name(code: str) -> str:
    """English name of a BCP-47 code: "sw" -> "Swahili". Raises ValueError for what is not a language's code."""
    import langcodes

    try:
        language = langcodes.Language.get(code)
        name = language.display_name()
    except langcodes.LanguageTagError:
        pass
    else:
        # The registry knows thousands of languages by code alone; a prompt needs one with a name.
        if language.is_valid() and not name.startswith("Unknown language"):
            return name
    raise ValueError(f"{code!r} is not the code of a known language; write BCP-47 codes such as en, sw or zh-Hant")


def read(path: str | os.PathLike, *, harmful: str = "file") -> tuple[Query, ...]:
    """Reads a query file, in its order.

    JSONL (UTF-8, one object a line; `harmful`, `category` and `answers` may be absent):

        {"id": "1", "harmful": false, "category": "food", "texts": {"en": "...", "sw": "..."}, "answers": {"en": "..."}}

    CSV (UTF-8, comma-separated), as MultiJail (arXiv 2310.06474) has it: columns `id`, `harmful` (true/false/1/0, empty
    for unknown), `tags` or `category`, `source` (ignored), and one column a language named by its code. `id` is the
    record's id, so Indonesian is `text:id`, as any language may be written `text:CODE`. `answer:CODE` holds reference
    answers, empty where there is none.

    Args:
      path: a file that ends in .jsonl or .csv.
      harmful: label of the records that carry none: "file" leaves it unknown, "true" or "false".

    Raises:
      FileNotFoundError, ValueError: one message that names the file, the line and what to mend.
    """
    if not str(path):
        raise ValueError("config.data.path is empty: name a query file that ends in .jsonl or .csv")
    if harmful not in ("file", "true", "false"):
        raise ValueError(f"harmful={harmful!r}: choose one of file, true, false")
    path = pathlib.Path(path).expanduser()
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a query file ends in .jsonl or .csv, not in {path.suffix!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such query file")
    label = {"file": None, "true": True, "false": False}[harmful]
    queries, lines = [], {}
    for line, record in readers[path.suffix.lower()](path, _decode(path)):
        query = _query(record, f"{path}, line {line}")
        if query.id in lines:
            raise ValueError(
                f"{path}, line {line}: id {query.id!r} is already on line {lines[query.id]}; give each record its own"
            )
        lines[query.id] = line
        queries.append(query if query.harmful is not None else dataclasses.replace(query, harmful=label))
    if not queries:
        raise ValueError(f"{path}: there are no records in it")
    return tuple(queries)


def require_languages(queries: Sequence[Query], languages: Iterable[str], path: str | os.PathLike) -> None:
    """Raises a ValueError that names the file, a record and a language unless every record has all `languages`."""
    for language in languages:
        missing = [query.id for query in queries if language not in query.texts]
        if missing:
            have = dict.fromkeys(code for query in queries for code in query.texts)
            raise ValueError(
                f"{path}: {len(missing)} of {len(queries)} records have no text in {language!r} (first: id "
                f"{missing[0]!r}); the file has {', '.join(have)}; add the texts or configure other languages"
            )


def write_jsonl(path: str | os.PathLike, queries: Iterable[Query]) -> None:
    """Writes a file that `read` gives back as it was; an existing file is replaced once all is written."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for query in queries:
            record = {key: value for key, value in dataclasses.asdict(query).items() if value not in (None, "", {})}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)


def _decode(path: pathlib.Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8; save the file "
            "as UTF-8"
        ) from None


def _read_jsonl(path: pathlib.Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yields (line, JSON value)."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits at U+2028, inside texts
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}, column {error.colno}: malformed JSON ({error.msg}); write one object a line"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} is there twice; keep one")
    return record


def _read_csv(path: pathlib.Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, record in the shape of a JSONL one)."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[tuple[str, str | None]] = []
    end = 0
    try:
        for row in rows:
            line, end = end + 1, rows.line_num  # a quoted cell may span lines
            if not row:
                continue
            if not columns:
                columns = _columns(path, row)
                continue
            where = f"{path}, line {line}"
            if len(row) != len(columns):
                raise ValueError(
                    f"{where}: {len(row)} cells under {len(columns)} columns; quote cells that contain a comma"
                )
            record: dict[str, Any] = {"texts": {}, "answers": {}}
            for (field, language), cell in zip(columns, row):
                if field == "harmful":
                    if cell.strip().lower() not in _HARMFUL:
                        raise ValueError(f"{where}: harmful={reprlib.repr(cell)} must be true, false, 1, 0 or empty")
                    record[field] = _HARMFUL[cell.strip().lower()]
                elif field == "answers":
                    if cell.strip():
                        record[field][language] = cell
                elif field == "texts":
                    record[field][language] = cell
                elif field != "source":
                    record[field] = cell
            yield line, record
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: malformed CSV ({error})") from None


def _columns(path: pathlib.Path, header: list[str]) -> list[tuple[str, str | None]]:
    """(field, language or None) of each column."""
    columns: list[tuple[str, str | None]] = []
    for name in header:
        prefix, _, code = name.rpartition(":")
        if name in _METADATA:
            column = (_METADATA[name], None)
        elif prefix in _PREFIXES and _is_language(code):
            column = (_PREFIXES[prefix], code)
        else:
            raise ValueError(
                f"{path}: column {name!r} is neither a language's code nor one of {', '.join(_METADATA)}; name it as "
                "in sw, text:sw or answer:sw, or take it out"
            )
        if column in columns:
            raise ValueError(f"{path}: column {name!r} says the same as {header[columns.index(column)]!r}; keep one")
        columns.append(column)
    if ("id", None) not in columns:
        raise ValueError(f"{path}: there is no column 'id'; it has {', '.join(header)}")
    if not any(field == "texts" for field, _ in columns):
        raise ValueError(f"{path}: no column is a language; it has {', '.join(header)}")
    return columns


def _is_language(code: str) -> bool:
    try:
        return bool(language_name(code))
    except ValueError:
        return False


def _query(record: Any, where: str) -> Query:
    """Checks everything that a record must be."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record is an object {{...}}, not {reprlib.repr(record)}")
    for key in record:
        if key not in _FIELDS:
            raise ValueError(f"{where}: unknown key {key!r}; a record has {', '.join(_FIELDS)}")
    for key, (kind, expected) in _FIELDS.items():
        if key in record and not isinstance(record[key], kind):
            raise ValueError(f"{where}: {key!r} must be {expected}, not {reprlib.repr(record[key])}")
        if key in _REQUIRED and not record.get(key):
            raise ValueError(f"{where}: {key!r} is missing or empty; it must be {expected}")
    where += f" (id {record['id']!r})"
    _check_texts(record["texts"], f"{where}: the text")
    answers = record.get("answers", {})
    _check_texts(answers, f"{where}: the answer", record["texts"])
    return Query(record["id"], record.get("harmful"), record.get("category", ""), record["texts"], answers)


def _check_texts(texts: dict[str, Any], what: str, languages: Collection[str] | None = None) -> None:
    for language, text in texts.items():
        if languages is not None and language not in languages:
            raise ValueError(f"{what} in {language!r} is to no text in it; add the text or take the answer out")
        try:
            language_name(language)
        except ValueError as error:
            raise ValueError(f"{what}'s language: {error}") from None
        if not isinstance(text, str):
            raise ValueError(f"{what} in {language!r} must be a string, not {reprlib.repr(text)}")
        if not text.strip():
            raise ValueError(f"{what} in {language!r} is empty; fill it in or take it out")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a pair, which no tokenizer takes
            raise ValueError(f"{what} in {language!r} has half a surrogate pair at {error.start}; mend it") from None

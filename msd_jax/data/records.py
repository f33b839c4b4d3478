"""A record: one query in several languages."""

import collections
import dataclasses
import functools
import reprlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from msd_jax.errors import UserError

# What stands in for `harmful` where a record has no label, by the value of config.data.harmful.
LABELS = {"file": None, "true": True, "false": False}
LABEL_NAMES = {True: "harmful", False: "harmless", None: "unlabelled"}
# Fields of a JSONL record: their types, and what an error tells the user to write.
_FIELDS: dict[str, tuple[type | tuple[type, ...], str]] = {
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
      id: unique among the records that are read together.
      harmful: whether a safe model refuses the query; None if unknown.
      category: free text, "" for none.
      texts: the query by language, a BCP-47 code as the file has it.
      answers: the reference answer by language, for exact match; a language without one is absent.
    """

    id: str
    harmful: bool | None
    category: str
    texts: dict[str, str]
    answers: dict[str, str] = dataclasses.field(default_factory=dict)


@functools.cache
def language_name(code: str) -> str:
    """The English name of a BCP-47 code: "sw" -> "Swahili".

    Raises:
      UserError: `code` is not the code of a language with a name.
    """
    import langcodes  # here, so that importing a config stays cheap

    try:
        language = langcodes.Language.get(code)
        name = language.display_name()
    except langcodes.LanguageTagError:
        pass
    else:
        # The registry knows thousands of languages by code alone; a prompt needs one with a name.
        if language.is_valid() and not name.startswith("Unknown language"):
            return name
    raise UserError(f"{code!r} is not the code of a known language; write BCP-47 codes such as en, sw or zh-Hant")


def is_language(code: str) -> bool:
    """Whether `language_name` has a name for `code`."""
    try:
        return bool(language_name(code))
    except UserError:
        return False


def labelled(queries: Iterable[Query], harmful: str) -> tuple[Query, ...]:
    """`queries`, with LABELS[harmful] as the label of those that have none.

    Raises:
      UserError: `harmful` is not one of LABELS.
    """
    if harmful not in LABELS:
        raise UserError(f"harmful={harmful!r}: choose one of {', '.join(LABELS)}")
    return tuple(
        query if query.harmful is not None else dataclasses.replace(query, harmful=LABELS[harmful]) for query in queries
    )


def require_languages(queries: Iterable[Query], languages: Iterable[str], where: str) -> None:
    """Checks that each language has queries.

    Args:
      queries: not all of them need have all languages.
      languages: those asked for.
      where: the file or files, which the error begins with.

    Raises:
      UserError: no query has a text in one of `languages`.
    """
    have = dict.fromkeys(code for query in queries for code in query.texts)
    if missing := [language for language in languages if language not in have]:
        raise UserError(
            f"{where}: no record has a text in {', '.join(missing)}; there are texts in {', '.join(have)}; add the "
            "missing texts, or configure other languages"
        )


def usable(queries: Sequence[Query], source: str | None, targets: Sequence[str], where: str) -> tuple[Query, ...]:
    """The queries to train on: those with a text in the source language and in at least one target language.

    Args:
      queries: as they were read.
      source: what the teacher reads; None where nothing reads the teacher.
      targets: the languages to align.
      where: the file or files, which errors begin with.

    Raises:
      UserError: no query is left in one of the languages.
    """
    needed = () if source is None else (source,)
    require_languages(queries, (*needed, *targets), where)
    chosen = tuple(
        query
        for query in queries
        if all(language in query.texts for language in needed) and any(language in query.texts for language in targets)
    )
    if missing := [language for language in targets if all(language not in query.texts for query in chosen)]:
        raise UserError(
            f"{where}: no record has texts both in {source}, which the teacher reads, and in {', '.join(missing)}; add "
            "the missing texts, or configure other languages"
        )
    return chosen


def describe(queries: Sequence[Query], languages: Iterable[str]) -> str:
    """How many queries there are by label and language: "112 harmful, 160 harmless in sw, bn".

    Where fewer than half lack a language, that is a gap rather than a part in other languages, and the first is named.
    """
    by_count: dict[tuple[str, str], list[str]] = {}
    for language in languages:
        labels = collections.Counter(query.harmful for query in queries if language in query.texts)
        count = ", ".join(f"{labels[label]} {name}" for label, name in LABEL_NAMES.items() if labels[label])
        others = [query.id for query in queries if language not in query.texts]
        gap = ""
        if others and 2 * len(others) < len(queries):  # repr escapes what in an id could steer a terminal
            gap = f" (absent in {len(others)} of {len(queries)} records, first: id {others[0]!r})"
        by_count.setdefault((count, gap), []).append(language)
    return "; ".join(f"{count} in {', '.join(codes)}{gap}" for (count, gap), codes in by_count.items())


def parse(record: Any, where: str) -> Query:
    """A record from its JSON object.

    Args:
      record: what the JSON parser gave, or a table's row in the same shape.
      where: file and line, which errors begin with.

    Raises:
      UserError: the object is not a record; one message that says what to change.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: a record is an object {{...}}, not {reprlib.repr(record)}")
    for key in record:
        if key not in _FIELDS:
            raise UserError(f"{where}: unknown key {key!r}; a record has {', '.join(_FIELDS)}")
    for key, (kind, expected) in _FIELDS.items():
        if key in record and not isinstance(record[key], kind):
            raise UserError(f"{where}: {key!r} must be {expected}, not {reprlib.repr(record[key])}")
        if key in _REQUIRED and not record.get(key):
            raise UserError(f"{where}: {key!r} is missing or empty; it must be {expected}")
    where += f" (id {record['id']!r})"
    _check_texts(record["texts"], f"{where}: the text")
    answers = record.get("answers", {})
    _check_texts(answers, f"{where}: the answer", record["texts"])
    return Query(record["id"], record.get("harmful"), record.get("category", ""), record["texts"], answers)


def _check_texts(texts: dict[str, Any], what: str, languages: Collection[str] | None = None) -> None:
    for language, text in texts.items():
        if languages is not None and language not in languages:
            raise UserError(f"{what} in {language!r} belongs to no text; add the text, or remove the answer")
        try:
            language_name(language)
        except UserError as error:
            raise UserError(f"{what}'s language: {error}") from None
        if not isinstance(text, str):
            raise UserError(f"{what} in {language!r} must be a string, not {reprlib.repr(text)}")
        if not text.strip():
            raise UserError(f"{what} in {language!r} is empty; fill it in, or remove it")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a pair, which no tokenizer takes
            raise UserError(
                f"{what} in {language!r} has half a surrogate pair at character {error.start}; correct the text"
            ) from None

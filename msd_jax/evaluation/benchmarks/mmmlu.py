"""MMMLU: MMLU's questions (arXiv 2009.03300), translated by people into fourteen languages; answered by letter."""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from msd_jax.data.records import Query
from msd_jax.errors import UserError
from msd_jax.evaluation.benchmarks import tables
from msd_jax.io.console import log

LETTERS = "ABCD"
# As in OpenAI's simple-evals, from which the set comes, the frame is English in every language; the wording is ours.
QUESTION = """\
Here is a question with four possible answers. One of them is right: reply with its letter, and nothing else.

{question}

{options}"""
_LANGUAGES = ("ar", "bn", "de", "en", "es", "fr", "hi", "id", "it", "ja", "ko", "pt", "sw", "yo", "zh")
_COLUMNS = ("question", "a", "b", "c", "d", "answer", "subject")
_INDEX = ("", "unnamed: 0", "index", "id")  # names of the column that numbers the questions


def text(question: str, options: tuple[str, ...]) -> str:
    """The user's message: the question, then one option per line, each behind its letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return QUESTION.format(question=question, options="\n".join(lines))


def read_mmmlu(path: pathlib.Path) -> tuple[Query, ...]:
    """Questions as prompts, with the right letter as the answer; the same id is the same question in each language.

    Files are mmlu_SW-KE.csv and so on (of openai/MMMLU; in any subdirectory, "-" or "_" before the region) with an
    unnamed column that numbers the rows, Question, A, B, C, D, Answer and Subject. The set has no English: that is
    mmlu.csv or mmlu_EN-US.csv of simple-evals, which look the same, or the original's all/test-*.parquet (cais/mmlu).
    Questions without a text are skipped and counted.

    Args:
      path: such a file, or a directory of them.
    """
    merged: dict[str, Query] = {}
    for file in tables.find(path, "mmlu_*.csv", "mmlu.csv", "all/test-*.parquet"):
        language, empty, seen = _language(file), 0, set()
        for row, (where, cells) in enumerate(_parquet(file) if file.suffix == ".parquet" else _csv(file)):
            key = str(cells.get("index") or row)
            if key in seen:
                raise UserError(f"{where}: question {key} occurs twice; give each row its own number")
            seen.add(key)
            if cells["answer"] not in tuple(LETTERS):
                raise UserError(f"{where}: the answer is {cells['answer']!r}; it must be one of A, B, C and D")
            if not cells["question"] or not any(cells["options"]):
                empty += 1
                continue
            query = merged.setdefault(key, Query(key, False, cells["subject"], {}))
            if language in query.texts:
                raise UserError(f"{file}: there is another file in {language!r}; remove one of them")
            query.texts[language] = text(cells["question"], cells["options"])
            query.answers[language] = cells["answer"]
        if not seen:
            raise UserError(f"{file}: it holds no questions")
        if empty:
            log(f"mmmlu: {empty} of {len(seen)} questions in {language} skipped: they have no text")
    return tuple(merged.values())


def _language(file: pathlib.Path) -> str:
    """The language of mmlu_SW-KE.csv: sw. A file that names none is the original, in English."""
    code = re.fullmatch(r"mmlu_([A-Za-z]{2})([-_][A-Za-z]{2})?", file.stem)
    if not code:
        if file.stem.startswith("mmlu_"):
            raise UserError(f"{file}: the name must end in a language and region, as in mmlu_SW-KE.csv")
        return "en"
    if (language := code[1].lower()) not in _LANGUAGES:
        raise UserError(f"{file}: MMMLU has no language {language!r}; it has {', '.join(_LANGUAGES)}")
    return language


def _csv(file: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, cells) of each question."""
    header, *rows = tables.csv_rows(file) or [[]]
    columns = {name.strip().lower(): i for i, name in enumerate(header)}
    if missing := [name for name in _COLUMNS if name not in columns]:
        raise UserError(
            f"{file}: it has no column {' and no '.join(missing)}, only {', '.join(header) or 'no columns'}"
        )
    index = next((columns[name] for name in _INDEX if name in columns), None)
    for number, row in enumerate(rows, start=2):
        if not any(row):
            continue
        where = f"{file}, row {number}"
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} cells under {len(header)} columns; quote cells that hold a comma")
        cell = {name: row[columns[name]].strip() for name in _COLUMNS}
        yield (
            where,
            {
                "index": None if index is None else row[index].strip().removesuffix(".0"),
                "question": cell["question"],
                "options": tuple(cell[letter.lower()] for letter in LETTERS),
                "answer": cell["answer"].upper(),
                "subject": cell["subject"],
            },
        )


def _parquet(file: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, cells) of each question of cais/mmlu; its answers are numbers from 0."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file, columns=["question", "choices", "answer", "subject"]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a table of MMLU ({str(error).splitlines()[0]})") from None
    for number, row in enumerate(rows):
        where = f"{file}, row {number}"
        if len(row["choices"] or ()) != len(LETTERS):
            raise UserError(f"{where}: {len(row['choices'] or ())} choices; there must be {len(LETTERS)}")
        answer = row["answer"]
        yield (
            where,
            {
                "question": row["question"].strip(),
                "options": tuple(choice.strip() for choice in row["choices"]),
                "answer": LETTERS[answer] if answer in range(len(LETTERS)) else answer,
                "subject": row["subject"],
            },
        )

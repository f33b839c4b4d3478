"""Files of records: JSONL, CSV and Parquet, on this machine or on the Hugging Face hub."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msd_jax.data import hub, tables
from msd_jax.data.records import Query, labelled, parse
from msd_jax.errors import UserError, UserFileError
from msd_jax.io.text import read_text

_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}(-[0-9a-f]{16})?")


def read(path: str | os.PathLike, *, harmful: str = "file", key: str = "config.data.path") -> tuple[Query, ...]:
    """Reads query files, in their order.

    JSONL (UTF-8, one object a line; `harmful`, `category` and `answers` are optional):

        {"id": "1", "harmful": false, "category": "food", "texts": {"en": "...", "sw": "..."}, "answers": {"en": "..."}}

    CSV (UTF-8, comma-separated), as MultiJail (arXiv 2310.06474) has it: columns `id`, `harmful` (true/false/1/0, empty
    for unknown), `tags` or `category`, `source` (ignored), and one column per language, named by its code. `id` is the
    record's id, so Indonesian is `text:id`, as any language may be written `text:CODE`. `answer:CODE` holds reference
    answers, empty where there is none.

    Parquet: the columns of CSV, or the fields of JSONL.

    Args:
      path: see `locate`.
      harmful: the label of records without one: "file" leaves it unknown, "true" or "false" sets it.
      key: the setting that errors about `path` name.

    Raises:
      UserError: one message that names the file, the line and what to change.
    """
    queries: list[Query] = []
    places: dict[str, tuple[pathlib.Path, int]] = {}
    for file in locate(path, key):
        for line, record in _READERS[file.suffix.lower()](file):
            query = parse(record, f"{file}, line {line}")
            if query.id in places:
                first, first_line = places[query.id]
                raise UserError(
                    f"{file}, line {line}: id {query.id!r} is already on line {first_line}"
                    + (f" of {first}" if first != file else "")
                    + "; ids must be unique"
                )
            places[query.id] = file, line
            queries.append(query)
    if not queries:
        raise UserError(f"{path}: there are no records in it")
    return labelled(queries, harmful)


def locate(path: str | os.PathLike, key: str = "config.data.path") -> list[pathlib.Path]:
    """The query files that a path names, on this machine.

    Args:
      path: a file; a directory with one query file, which may be in numbered parts (NAME-00000-of-00002.parquet);
        several files, by wildcards in the last part of the path (data/train-*.csv); or any of these on the hub, see
        hub.fetch.
      key: the setting that errors name.

    Raises:
      UserError: one message that says what to write.
    """
    given = str(path)
    if not given:
        raise UserError(f"{key} is empty: name a query file that ends in {_SUFFIXES}")
    wanted = [f"*{suffix}" for suffix in _READERS]
    place = hub.fetch(given, wanted, key) if hub.is_uri(given) else pathlib.Path(given).expanduser()
    if place.is_dir():
        return _only_file(place, given)
    files = sorted(place.parent.glob(place.name)) if "*" in place.name else [place]
    for file in files:
        if file.suffix.lower() not in _READERS:
            raise UserError(f"{file}: a query file ends in {_SUFFIXES}, not in {file.suffix!r}")
    if not files or not all(file.is_file() for file in files):
        raise UserFileError(f"{key}={place}: there is no such query file")
    return files


def _only_file(directory: pathlib.Path, given: str) -> list[pathlib.Path]:
    """The directory's one query file, or its numbered parts."""
    files = sorted(file for file in directory.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
    if not files:
        raise UserFileError(f"{given}: there is no query file ({_SUFFIXES}) in this directory")
    parts = [(file.parent, match[1]) for file in files if (match := _SHARD.fullmatch(file.stem))]
    if len(files) > 1 and not (len(parts) == len(files) and len(set(parts)) == 1):
        names = ", ".join(str(file.relative_to(directory)) for file in files[:10])
        raise UserError(f"{given}: {len(files)} query files are in this directory ({names}); name one, or use *")
    return files


def write_jsonl(path: str | os.PathLike, queries: Iterable[Query]) -> None:
    """Writes a file from which `read` gets equal records; an existing file is replaced once all is written."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for query in queries:
            record = {key: value for key, value in dataclasses.asdict(query).items() if value not in (None, "", {})}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, JSON value)."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # splitlines() also splits at U+2028, in texts
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}, column {error.colno}: malformed JSON ({error.msg}); write one object per line"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"key {twice!r} is there twice; keep one")
    return record


_READERS: dict[str, Callable[[pathlib.Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": tables.read_csv,
    ".parquet": tables.read_parquet,
}
*_FIRST, _LAST = _READERS
_SUFFIXES = f"{', '.join(_FIRST)} or {_LAST}"

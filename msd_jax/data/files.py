"""The files that hold records: JSONL; CSV and Parquet with one column a language; here or on the Hugging Face hub."""

import csv
import dataclasses
import io
import json
import os
import pathlib
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from msd_jax.data import hub
from msd_jax.data.records import Query, language_name, parse
from msd_jax.errors import UserError, UserFileError

# Columns of a table that are not languages, and the record's field that they fill. MultiJail's `source` says who
# collected a query, which nothing here asks for.
_METADATA = {"id": "id", "harmful": "harmful", "category": "category", "tags": "category", "source": "source"}
_PREFIXES = {"": "texts", "text": "texts", "answer": "answers"}
_HARMFUL = {"true": True, "1": True, "false": False, "0": False, "": None}
LABELS = {"file": None, "true": True, "false": False}
_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}(-[0-9a-f]{16})?")


def read(path: str | os.PathLike, *, harmful: str = "file", key: str = "config.data.path") -> tuple[Query, ...]:
    """Reads query files, in their order.

    JSONL (UTF-8, one object a line; `harmful`, `category` and `answers` may be absent):

        {"id": "1", "harmful": false, "category": "food", "texts": {"en": "...", "sw": "..."}, "answers": {"en": "..."}}

    CSV (UTF-8, comma-separated), as MultiJail (arXiv 2310.06474) has it: columns `id`, `harmful` (true/false/1/0, empty
    for unknown), `tags` or `category`, `source` (ignored), and one column a language named by its code. `id` is the
    record's id, so Indonesian is `text:id`, as any language may be written `text:CODE`. `answer:CODE` holds reference
    answers, empty where there is none.

    Parquet: the columns of CSV, or the fields of JSONL.

    Args:
      path: see `locate`; or a TFDS set as tfds://NAME[/CONFIG]:VERSION[/SPLIT][?data_dir=DIR].
      harmful: label of the records that carry none: "file" leaves it unknown, "true" or "false".
      key: the setting that errors about `path` name.

    Raises:
      UserError: one message that names the file, the line and what to mend.
    """
    if harmful not in LABELS:
        raise UserError(f"harmful={harmful!r}: choose one of {', '.join(LABELS)}")
    if str(path).startswith("tfds://"):
        from msd_jax.data import parallel_queries

        return labelled(parallel_queries.read_uri(str(path), key), harmful)
    queries, places = [], {}
    for file in locate(path, key):
        for line, record in _READERS[file.suffix.lower()](file):
            query = parse(record, f"{file}, line {line}")
            if query.id in places:
                first, first_line = places[query.id]
                raise UserError(
                    f"{file}, line {line}: id {query.id!r} is already on line {first_line}"
                    + (f" of {first}" if first != file else "")
                    + "; give each record its own"
                )
            places[query.id] = file, line
            queries.append(query)
    if not queries:
        raise UserError(f"{path}: there are no records in it")
    return labelled(queries, harmful)


def labelled(queries: Iterable[Query], harmful: str) -> tuple[Query, ...]:
    """`queries` with the label for those that carry none: "file" leaves it unknown, "true" or "false"."""
    return tuple(
        query if query.harmful is not None else dataclasses.replace(query, harmful=LABELS[harmful]) for query in queries
    )


def locate(path: str | os.PathLike, key: str = "config.data.path") -> list[pathlib.Path]:
    """The query files that a path names, on this machine.

    Args:
      path: a file; a folder with one query file, which may be in numbered parts (NAME-00000-of-00002.parquet); several
        files by wildcards in the last part (data/train-*.csv); or any of these on the hub, see hub.fetch.
      key: the setting that errors name.

    Raises:
      UserError: one message that says what to write.
    """
    suffixes = f"{', '.join([*_READERS][:-1])} or {[*_READERS][-1]}"
    if not str(path):
        raise UserError(f"{key} is empty: name a query file that ends in {suffixes}")
    given = path
    wanted = [f"*{suffix}" for suffix in _READERS]
    path = hub.fetch(str(path), wanted, key) if hub.is_uri(path) else pathlib.Path(path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file())
        if not files:
            raise UserFileError(f"{given}: there is no query file ({suffixes}) in this folder")
        parts = [_SHARD.fullmatch(file.stem) for file in files]
        if len(files) > 1 and not (all(parts) and len({(f.parent, p[1]) for f, p in zip(files, parts)}) == 1):
            names = ", ".join(str(file.relative_to(path)) for file in files[:10])
            raise UserError(f"{given}: {len(files)} query files are in this folder ({names}); name one, or use *")
        return files
    files = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    for file in files:
        if file.suffix.lower() not in _READERS:
            raise UserError(f"{file}: a query file ends in {suffixes}, not in {file.suffix!r}")
    if not files or not all(file.is_file() for file in files):
        raise UserFileError(f"{path}: there is no such query file")
    return files


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
        raise UserError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8; save the file "
            "as UTF-8"
        ) from None


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """Yields (line, JSON value)."""
    for number, line in enumerate(_decode(path).split("\n"), start=1):  # splitlines() also splits at U+2028, in texts
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_without_duplicates)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}, column {error.colno}: malformed JSON ({error.msg}); write one object a line"
            ) from None
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"key {twice!r} is there twice; keep one")
    return record


def _read_csv(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, record in the shape of a JSONL one)."""
    rows = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
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
            if len(row) != len(columns):
                raise UserError(
                    f"{path}, line {line}: {len(row)} cells under {len(columns)} columns; quote cells that contain a "
                    "comma"
                )
            yield line, _from_cells(columns, row, f"{path}, line {line}")
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: malformed CSV ({error})") from None


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row counted from 1, record in the shape of a JSONL one)."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist(maps_as_pydicts="strict")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from None
    columns = None
    for number, row in enumerate(rows, start=1):
        if "texts" in row:  # a missing field is null there
            yield number, _without_nulls(row)
            continue
        columns = columns or _columns(path, list(row))
        cells = [
            "" if cell is None else str(cell).lower() if isinstance(cell, bool) else str(cell) for cell in row.values()
        ]
        yield number, _from_cells(columns, cells, f"{path}, line {number}")


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(item) if isinstance(item, dict) else item for key, item in value.items() if item is not None
    }


_READERS = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


def _from_cells(columns: list[tuple[str, str | None]], cells: list[str], where: str) -> dict[str, Any]:
    """A row of a table in the shape of a JSONL record."""
    record: dict[str, Any] = {"texts": {}, "answers": {}}
    for (field, language), cell in zip(columns, cells):
        if field == "harmful":
            if cell.strip().lower() not in _HARMFUL:
                raise UserError(f"{where}: harmful={reprlib.repr(cell)} must be true, false, 1, 0 or empty")
            record[field] = _HARMFUL[cell.strip().lower()]
        elif field == "answers":
            if cell.strip():
                record[field][language] = cell
        elif field == "texts":
            record[field][language] = cell
        elif field != "source":
            record[field] = cell
    return record


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
            raise UserError(
                f"{path}: column {name!r} is neither a language's code nor one of {', '.join(_METADATA)}; name it as "
                "in sw, text:sw or answer:sw, or take it out"
            )
        if column in columns:
            raise UserError(f"{path}: column {name!r} says the same as {header[columns.index(column)]!r}; keep one")
        columns.append(column)
    if ("id", None) not in columns:
        raise UserError(f"{path}: there is no column 'id'; it has {', '.join(header)}")
    if not any(field == "texts" for field, _ in columns):
        raise UserError(f"{path}: no column is a language; it has {', '.join(header)}")
    return columns


def _is_language(code: str) -> bool:
    try:
        return bool(language_name(code))
    except ValueError:
        return False

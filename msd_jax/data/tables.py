"""Tables of records, CSV or Parquet, with one column per language."""

import csv
import io
import pathlib
import reprlib
from collections.abc import Iterator
from typing import Any

from msd_jax.data.records import is_language
from msd_jax.errors import UserError
from msd_jax.io.text import read_text

# Columns that are not languages, and the record's field that each fills. MultiJail's `source` says who collected a
# query, which nothing here asks for.
_METADATA = {"id": "id", "harmful": "harmful", "category": "category", "tags": "category", "source": "source"}
_PREFIXES = {"": "texts", "text": "texts", "answer": "answers"}
_HARMFUL = {"true": True, "1": True, "false": False, "0": False, "": None}
_Column = tuple[str, str | None]  # the field it fills, and its language


def read_csv(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, record in the shape of JSONL's)."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    columns: list[_Column] = []
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


def read_parquet(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row counted from 1, record in the shape of JSONL's)."""
    import pyarrow  # here, for the other formats do without
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


def _from_cells(columns: list[_Column], cells: list[str], where: str) -> dict[str, Any]:
    """A row of a table, as a record in the shape of JSONL's."""
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


def _columns(path: pathlib.Path, header: list[str]) -> list[_Column]:
    """What each column of `header` holds."""
    columns: list[_Column] = []
    for name in header:
        prefix, _, code = name.rpartition(":")
        if name in _METADATA:
            column: _Column = (_METADATA[name], None)
        elif prefix in _PREFIXES and is_language(code):
            column = (_PREFIXES[prefix], code)
        else:
            raise UserError(
                f"{path}: column {name!r} is neither a language's code nor one of {', '.join(_METADATA)}; rename it "
                "(sw, text:sw, answer:sw), or remove it"
            )
        if column in columns:
            raise UserError(f"{path}: column {name!r} says the same as {header[columns.index(column)]!r}; keep one")
        columns.append(column)
    if ("id", None) not in columns:
        raise UserError(f"{path}: there is no column 'id'; it has {', '.join(header)}")
    if not any(field == "texts" for field, _ in columns):
        raise UserError(f"{path}: no column is a language; it has {', '.join(header)}")
    return columns

"""Tables of records, CSV or Parquet, with one column per language."""

import csv
import io
import pathlib
import reprlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from msd_jax.data.records import is_language
from msd_jax.errors import UserError
from msd_jax.io.text import read_text

# Columns that are not languages, and the record's field that each fills. MultiJail's `source` says who collected a
# query, which nothing here asks for.
_METADATA = {"id": "id", "harmful": "harmful", "category": "category", "tags": "category", "source": "source"}
_PREFIXES = {"": "texts", "text": "texts", "answer": "answers"}
# What becomes of pandas' row numbers: a first column without a name in CSV, a last one in Parquet.
_UNNAMED, _INDEX = ("", "Unnamed: 0"), "__index_level_0__"
# Columns of 0 and 1 with gaps become floats in pandas.
_HARMFUL = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": None}


class _Column(NamedTuple):
    """The record's field that a column fills ("source" and "index": none), and the language."""

    field: str
    language: str | None = None


def read_csv(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, record in the shape of JSONL's); cells are separated as in the header, by comma, semicolon or tab.

    Blank rows are skipped, and so are blank cells behind the last column.
    """
    text = read_text(path)
    delimiter = _delimiter(text)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[_Column] = []
    end = 0
    try:
        for row in rows:
            line, end = end + 1, rows.line_num  # a quoted cell may span lines
            cells = _without_blank_end(row, len(columns))
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _columns(path, cells)
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}, line {line}: {len(cells)} cells under {len(columns)} columns; quote cells that contain "
                    f"{delimiter!r}"
                )
            yield line, _from_cells(columns, cells, f"{path}, line {line}")
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: malformed CSV ({error})") from None


def _delimiter(text: str) -> str:
    """The separator that the header has most of; none of its names contains one."""
    header = text.lstrip().partition("\n")[0]
    return max(",;\t", key=header.count)


def _without_blank_end(cells: list[str], least: int) -> list[str]:
    """`cells` without the blank ones at the end, but `least` of them: some programs end each line in a separator."""
    while len(cells) > least and not cells[-1].strip():
        cells = cells[:-1]
    return cells


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
        yield number, _from_cells(columns, [_cell(value) for value in row.values()], f"{path}, line {number}")


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(item) if isinstance(item, dict) else item for key, item in value.items() if item is not None
    }


def _cell(value: Any) -> str:
    """A value of a Parquet table as CSV would have it."""
    if value is None or value != value:  # null, or NaN as pandas writes it
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _from_cells(columns: Sequence[_Column], cells: Sequence[str], where: str) -> dict[str, Any]:
    """A row of a table, as a record in the shape of JSONL's. A language whose text is blank is left out."""
    record: dict[str, Any] = {"texts": {}, "answers": {}}
    blank = set()
    for (field, language), cell in zip(columns, cells, strict=True):
        if field == "index":
            if not cell.strip().isdecimal():
                raise UserError(f"{where}: the first column has no name, and {reprlib.repr(cell)} is not a row number")
            record.setdefault("id", cell.strip())  # which a column `id` replaces
        elif field == "harmful":
            if cell.strip().lower() not in _HARMFUL:
                raise UserError(f"{where}: harmful={reprlib.repr(cell)} must be true, false, 1, 0 or empty")
            record[field] = _HARMFUL[cell.strip().lower()]
        elif field in ("texts", "answers"):
            if cell.strip():
                record[field][language] = cell
            elif field == "texts":
                blank.add(language)
        elif field != "source":
            record[field] = cell
    record["answers"] = {code: answer for code, answer in record["answers"].items() if code not in blank}
    return record


def _columns(path: pathlib.Path, header: Sequence[str]) -> list[_Column]:
    """What each column of `header` holds."""
    columns: list[_Column] = []
    for name in map(str.strip, header):
        prefix, _, code = name.rpartition(":")
        if name == _INDEX or (name in _UNNAMED and not columns):
            column = _Column("index")
        elif name in _METADATA:
            column = _Column(_METADATA[name])
        elif prefix in _PREFIXES and is_language(code):
            column = _Column(_PREFIXES[prefix], code)
        else:
            raise UserError(
                f"{path}: column {name!r} is neither a language's code nor one of {', '.join(_METADATA)}; rename it "
                "(sw, text:sw, answer:sw), or remove it"
            )
        if column in columns:
            raise UserError(f"{path}: column {name!r} says the same as {header[columns.index(column)]!r}; keep one")
        columns.append(column)
    fields = {column.field for column in columns}
    if not fields & {"id", "index"}:
        raise UserError(f"{path}: there is no column 'id'; it has {', '.join(header)}")
    if "texts" not in fields:
        raise UserError(f"{path}: no column is a language; it has {', '.join(header)}")
    return columns

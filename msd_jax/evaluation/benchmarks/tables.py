"""Benchmark files: found in a directory, decoded, split into rows; errors name file and line."""

import csv
import io
import pathlib

from msd_jax.errors import UserError, UserFileError
from msd_jax.io.text import read_text


def find(path: pathlib.Path, *patterns: str) -> list[pathlib.Path]:
    """`path` itself if it is a file, else the files below it that match one of `patterns`, sorted.

    Raises:
      UserFileError: there are none.
    """
    if path.is_file():
        return [path]
    found = sorted({file for pattern in patterns for file in path.rglob(pattern)})
    if not found:
        raise UserFileError(f"{path}: it holds no {' or '.join(patterns)}")
    return found


def csv_rows(path: pathlib.Path) -> list[list[str]]:
    """All rows of a CSV file, including empty ones. Raises UserError where it is malformed."""
    try:
        return list(csv.reader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: malformed CSV ({error})") from None


def xlsx_rows(path: pathlib.Path) -> list[list[str]]:
    """All rows of a workbook's first sheet, cells as text. Raises UserError where it cannot be read."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(f"{path} is a workbook, which needs openpyxl: pip install 'msd-jax[xlsx]'") from None

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        return [["" if cell is None else str(cell) for cell in row] for row in book.worksheets[0].values]
    except Exception as error:  # of zipfile, xml or openpyxl
        raise UserError(f"{path}: not an xlsx workbook ({type(error).__name__}: {error})") from None

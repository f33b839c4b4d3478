"""JSON Lines files, and text files that are replaced whole. Process 0 alone writes."""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from msd_jax.errors import UserError
from msd_jax.parallel import distributed

Row = dict[str, Any]


class JsonLines:
    """A file of JSON objects, one per line. An interruption costs the last line at most."""

    def __init__(self, path: pathlib.Path):
        """Opens `path`, or begins it with the first row; a last line that was cut short is removed."""
        self._path = path
        if distributed.is_first() and path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def read(self) -> list[Row]:
        """All rows, the same on every process, each of which must call this.

        Raises:
          UserError: a line is damaged.
        """
        return distributed.from_first(lambda: read(self._path))

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows, on disk when this returns."""
        if distributed.is_first():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_lines(rows))
                file.flush()
                os.fsync(file.fileno())

    def replace(self, rows: Iterable[Row]) -> None:
        """Writes the file anew: all of `rows`, or what was there before."""
        if distributed.is_first():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._path, _lines(rows))


def read(path: pathlib.Path) -> list[Row]:
    """All rows of the file; [] if there is none. A last line cut short by a kill is left out.

    Raises:
      UserError: a line is damaged; the message names it.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # a whole line ends in a newline
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise UserError(
                f"{path}, line {number} is damaged ({error}); remove that line to lose only what it holds, or the "
                "whole file, which is then made anew"
            ) from None
        rows.append(row)
    return rows


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

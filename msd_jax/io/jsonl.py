"""JSON Lines files, and text files that are replaced whole. Process 0 alone writes."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from msd_jax.errors import UserError, UserFileError
from msd_jax.io.retries import retried
from msd_jax.parallel import distributed, peers

Row = dict[str, Any]


class JsonLines:
    """A file of JSON objects, one per line. An interruption costs the last line at most."""

    def __init__(self, path: pathlib.Path):
        """Opens `path`, or begins it with the first row; a last line that was cut short is removed."""
        self._path = path
        if distributed.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)  # here alone: a workdir removed later is not made anew
            if path.exists():
                with path.open("rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)

    def read(self, **columns: type) -> list[Row]:
        """All rows, the same on every process, each of which must call this; `columns` as in `read` below.

        Raises:
          UserError: a line is damaged.
        """
        return distributed.from_first(lambda: read(self._path, **columns))

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows, on disk when this returns.

        Raises:
          UserFileError: they cannot be written.
        """
        peers.moved()
        if distributed.is_first():
            with could_be_written(self._path):
                size = self._path.stat().st_size if self._path.exists() else 0
                text = _lines(rows)
                retried(lambda: self._append(size, text))

    def _append(self, size: int, text: str) -> None:
        """Writes `text` at `size`, over what a try that failed left there."""
        with self._path.open("r+b" if size else "wb") as file:
            file.truncate(size)
            file.seek(size)
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def replace(self, rows: Iterable[Row]) -> None:
        """Writes the file anew: all of `rows`, or what was there before."""
        if distributed.is_first():
            with could_be_written(self._path):
                replace_text(self._path, _lines(rows))


def read(path: pathlib.Path, **columns: type) -> list[Row]:
    """All rows of the file; [] if there is none. A last line cut short by a kill is left out.

    Args:
      path: of the file.
      **columns: what every row must have, by name and type.

    Raises:
      UserError: a line is damaged; the message names it.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(
        retried(path.read_bytes).split(b"\n")[:-1], start=1
    ):  # a whole line ends in a newline
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            for name, kind in columns.items():
                if not isinstance(row.get(name), kind):
                    raise ValueError(f"{name!r} is not of type {kind.__name__}")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is damaged ({error}); remove that line to lose only what it holds, or the "
                "whole file, which is then made anew"
            ) from None
        rows.append(row)
    return rows


def read_object(path: pathlib.Path, otherwise: str = "checkpoints keep a copy of what it says") -> Row:
    """The JSON object that a file holds; {} if there is no file.

    Args:
      path: of the file.
      otherwise: where what it holds comes from if it is removed, for the message.

    Raises:
      UserError: the file is damaged; the message names it.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(retried(path.read_bytes))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it: it is written anew, and {otherwise}") from None
    return value


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")

    def write() -> None:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)

    retried(write)


@contextlib.contextmanager
def could_be_written(path: pathlib.Path) -> Iterator[None]:
    """Around writing to `path`: what the operating system says becomes a UserFileError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserFileError(f"{path} could not be written: {error.strerror or error}") from error


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

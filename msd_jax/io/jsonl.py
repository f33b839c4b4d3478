"""Files of JSON objects, one a line. Process 0 alone writes."""

import json
import os
import pathlib
from typing import Any

from msd_jax.parallel import distributed


class JsonLines:
    """A file of JSON objects, one a line, each with its step."""

    def __init__(self, path: pathlib.Path, resume_step: int):
        """Opens `path`, dropping what an interrupted run wrote after `resume_step` (it is computed again)."""
        self._path = path
        kept = [line for line in read_json_lines(path) if line["step"] <= resume_step]
        replace_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values, ensure_ascii=False) + "\n")


class Log:
    """An append-only file of JSON objects, one a line, of which an interruption costs the last line at most.

    Attributes:
      rows: all objects, the same on every process.
    """

    def __init__(self, path: pathlib.Path):
        """Opens `path`, or begins it. Raises ValueError where it is damaged before its last line."""
        self._path = path
        self.rows: list[dict[str, Any]] = distributed.from_first(lambda: read_json_lines(path))
        if distributed.is_first() and path.exists():
            with path.open("rb+") as file:  # what follows a line cut short would be lost with it
                file.truncate(file.read().rfind(b"\n") + 1)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows, on disk when this returns. Process 0 writes."""
        self.rows += rows
        if distributed.is_first():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())


def read_json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """All objects of the file; [] where there is none. A last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # a whole line ends in a newline; the rest was cut short
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and what it holds is made anew") from None


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)

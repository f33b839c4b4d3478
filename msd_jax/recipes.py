"""Recipes by name: `--config quickstart` from any directory, `--config qwen2_5_7b:lora` with a recipe's argument."""

import ast
import difflib
import pathlib
from collections.abc import Sequence

from msd_jax import configs
from msd_jax.errors import UserError


def directory() -> pathlib.Path:
    """Where the recipes are: configs/ of the repository, or of the installed package."""
    return pathlib.Path(configs.__path__[0])


def names() -> list[str]:
    files = [path for path in directory().glob("*.py") if "def get_config(" in path.read_text(encoding="utf-8")]
    return sorted(path.stem for path in files)


def resolve(argv: Sequence[str]) -> list[str]:
    """The command line with the file's path in place of a recipe's name after --config.

    Raises:
      UserError: there is neither a file nor a recipe of that name.
    """
    resolved, is_value = [], False
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if is_value:
            argument = _path(argument)
        elif flag in ("--config", "-config") and equals:
            argument = f"{flag}={_path(value)}"
        is_value = argument in ("--config", "-config")
        resolved.append(argument)
    return resolved


def _path(value: str) -> str:
    """A file as it is; what has neither a folder nor an ending is a recipe's name."""
    name, colon, argument = value.partition(":")
    if pathlib.Path(name).is_file() or pathlib.Path(name).name != name or name.endswith(".py"):
        return value
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names())}"
        raise UserError(f"--config={value}: neither a file nor a recipe; {hint}")
    return f"{directory() / name}.py{colon}{argument}"


def table() -> str:
    """Each recipe's name and its first line, and which of them have variants."""
    files = {name: directory() / f"{name}.py" for name in names()}
    varied = [name for name, file in files.items() if "def get_config(variant" in file.read_text(encoding="utf-8")]
    return "\n".join(
        [
            *(f"{name:14} {first_line(file)}" for name, file in files.items()),
            "",
            f"With the variants NAME:lora (adapters) and NAME:smoke (two steps, anywhere): {', '.join(varied)}",
        ]
    )


def first_line(file: str | pathlib.Path) -> str:
    """The first line of a Python file's docstring."""
    doc = ast.get_docstring(ast.parse(pathlib.Path(file).read_text(encoding="utf-8")))
    line = (doc or "").split("\n", 1)[0].removeprefix("What: ")
    line = line.partition(" (`")[0].rstrip(".") + "."
    return line[:1].upper() + line[1:]

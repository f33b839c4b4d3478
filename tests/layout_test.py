"""How the package is laid out: which wing may import which, and how long a file and a function may be."""

import ast
import graphlib
import pathlib
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "msd_jax"
COMMANDS = (
    *("main", "evaluate", "plan", "export", "prompts", "queries", "judges", "topology", "check", "lm_eval"),
    *("report.__main__", "command"),
    *("cli", "recipes"),  # what they share
)
# From the top down: a module imports from its own wing and from those below.
WINGS = (
    *("commands", "ablation", "settings", "configs", "report", "planning", "training", "evaluation", "testbed"),
    *("generation", "data", "models", "losses", "io", "parallel", "errors"),
)
# Functions that are mostly a table: of settings, or of the options that the loss takes.
TABLES = ("get_config", "per_token_loss", "dpsw_loss", "fused_dpsw_loss")
FILES = sorted(path for path in PACKAGE.rglob("*.py")) + sorted((REPOSITORY / "configs").glob("*.py"))


def module_name(path: pathlib.Path) -> str:
    """ "models.decoder" of msd_jax/models/decoder.py, "configs.default" of configs/default.py, "" of the package."""
    base = REPOSITORY if path.parent.name == "configs" else PACKAGE
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def wing(module: str) -> str:
    return "commands" if module in COMMANDS else module.partition(".")[0]


def imports(path: pathlib.Path) -> Iterator[str]:
    """Modules of this package that a file imports, anywhere in it: in functions and for annotations too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "msd_jax" or name.startswith("msd_jax."):
                inner = name.removeprefix("msd_jax").removeprefix(".")
                yield inner if inner in MODULES else inner.rpartition(".")[0]


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_only_descend(module):
    rank = WINGS.index(wing(module))
    for imported in imports(MODULES[module]):
        if imported:  # msd_jax itself holds the public names of losses, and no wing needs it
            assert WINGS.index(wing(imported)) >= rank, f"{module} imports {imported}, which is in a wing above"
        else:
            pytest.fail(f"{module} imports msd_jax itself")


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {other for other in imports(path) if other != module} for module, path in MODULES.items()}
    # A package's __init__ may gather its modules, which may then not import it.
    graphlib.TopologicalSorter(graph).prepare()


def test_the_losses_need_jax_alone():
    for path in (PACKAGE / "losses").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                assert top in ("jax", *sys.stdlib_module_names) or name.startswith("msd_jax.losses"), f"{path}: {name}"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("cli", "recipes")])
def test_a_command_is_flags_and_one_call(command):
    assert len(MODULES[command].read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    source = MODULES[module].read_text(encoding="utf-8")
    if module == "testbed.languages":  # sentences, no code
        return
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name not in TABLES:
            assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"


def test_the_docs_name_each_file_once():
    told = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8").partition("## One query")[2]
    for path in PACKAGE.rglob("*.py"):
        if not path.name.startswith("__"):
            name = path.name if path.parent.parent.name == "evaluation" else str(path.relative_to(PACKAGE))
            assert told.count(f"`{name}`") == 1, f"docs/architecture.md must name {name} once"

"""The command `msd-jax`: each of its commands is the module of this package that `python -m msd_jax.NAME` runs, too."""

import importlib.util
import runpy
import sys

from msd_jax import recipes

COMMANDS = {
    "train": "main",
    "evaluate": "evaluate",
    "report": "report",
    "export": "export",
    "plan": "plan",
    "prompts": "prompts",
    "queries": "queries",
    "judge": "judges",
    "topology": "topology",
    "check": "check",
    "lm-eval": "lm_eval",
}

_OUTPUT = (
    "Results go to the directory --out (of train: --workdir), which nothing is overwritten in: what was interrupted",
    "is resumed, what is finished is refused. A report is made anew. --json names a file.",
)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"msd-jax {name}", *sys.argv[2:]]
        runpy.run_module(f"msd_jax.{COMMANDS[name]}", run_name="__main__", alter_sys=True)
    elif name == "recipes":
        print(recipes.table())
    elif name in ("-h", "--help", "help"):
        print(usage())
    else:
        sys.exit(f"error: msd-jax {name}: there is no such command; they are {', '.join([*COMMANDS, 'recipes'])}")


def usage() -> str:
    lines = ["usage: msd-jax COMMAND [flags]; msd-jax COMMAND --help", ""]
    for name, module in COMMANDS.items():
        lines.append(f"  {name:10} {_summary(module)}")
    lines.append(f"  {'recipes':10} Lists the recipes that --config takes by name.")
    return "\n".join([*lines, "", *_OUTPUT])


def _summary(module: str) -> str:
    """The first line of a command's docstring, without running it."""
    spec = importlib.util.find_spec(f"msd_jax.{module}")
    assert spec and spec.origin
    return recipes.first_line(spec.origin)


if __name__ == "__main__":
    main()

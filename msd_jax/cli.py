"""What the commands share: the --config flag, errors in one line, and no traceback for a mistake of the user."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from msd_jax import settings
from msd_jax.errors import UserError
from msd_jax.parallel import distributed

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is as it should be

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, or your own.", lock_config=True)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Around a command's set-up: what a user can mend ends the process with exit code 1 and one line.

    Beside our own errors that is whatever the operating system says of a file.
    """
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def config() -> ml_collections.ConfigDict:
    """The config of the command line, checked and frozen. Raises UserError where it does not load or is at fault."""
    try:
        loaded = ml_collections.FrozenConfigDict(_CONFIG.value)
    except Exception as error:  # whatever the code in a config file may raise
        path = config_flags.get_config_filename(FLAGS["config"])
        raise UserError(f"--config={path} does not load: {str(error).strip().splitlines()[-1].strip()}") from error
    settings.check(loaded)
    return loaded


def run(main: Callable[[list[str]], None], *, alone: bool = False, **strings: str | None) -> None:
    """app.run with string flags `strings` ({name: default}; None: required) and one-line errors for all flags.

    The process joins the others of its run first, see distributed.py; `alone`: it never does.
    """
    for name, default in strings.items():
        flags.DEFINE_string(name, default, f"See the top of {sys.argv[0]}.", required=default is None)
    if FLAGS["config"].default is None:
        flags.mark_flag_as_required("config")

    def parse(argv: list[str]) -> list[str]:
        try:
            if not alone:
                distributed.start(argv)
            return FLAGS(argv)
        except Exception as error:  # a typo in a key, a wrong type, a config that is not there or does not load
            sys.exit(f"error: {_explain(error, argv)}")

    logging.set_verbosity(logging.WARNING)  # libraries are quiet; our own lines are printed

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except UserError as error:  # in the middle of a run; errors of JAX, Optax and Orbax keep their traceback
            distributed.end_in_error(f"error: {error}")

    with distributed.together():
        app.run(guarded, flags_parser=parse)


def _explain(error: Exception, argv: list[str]) -> str:
    """One line for what is wrong with the flags; ml_collections names a key without the flag it stands in."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    flag, *traceback = re.split(r"Error whilst parsing config file:\s*Traceback", str(error), maxsplit=1)
    if traceback:  # ml_collections hands on what get_config raised as a whole traceback
        return flag + re.sub(r"^\w+: ", "", traceback[0].strip().splitlines()[-1].strip())
    text = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
    unknown = re.match(r"'?(\w+)'?( Did you mean \"(\w+)\"|$)", text)
    if unknown:
        key, _, near = unknown.groups()
        for flag in argv:
            parents, found, rest = flag.partition(f".{key}")
            if flag.startswith("--config.") and found and rest[:1] in ("", "=", "."):
                hint = f"did you mean {parents.removeprefix('--')}.{near}?" if near else "see configs/default.py"
                return f"{flag}: there is no such key; {hint}"
    return text

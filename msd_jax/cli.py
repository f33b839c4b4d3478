"""What the commands share: the --config flag, and one-line errors without a traceback for mistakes of the user."""

import contextlib
import faulthandler
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from msd_jax import recipes, settings
from msd_jax.errors import UserError
from msd_jax.evaluation import rates
from msd_jax.io import places, stores
from msd_jax.parallel import distributed, peers
from msd_jax.settings import allowed
from msd_jax.training import former_keys

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not needed

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe's name (`msd-jax recipes`) or file, or a file of your own.", lock_config=True
)
_MAY_BE_STORED = ("workdir", "out", "checkpoint", "evaluation")  # flags whose value may be in an object store
_NO_PLACE = ("server", "model", "push_to_hub")  # text flags whose value names no place on this machine
_OVERRIDES = """
Every key of configs/default.py is a flag too:

  --config.train.steps=50 --config.model.path=HF_DIRECTORY_OR_HUB_ID
  --config.data.languages="{'sw': 1.0, 'bn': 2.0}"
  --config.eval.benchmarks="('multijail','mgsm')"
"""


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Ends the process with exit code 1 and one line for an error that the user can correct; for a command's set-up.

    Such errors are our own, and whatever the operating system reports about a file.
    """
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def config() -> ml_collections.ConfigDict:
    """The config of the command line, checked and frozen.

    Raises:
      UserError: it does not load, or has faults.
    """
    try:
        loaded = ml_collections.FrozenConfigDict(_CONFIG.value)
    except Exception as error:  # whatever the code in a config file may raise
        path = config_flags.get_config_filename(FLAGS["config"])
        raise UserError(f"--config={path} does not load: {str(error).strip().splitlines()[-1].strip()}") from error
    settings.check(loaded)
    peers.end_when_stalled(loaded.train.stall_limit)
    return loaded


def checkpoint() -> str:
    """The directory that --checkpoint names, as stores.checkpoint gives it; "" for none."""
    return stores.checkpoint("--checkpoint", FLAGS.checkpoint) if FLAGS.checkpoint else ""


def require_verdicts(*summaries: rates.Summary) -> None:
    """After everything is written: ends the process with exit code 3 where the judge of one gave no verdict at all."""
    if any(map(rates.without_verdict, summaries)):
        if distributed.is_first():
            print("error: the judge gave no verdict: attack success is unknown; see docs/judges.md", file=sys.stderr)
        sys.exit(3)


def run(main: Callable[[list[str]], None], *, alone: bool = False) -> None:
    """Parses the command line, with one-line errors, and runs `main`; --help prints the command's docstring and flags.

    Args:
      main: the command, of the module that runs as __main__; it gets what of the command line is not a flag.
      alone: whether the process stays by itself; otherwise it first joins the others of its run, see distributed.py.
    """
    if FLAGS["config"].default is None:
        flags.mark_flag_as_required("config")

    def parse(argv: list[str]) -> list[str]:
        if {"--help", "-help", "-h"} & set(argv):
            print(_usage(alone))
            sys.exit(0)
        try:
            argv = recipes.resolve(argv)
            if not alone:
                distributed.start(argv)
            rest = FLAGS(argv)
            for flag in _own_flags():
                if flag.flag_type() == "string" and flag.name not in _NO_PLACE:
                    schemes = stores.SCHEMES if flag.name in _MAY_BE_STORED else ()
                    places.require_directory(f"--{flag.name}", flag.value or "", schemes)
            return rest
        except Exception as error:  # a typo in a key, a wrong type, a config that does not exist or does not load
            sys.exit(f"error: {_explain(error, argv)}")

    logging.set_verbosity(logging.WARNING)  # libraries are quiet; our own lines are printed

    def guarded(argv: list[str]) -> None:
        try:
            main(argv)
        except UserError as error:  # in the middle of a run; errors of JAX, Optax and Orbax keep their traceback
            distributed.end_in_error(f"error: {error}")

    faulthandler.register(signal.SIGUSR1)  # what every thread does, without ending the process: kill -USR1
    with distributed.together():
        app.run(guarded, flags_parser=parse)


def _usage(alone: bool) -> str:
    """What --help prints: the docstring of the command, its own flags, and how those of the config work."""
    own = _own_flags()
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:", ""]
    for flag in [FLAGS["config"], *own]:
        value = {"bool": "", "int": " N"}.get(flag.flag_type(), " TEXT")
        default = f" (default: {flag.default})" if flag.default and flag in own else ""
        lines.append(f"  --{flag.name + value:18} {flag.help.strip()}{default}")
    lines.append(_OVERRIDES.rstrip())
    if not alone:
        lines += ["", "For a run of several processes (--coordinator, --processes, --process_id) see docs/pods.md."]
    return "\n".join(lines)


def _own_flags() -> list[flags.Flag]:
    """Those that the command itself defines."""
    return [flag for flag in FLAGS.get_key_flags_for_module(sys.argv[0]) if flag.name != "config"]


def _explain(error: Exception, argv: list[str]) -> str:
    """One line about what is wrong with the flags; ml_collections names a key without the flag it came from."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    flag, *traceback = re.split(r"Error whilst parsing config file:\s*Traceback", str(error), maxsplit=1)
    if traceback:  # ml_collections passes on what get_config raised as a whole traceback
        return flag + re.sub(r"^[\w.]+: ", "", traceback[0].strip().splitlines()[-1].strip())
    text = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
    unknown = re.match(r"'?(\w+)'?( Did you mean \"(\w+)\"|$)", text)
    if unknown:
        key, _, near = unknown.groups()
        for flag in argv:
            parents, found, rest = flag.partition(f".{key}")
            if flag.startswith("--config.") and found and rest[:1] in ("", "=", "."):
                old = (parents + found).removeprefix("--config.")
                if now := former_keys.today(old):
                    return f"{flag}: config.{old} is now {now}"
                hint = f"did you mean {parents.removeprefix('--')}.{near}?" if near else "see configs/default.py"
                if parents.removeprefix("--config.") in allowed.FREE:
                    hint = f"give the whole mapping, as in {parents}=\"{{'{key}': {rest[1:] or '...'}}}\""
                return f"{flag}: there is no such key; {hint}"
    return text

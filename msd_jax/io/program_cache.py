"""Compiled programs are kept for later runs, in JAX's persistent cache."""

import hashlib
import os
import pathlib
import platform
import re
import warnings
from typing import Any

import jax
from etils import epath

from msd_jax.errors import UserError
from msd_jax.io import compilations, places
from msd_jax.io.console import log
from msd_jax.parallel import distributed

STORES = ("gs", "s3", "az")  # that JAX can keep programs in, by etils and gcsfs, s3fs or adlfs
MOST_BYTES = 20e9  # that a directory of this machine may hold at the start of a run
_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL)
_UNWRITTEN = re.compile(r"Error writing persistent compilation cache entry for '[^']*': (.*)", re.DOTALL)


def keep(directory: str) -> None:
    """Has this process read compiled programs from `directory`, and process 0 write them there; "" does neither.

    To be called once the process has joined its run, and before it compiles anything. JAX_COMPILATION_CACHE_DIR goes
    first. On CPUs, whose programs are machine code, a subdirectory for each kind of CPU is used. An entry that is
    damaged is compiled anew and replaced. A directory that cannot be written costs the time to compile, and is named.

    Raises:
      UserError: the directory is in an object store that is not supported, or cannot be reached from here.
    """
    compilations.listen()
    jax.config.update("jax_enable_compilation_cache", bool(directory))
    if not directory:
        return
    directory = os.path.expanduser(os.environ.get("JAX_COMPILATION_CACHE_DIR") or directory)
    places.require_directory("config.compilation_cache", directory, STORES)
    if jax.default_backend() == "cpu":
        directory = f"{directory.rstrip('/')}/{cpu()}"
    stored = "://" in directory
    try:
        _make(directory, stored)
    except Exception as error:
        if stored:  # whatever the libraries raise
            raise UserError(f"config.compilation_cache={directory} cannot be reached: {error}") from error
        log(f"note: config.compilation_cache={directory} cannot be written ({error}); programs are compiled anew")
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if stored:  # XLA's own caches, which JAX puts beside its, are local files
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _mend_instead_of_warning(epath.Path(directory))


_CPUINFO = pathlib.Path("/proc/cpuinfo")
_CPU = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),  # as Linux calls it on x86
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),  # and on Arm
)


def cpu() -> str:
    """A name for this machine's kind of CPU: machine code for one may be wrong or slow on another.

    JAX's own key to a program has no such part.
    """
    try:
        text = _CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0]  # of the first core
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
        parts = [told.get(key, "") for key in _CPU]
    except OSError:
        parts = []
    if not any(parts):  # another operating system: no two machines share
        parts = [platform.node(), platform.processor()]
    return "cpu-" + hashlib.sha256("\n".join([platform.machine(), *parts]).encode()).hexdigest()[:12]


def _make(directory: str, stored: bool) -> None:
    """Makes the directory; of one of this machine, process 0 removes the oldest entries beyond MOST_BYTES."""
    if stored:
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        return
    os.makedirs(directory, mode=0o700, exist_ok=True)  # whoever writes there chooses what this process runs
    if not distributed.is_first():
        return
    if not os.access(directory, os.W_OK):
        raise PermissionError("it is not writable")
    entries = [(path.stat(), path) for path in pathlib.Path(directory).glob("*-cache")]
    size = sum(stat.st_size for stat, _ in entries)
    for stat, path in sorted(entries, key=lambda entry: entry[0].st_mtime):
        if size <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        size -= stat.st_size


def _mend_instead_of_warning(directory: epath.Path) -> None:
    """Removes damaged entries, which JAX passes over with a warning, at every run, and never replaces."""
    show, unwritten = warnings.showwarning, False

    def mend(message: Warning | str, *where: Any, **how: Any) -> None:
        nonlocal unwritten
        if damaged := _DAMAGED.match(str(message)):
            log(f"note: a compiled {damaged[1]} in {directory} is damaged ({_line(damaged[2])}): compiled anew")
            if distributed.is_first():  # which alone writes; JAX does not say which of this name it is
                for path in directory.glob(f"{damaged[1]}-*-cache"):
                    path.unlink(missing_ok=True)
        elif failed := _UNWRITTEN.match(str(message)):
            if not unwritten:
                log(f"note: compiled programs cannot be kept in {directory}: {_line(failed[1])}")
            unwritten = True
        else:
            show(message, *where, **how)

    warnings.showwarning = mend


def _line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no reason given"

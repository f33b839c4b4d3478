"""What JAX compiles: which program now, so that a run says so instead of standing still, and what all of them took.

JAX reports when it begins and ends to compile a program, whoever called it; see jax.monitoring.
"""

import dataclasses
import functools
import re
import threading
import time
from typing import Any

from jax import monitoring

# A program that the persistent cache has is reported too: as read, and then as compiled within a short time.
_COMPILE, _READ = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
A_MOMENT = 2.0  # seconds; what takes less is not worth a word


@dataclasses.dataclass
class Compilations:
    """What a process has compiled.

    Attributes:
      compiled: programs.
      read: programs that were read from the cache instead.
      seconds: of both; tracing is not part of it.
    """

    compiled: int = 0
    read: int = 0
    seconds: float = 0.0


_so_far = Compilations()
_running: dict[int, tuple[str, float]] = {}  # {thread: (program, when it began)}


@functools.cache
def listen() -> None:
    """From now on `so_far` and `current` know what is compiled."""
    monitoring.register_scalar_listener(_began)
    monitoring.register_event_listener(_was_read)
    monitoring.register_event_duration_secs_listener(_ended)


def so_far() -> Compilations:
    """What this process has compiled since it listens, which it does from now on at the latest."""
    listen()
    return dataclasses.replace(_so_far)


def current() -> str:
    """ "compiling the train step, 34 s"; "" where nothing has been compiling for more than a moment."""
    for name, began in list(_running.values()):
        seconds = time.monotonic() - began
        if seconds > A_MOMENT:
            return f"compiling the {name}, {seconds:.0f} s"
    return ""


def _began(event: str, value: float, **labels: Any) -> None:
    del value
    if event == _COMPILE:
        program = re.sub(r"^jit\W*", "", str(labels.get("fun_name", "program")))  # "jit(train_step)"
        name = re.sub(r"[\W_]+", " ", program).strip()
        _running[threading.get_ident()] = (name, time.monotonic())


def _was_read(event: str, **labels: Any) -> None:
    del labels
    if event == _READ:
        _so_far.compiled -= 1  # `_ended` counts it
        _so_far.read += 1


def _ended(event: str, duration_secs: float, **labels: Any) -> None:
    del labels
    if event == _COMPILE:
        _running.pop(threading.get_ident(), None)
        _so_far.compiled += 1
        _so_far.seconds += duration_secs

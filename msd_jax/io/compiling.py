"""Which program is being compiled, so that a run says so instead of standing still.

JAX reports when it begins and ends to compile a program, whoever called it; see jax.monitoring.
"""

import functools
import re
import threading
import time
from typing import Any

from jax import monitoring

_COMPILING = "/jax/core/compile/backend_compile_duration"
A_MOMENT = 2.0  # seconds; what takes less is not worth a word

_running: dict[int, tuple[str, float]] = {}  # {thread: (program, when it began)}


@functools.cache
def watch() -> None:
    """From now on `current` knows what is compiled."""
    monitoring.register_scalar_listener(_began)
    monitoring.register_event_duration_secs_listener(_ended)


def current() -> str:
    """ "compiling the train step, 34 s"; "" where nothing has been compiling for more than a moment."""
    for name, began in list(_running.values()):
        seconds = time.monotonic() - began
        if seconds > A_MOMENT:
            return f"compiling the {name}, {seconds:.0f} s"
    return ""


def _began(event: str, value: float, **labels: Any) -> None:
    del value
    if event == _COMPILING:
        program = re.sub(r"^jit\W*", "", str(labels.get("fun_name", "program")))  # "jit(train_step)"
        name = re.sub(r"[\W_]+", " ", program).strip()
        _running[threading.get_ident()] = (name, time.monotonic())


def _ended(event: str, duration_secs: float, **labels: Any) -> None:
    del duration_secs, labels
    if event == _COMPILING:
        _running.pop(threading.get_ident(), None)

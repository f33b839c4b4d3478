"""Memory of the host that is free and yet counts as the process's own."""

import ctypes
import functools
import sys
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"  # told at the end of each compilation


@functools.cache
def give_back_after_compilations() -> None:
    """Has glibc give the operating system back what XLA's compiler has freed, after each compilation; once a process.

    It would keep it, some 0.2 GB of a train step's, beside the arrays of the run. Does nothing where the C library is
    not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_: Any) -> None:
        if event == _COMPILED and seconds > 0.1:  # small programs leave nothing behind
            trim(ctypes.c_size_t(0))

    jax.monitoring.register_event_duration_secs_listener(compiled)

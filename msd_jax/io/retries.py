"""Storage that fails for a moment is asked again: a few times, with growing pauses, and never in silence."""

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from msd_jax.errors import UserFileError

Result = TypeVar("Result")

PAUSES = (0.1, 0.5, 2.0)  # seconds before the second, third and fourth try
# What network storage says when it may well work a moment later. A full disk or a missing file is not among them.
TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EBUSY", "EINTR", "ESTALE", "ETIMEDOUT", "EREMOTEIO"),
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
_WORDS = tuple(map(os.strerror, TRANSIENT))  # TensorStore, below Orbax, hands on the words without the number
_STATUSES = frozenset((408, 429, 500, 502, 503, 504))  # of HTTP
_CLASSES = re.compile("Timeout|Connect|Disconnect")  # of the libraries of object stores, which share no base
_lock = threading.Lock()
_count = 0


def count() -> int:
    """How many operations this process has repeated so far."""
    return _count


def is_transient(error: BaseException) -> bool:
    """Whether storage that raised `error` may work a moment later."""
    if isinstance(error, UserFileError) and error.__cause__:
        return is_transient(error.__cause__)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT
    response = getattr(error, "response", None)  # of botocore: a mapping
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    statuses = [
        metadata.get("HTTPStatusCode"),
        *(getattr(error, name, None) for name in ("status", "code", "status_code")),
    ]
    for status in map(str, statuses):
        if status.isdigit() and int(status) >= 400:
            return int(status) in _STATUSES
    text = str(error)
    return _CLASSES.search(type(error).__name__) is not None or any(words in text for words in _WORDS)


def announce(reason: str, pause: float) -> None:
    """Counts and prints that what failed for `reason` is tried again after `pause` seconds."""
    global _count
    with _lock:
        _count += 1
    print(
        f"note: {' '.join(reason.split())[:300]}; retrying in {pause:g} s (retry {_count} of this process)",
        file=sys.stderr,
    )


def retried(act: Callable[[], Result]) -> Result:
    """The result of `act`, which is repeated while storage fails transiently, three times at most.

    Args:
      act: reads or writes something, and may be repeated from its start.

    Raises:
      Exception: of the last try, or any that repeating cannot mend.
    """
    for pause in PAUSES:
        try:
            return act()
        except Exception as error:
            if not is_transient(error):
                raise
            announce(str(error) or type(error).__name__, pause)
        time.sleep(pause)
    return act()

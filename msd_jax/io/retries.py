"""Storage that fails for a moment is asked again: a few times, with growing pauses, and never in silence."""

import errno
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

PAUSES = (0.1, 0.5, 2.0)  # seconds before the second, third and fourth try
# What network storage says when it may well work a moment later. A full disk or a missing file is not among them.
_TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EBUSY", "EINTR", "ESTALE", "ETIMEDOUT", "EREMOTEIO"),
        *("ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
_lock = threading.Lock()
_count = 0


def count() -> int:
    """How many operations this process has repeated so far."""
    return _count


def retried(act: Callable[[], Result]) -> Result:
    """The result of `act`, which is repeated while storage fails transiently, three times at most.

    Args:
      act: reads or writes something, and may be repeated from its start.

    Raises:
      OSError: of the last try, or any that repeating cannot mend.
    """
    global _count
    for pause in PAUSES:
        try:
            return act()
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            with _lock:
                _count += 1
            print(f"note: {error}; retrying in {pause:g} s (retry {_count} of this process)", file=sys.stderr)
        time.sleep(pause)
    return act()

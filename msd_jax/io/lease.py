"""A lock in an object store, by one object that is made only where there is none, and rewritten while it is held."""

import contextlib
import dataclasses
import json
import threading
import time
from typing import Any

from msd_jax.errors import UserError
from msd_jax.io.lock import Holder
from msd_jax.io.retries import retried

SECONDS_BETWEEN_BEATS = 5.0
SECONDS_OF_SILENCE = 60.0  # a lease whose heartbeat stands still for so long is stale


class Lease:
    """The lease of a directory, held until it is released. A thread keeps it alive, and notices where it is lost."""

    def __init__(self, store: Any, path: str, place: str):
        """Takes it.

        Args:
          store: fsspec's file system.
          path: of the object.
          place: what is held, for messages.

        Raises:
          UserError: another process holds it; it is named.
        """
        self._store, self._path, self._place, self._holder = store, path, place, Holder.this_process()
        self._lost, self._released, self._mutex = "", threading.Event(), threading.Lock()
        while not self._make():
            self._remove_if_stale()
        threading.Thread(target=self._beat, daemon=True).start()

    def _make(self) -> bool:
        """Whether there was none, and now there is this one."""
        with contextlib.suppress(FileExistsError):  # perhaps by a try of ours whose answer was lost
            retried(lambda: self._store.pipe_file(self._path, self._text(), mode="create"))
        found = self._read()  # of two that found the same stale lease, the last one has it
        return found is not None and found.token == self._holder.token

    def _text(self) -> bytes:
        return json.dumps(dataclasses.asdict(self._holder)).encode()

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(retried(lambda: self._store.cat_file(self._path))))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return Holder("an unknown host", -1, "at an unknown time", "", "")

    def _remove_if_stale(self) -> None:
        first = self._read()
        if first is None:
            return
        if not first.ended():
            print(f"{self._place} is locked by {first}; waiting up to {SECONDS_OF_SILENCE:.0f} s for its heartbeat")
            deadline = time.monotonic() + SECONDS_OF_SILENCE
            while time.monotonic() < deadline:
                time.sleep(min(1.0, SECONDS_BETWEEN_BEATS))
                if (found := self._read()) is None:
                    return
                if found != first:
                    raise UserError(
                        f"another run is writing to {self._place}: {found}; wait for it or stop it, or use a new one"
                    )
        with contextlib.suppress(FileNotFoundError):
            self._store.rm_file(self._path)

    def _beat(self) -> None:
        while not self._released.wait(SECONDS_BETWEEN_BEATS):
            # The mutex: or a beat that is on its way when it is released would make it anew.
            # What is suppressed: the store cannot be reached for a moment, or for long.
            with self._mutex, contextlib.suppress(Exception):
                if self._released.is_set():
                    return
                found = self._read()
                if found is None or found.token != self._holder.token:
                    self._lost = str(found) if found else "nobody: the lock was removed"
                    return
                self._holder.beat += 1
                self._store.pipe_file(self._path, self._text())

    def check(self) -> None:
        """Raises a UserError where this process must no longer write; asks nobody."""
        if self._lost:
            raise UserError(f"{self._place} was taken over by {self._lost}; this run was silent for too long, and ends")

    def release(self) -> None:
        """Lets others take it."""
        self._released.set()
        with self._mutex, contextlib.suppress(Exception):  # then it is stale soon
            found = self._read()
            if found and found.token == self._holder.token:
                self._store.rm_file(self._path)

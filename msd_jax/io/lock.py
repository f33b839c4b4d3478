"""A lock on a directory that one run at a time may write to, also where a network file system is shared by machines.

DIRECTORY/lock.json names the holder. A thread rewrites it every few seconds, so that a lock whose holder is gone can be
told from one that is held: on the holder's own machine by its process, elsewhere by a heartbeat that stands still. No
two clocks are compared.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any

from msd_jax.errors import UserError, UserFileError
from msd_jax.parallel import peers

NAME = "lock.json"
SECONDS_BETWEEN_BEATS = 3.0
SECONDS_OF_SILENCE = 30.0  # a lock whose heartbeat stands still for so long is stale

_held: dict[pathlib.Path, "Lock"] = {}
_mutex = threading.Lock()


def take(directory: pathlib.Path) -> "Lock":
    """The lock on `directory`, held until it is released or the process ends; one process can take it repeatedly.

    Raises:
      UserError: another process holds it; it is named.
      OSError: the directory cannot be written.
    """
    path = directory.resolve() / NAME
    with _mutex:
        if path in _held and not _held[path].lost():
            return _held[path]
        while True:
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                break
            except FileExistsError:
                _set_aside_if_stale(path)
        lock = Lock(path, Holder.this_process())
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(lock.holder.line())
        _held[path] = lock
        if len(_held) == 1:
            threading.Thread(target=_beat, daemon=True).start()
            peers.at_end(release_all)
        return lock


def release_all() -> None:
    """Releases what this process holds."""
    for lock in list(_held.values()):
        lock.release()


@dataclasses.dataclass
class Lock:
    """A lock that this process holds: on the directory of `path`, as `holder`."""

    path: pathlib.Path
    holder: "Holder"

    def lost(self) -> bool:
        """Whether the directory was removed, or another process has taken the lock."""
        found = _read(self.path)
        return found is None or found.token != self.holder.token

    def check(self) -> None:
        """Raises a UserError where this process must no longer write to the directory."""
        found = _read(self.path)
        if found is None:
            raise UserFileError(
                f"{self.path} is gone: the directory was removed or replaced while the run was writing to it; put it "
                "back and run the same command again, or use a new --workdir"
            )
        if found.token != self.holder.token:
            raise UserError(f"{self.path.parent} was taken over by {found}; this run was silent for too long, and ends")

    def beat(self) -> None:
        """Rewrites the file in place: a network file system may show a file that replaced another one late."""
        if not self.lost():
            self.holder.beat += 1
            with contextlib.suppress(OSError), self.path.open("r+", encoding="utf-8") as file:
                file.write(self.holder.line())

    def release(self) -> None:
        """Lets others take the lock."""
        _held.pop(self.path, None)
        with contextlib.suppress(OSError):
            if not self.lost():
                self.path.unlink()


@dataclasses.dataclass
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    started: str  # the lock was taken, UTC
    born: str  # of the process, by the kernel's clock; another process may get the same number later
    token: str
    beat: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(socket.gethostname(), os.getpid(), now, _born(os.getpid()), uuid.uuid4().hex)

    def line(self) -> str:
        return json.dumps(vars(self)).ljust(400) + "\n"  # always as long, so that rewriting never leaves a tail

    def ended(self) -> bool:
        """Whether the holder was a process of this machine that is no more."""
        if self.host != socket.gethostname():
            return False
        return not _alive(self.pid) or _born(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


def _born(pid: int) -> str:
    """When a process began, since which boot; "" where the kernel does not tell."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot + " " + pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(path: pathlib.Path) -> Holder | None:
    """Who holds the lock; None: nobody."""
    for _ in range(20):
        try:
            values: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return Holder(**values)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            time.sleep(0.1)  # it is being written
    return Holder("an unknown host", -1, "at an unknown time", "", "")


def _set_aside_if_stale(path: pathlib.Path) -> None:
    """Removes a lock that nobody holds any more. Raises UserError where somebody does."""
    first = _read(path)
    if first is None:
        return
    if not first.ended():
        if first.host == socket.gethostname() and first.born == _born(first.pid) != "":
            raise UserError(_refusal(path, first))
        print(f"{path.parent} was locked by {first}; waiting up to {SECONDS_OF_SILENCE:.0f} s for its heartbeat")
        deadline = time.monotonic() + SECONDS_OF_SILENCE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SECONDS_BETWEEN_BEATS))
            found = _read(path)
            if found is None:
                return
            if found != first:
                raise UserError(_refusal(path, found))
    aside = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        path.rename(aside)
        found = _read(aside)
        if found and found.token != first.token:  # a process took the lock meanwhile: give it back
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _refusal(path: pathlib.Path, holder: Holder) -> str:
    return (
        f"another run is writing to {path.parent}: {holder}; wait for it or stop it, or use a new --workdir (a lock "
        f"that nobody holds is recognised within {SECONDS_OF_SILENCE:.0f} seconds)"
    )


def _beat() -> None:
    while _held:
        time.sleep(SECONDS_BETWEEN_BEATS)
        for lock in list(_held.values()):
            lock.beat()

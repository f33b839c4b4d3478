"""Directories in object stores: worked on in a copy on this machine, which is written back as whole objects.

Object stores neither append nor rename, and every request takes a while. So a run writes to its copy as to any other
directory, and a thread writes back the files that have changed, each as one object. A checkpoint is there once its
manifests are, which are written last, and after the rows of the steps up to it. What else an interrupted run left of a
checkpoint is removed when the directory is opened again; then the store is the truth, and not a copy of an earlier run.

In Google Cloud Storage checkpoints have no copy: every process writes its part there and reads it from there, by Orbax.
Process 0 alone writes everything else, so that such a run may be on any number of machines.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from msd_jax.errors import UserError, UserFileError
from msd_jax.io import checksums, lock, objects, places
from msd_jax.io.lease import Lease
from msd_jax.io.retries import retried
from msd_jax.parallel import distributed, peers

SCHEMES = objects.SCHEMES
OF_SEVERAL_MACHINES = ("gs",)  # of them, where a run may be on several
_NATIVE = "gs"  # whose checkpoints have no copy
_SETTINGS = ("AWS_", "AZURE_", "FSSPEC_", "GOOGLE_", "STORAGE_EMULATOR_")  # beginnings of variables' names
SECONDS_BETWEEN_WRITES, SECONDS_BETWEEN_LOOKS = 30.0, 1.0
_THREADS = 8
_CHECKPOINTS = re.compile(r"(.*/)?checkpoints/.*")
_NATIVE_STEP = re.compile(rf"{_NATIVE}://.+/checkpoints/\d+/?")
_STEP = re.compile(r"(?:.*/)?checkpoints/\d+(?=/)")
# Locks, marks and what is being written.
_OF_THIS_MACHINE = re.compile(
    rf"(.*/)?({re.escape(lock.NAME)}.*|\.shared.*|.*\.unfinished(/.*)?|checkpoints/[^/]*-tmp.*)"
)
_LARGE = re.compile(r"(.*/)?(checkpoints/.*|tensorboard/.*|profile/.*|.*\.safetensors)")  # what no report needs

_COMMITTED = "commit_success.txt"  # Orbax takes no directory of Google Cloud Storage for a checkpoint without it

_opened: dict[pathlib.Path, "Copy"] = {}
_native: dict[pathlib.Path, str] = {}  # the copies on this machine of directories of which checkpoints have none


def own(flag: str, place: str) -> pathlib.Path:
    """The directory to work in: `place` itself or, of an object store, a copy that this run alone writes back.

    All processes of the run call this. Those of one machine get the same.

    Args:
      flag: that `place` is the value of.
      place: a directory of this machine, or SCHEME://BUCKET/PATH with one of SCHEMES.

    Raises:
      UserError: the store cannot be reached, another run writes there, or the processes are on several machines and
        the store is not one for that.
    """
    if "://" not in place:
        return pathlib.Path(place)
    local = _home() / distributed.from_first(lambda: _identity_of_store(place)) / _last(place)
    if place.startswith(f"{_NATIVE}://"):
        _native[local] = place.rstrip("/")
    else:
        _require_one_machine(flag, place)
    if distributed.is_first():
        copy = Copy(flag, place, local)
        copy.take()
        copy.fetch()
        copy.keep_writing()
        _opened[local] = copy
        peers.at_end(copy.close_quietly)
    distributed.from_first(lambda: None)  # nobody looks before it is there
    if not local.exists():  # process 0 is on another machine
        local.mkdir(parents=True, exist_ok=True, mode=0o700)
        peers.at_end(lambda: shutil.rmtree(local.parent, ignore_errors=True))
    return local


def checkpoints(workdir: pathlib.Path) -> pathlib.Path:
    """The directory of a run's checkpoints: WORKDIR/checkpoints, or an address for epath where they have no copy."""
    for local, place in _native.items():
        if workdir.is_relative_to(local):
            objects.file_system(place)  # sets up the library, for epath too
            return epath.Path(place) / workdir.relative_to(local) / "checkpoints"
    return workdir.resolve() / "checkpoints"


def is_shared(workdir: pathlib.Path) -> bool:
    """Whether every process of the run is to see in `workdir` what process 0 writes there."""
    return not any(workdir.is_relative_to(local) for local in _native)


def write(address: pathlib.Path) -> None:
    """Writes back now what has changed in the copy of the directory that `address` is in, if this process has it.

    Raises:
      UserFileError: it cannot be written.
    """
    for copy in _opened.values():
        if os.fspath(address).startswith(f"{copy.place}/"):
            copy.write()


def add(directory: pathlib.Path) -> None:
    """Writes the files of a directory that this process made in its copy to the store, if process 0 does not see them.

    Raises:
      UserFileError: they cannot be written.
    """
    if distributed.is_first():
        return
    for local, place in _native.items():
        if directory.is_relative_to(local):
            address = f"{place}/{directory.relative_to(local).as_posix()}"
            with objects.reached("directory", address):
                store, root = objects.file_system(address)
                store.put(f"{directory}/", f"{root}/", recursive=True)


def guest(flag: str, place: str, everything: bool = False) -> pathlib.Path:
    """As `own`, to read what is there and perhaps add a report; without checkpoints and weights unless `everything`."""
    if "://" not in place:
        return pathlib.Path(place)
    _require_one_machine(flag, place)

    def fetch() -> str:
        directory = tempfile.mkdtemp(prefix="msd_jax-")
        peers.at_end(lambda: shutil.rmtree(directory, ignore_errors=True))
        local = pathlib.Path(directory, _last(place))
        copy = Copy(flag, place, local)
        copy.fetch(None if everything else _LARGE.fullmatch)
        _opened[local] = copy
        return str(local)

    return pathlib.Path(distributed.from_first(fetch))


def checkpoint(flag: str, place: str) -> str:
    """What `place` names, on this machine, or the address of a checkpoint that is read without a copy."""
    if _NATIVE_STEP.fullmatch(place):
        with objects.reached(flag, place):
            objects.file_system(place)  # sets up the library, for epath too
        return place.rstrip("/")
    return str(guest(flag, place, everything=True))


def close(directory: pathlib.Path) -> None:
    """Writes back what has changed of the copy that `directory` is, or is part of, and lets go of it.

    Raises:
      UserFileError: it cannot be written.
    """
    if copy := _copy_of(directory):
        copy.close()


def check(directory: pathlib.Path) -> None:
    """Raises a UserError where this run must no longer write to the copy that `directory` is part of; never waits."""
    if copy := _copy_of(directory):
        copy.check()


def told(path: pathlib.Path) -> str:
    """What a path is called outside: of a copy, the address in the store."""
    copy = _copy_of(path)
    return copy.told(path) if copy else str(path)


def _copy_of(path: pathlib.Path) -> "Copy | None":
    return next((copy for local, copy in _opened.items() if path.is_relative_to(local)), None)


def _home() -> pathlib.Path:
    """A directory for this user's copies, the same for all processes of this machine."""
    home = pathlib.Path(tempfile.gettempdir(), f"msd_jax-{os.getuid()}")
    home.mkdir(mode=0o700, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != os.getuid():
        raise UserFileError(f"{home} belongs to another user; remove it, or set TMPDIR to a directory of yours")
    return home


def _identity_of_store(place: str) -> str:
    """A name for a directory of an object store, which two stores with buckets of one name do not share.

    Where a store is, and whose, its library takes from the environment, in variables of several names.
    """
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith(_SETTINGS))
    return hashlib.sha256(json.dumps([place.rstrip("/"), settings]).encode()).hexdigest()[:16]


def _last(place: str) -> str:
    return re.sub(r"[^\w.-]", "_", place.rstrip("/").rpartition("/")[2]) or "bucket"


def _require_one_machine(flag: str, place: str) -> None:
    places.require_directory(flag, place, SCHEMES)
    hosts = sorted(set(distributed.from_all(socket.gethostname)))
    if len(hosts) > 1:
        raise UserError(
            f"{flag}={place}: the processes are on {len(hosts)} machines ({', '.join(hosts[:3])}, ...), which must see "
            "one directory: mount the bucket (gcsfuse, mount-s3) and give the path below the mount point"
        )


class Copy:
    """A directory of an object store, and its copy on this machine.

    Attributes:
      place: its address.
    """

    def __init__(self, flag: str, place: str, local: pathlib.Path):
        """Raises a UserError where the store cannot be reached."""
        self.place, self._flag, self._local = place.rstrip("/"), flag, local
        self._native = place.startswith(f"{_NATIVE}://")
        with self._reached():
            self._store, self._root = objects.file_system(self.place)
        self._lease: Lease | None = None
        self._written: dict[str, tuple[int, int] | None] = {}  # name -> size and time of change of what the store has
        self._mutex, self._stop = threading.RLock(), threading.Event()

    def _reached(self) -> contextlib.AbstractContextManager[None]:
        return objects.reached(self._flag, self.place)

    def take(self) -> None:
        """Makes the directory this run's own. Raises UserError where it is another's."""
        with self._reached():
            self._lease = Lease(self._store, self._object(lock.NAME), self.place)

    def fetch(self, left_out: Callable[[str], Any] | None = None) -> None:
        """Makes the copy anew from what the store has; `left_out(name)` is true of what is not needed."""
        shutil.rmtree(self._local, ignore_errors=True)
        self._local.mkdir(parents=True, mode=0o700)
        with self._reached():
            found = retried(lambda: self._store.find(self._root, withdirs=False))
            names = [name for path in found if (name := path.removeprefix(self._root).strip("/"))]
            whole = {step for step in map(_step, names) if step and _is_whole(step, names)}
            partial = [name for name in names if (step := _step(name)) and step not in whole]
            taken = [name for name in names if name not in partial and not self._stays(name)]
            taken = [name for name in taken if not (left_out and left_out(name))]
            if self._lease:  # else it may belong to a run that is writing it
                self._each(self._remove, partial)
                if self._native:
                    self._each(self._commit, list(_uncommitted(whole, names)))
            self._each(self._fetch_one, taken)

    def _commit(self, directory: str) -> None:
        """Marks a part of a sealed checkpoint that was copied here from a disk as Orbax marks what it writes here."""
        self._store.pipe_file(self._object(f"{directory}/{_COMMITTED}"), b"copied")

    def _fetch_one(self, name: str) -> None:
        target = self._local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        retried(lambda: self._store.get_file(self._object(name), str(target)))
        self._written[name] = _identity(target)

    def write(self) -> None:
        """Writes back what has changed since it was written or fetched, and removes what was removed.

        Raises:
          UserFileError: the store does not take it.
        """
        with self._mutex, self._reached():
            whole = {str(step) for step in self._sealed()}  # before their rows are looked for
            files = {name: path for path in self._local.rglob("*") if (name := self._name(path)) and path.is_file()}
            files = {name: path for name, path in files.items() if _step(name) in (None, *whole)}
            changed = [name for name, path in files.items() if self._written.get(name) != _identity(path)]
            for rank in range(3):
                self._each(lambda name: self._write_one(name, files[name]), [n for n in changed if _rank(n) == rank])
            gone = [name for name in self._written if name not in files]
            for rank in (2, 1, 0):
                self._each(self._remove, [name for name in gone if _rank(name) == rank])

    def _write_one(self, name: str, path: pathlib.Path) -> None:
        identity = _identity(path)
        if identity is not None:  # else it was removed meanwhile, as its manifests were
            retried(lambda: self._store.put_file(str(path), self._object(name)))
            self._written[name] = identity

    def _remove(self, name: str) -> None:
        self._written.pop(name, None)
        with contextlib.suppress(FileNotFoundError):
            retried(lambda: self._store.rm_file(self._object(name)))

    def _each(self, act: Callable[[str], None], names: list[str]) -> None:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(act, names))

    def _sealed(self) -> Iterator[str]:
        for directory in self._local.rglob("checkpoints/*"):
            if directory.name.isdigit() and checksums.sealed(directory):
                yield directory.relative_to(self._local).as_posix()

    def _name(self, path: pathlib.Path) -> str:
        """The name of its object below the root; "" for what stays on this machine."""
        name = path.relative_to(self._local).as_posix()
        return "" if self._stays(name) else name

    def _stays(self, name: str) -> bool:
        """Whether a file is neither fetched nor written back."""
        apart = self._native and self._lease and _CHECKPOINTS.fullmatch(name)  # a guest reads them as files
        return bool(_OF_THIS_MACHINE.fullmatch(name) or apart)

    def _object(self, name: str) -> str:
        return f"{self._root}/{name}"

    def keep_writing(self) -> None:
        """From now on a thread writes back every few seconds."""
        threading.Thread(target=self._keep_writing, daemon=True).start()

    def _keep_writing(self) -> None:
        last, sealed = time.monotonic(), set(self._sealed())
        while not self._stop.wait(SECONDS_BETWEEN_LOOKS):
            now, seen = time.monotonic(), set(self._sealed())
            if now - last < SECONDS_BETWEEN_WRITES and seen <= sealed:  # a checkpoint does not wait
                continue
            last, sealed = now, seen
            try:
                self.write()
            except UserError as error:
                print(f"note: {error}; tried again in {SECONDS_BETWEEN_WRITES:.0f} s", file=sys.stderr)

    def check(self) -> None:
        """Raises a UserError where another run has taken the directory."""
        if self._lease:
            self._lease.check()

    def told(self, path: pathlib.Path) -> str:
        """The address of a path of the copy."""
        return f"{self.place}/{path.relative_to(self._local).as_posix()}".removesuffix("/.")

    def close_quietly(self) -> None:
        """As `close`, at the end of a process that ends for another reason."""
        try:
            self.close()
        except Exception as error:
            print(f"note: {error}", file=sys.stderr)

    def close(self) -> None:
        """Writes back what has changed, once, and releases the directory."""
        if self._stop.is_set():
            return
        self._stop.set()
        self.check()
        self.write()
        if self._lease:
            self._lease.release()
            shutil.rmtree(self._local.parent, ignore_errors=True)  # which holds it alone


def _step(name: str) -> str | None:
    """The directory of the checkpoint that a file belongs to."""
    found = _STEP.match(name)
    return found[0] if found else None


def _is_whole(step: str, names: list[str]) -> bool:
    return checksums.complete({name.rpartition("/")[2] for name in names if name.rpartition("/")[0] == step})


def _uncommitted(steps: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """Of the directories that Orbax makes for a checkpoint, a step's and its items', those without its mark."""
    present, directories = set(names), set(steps)
    for name in present:
        step = _step(name)
        if step in directories:
            item, inside, _ = name.removeprefix(f"{step}/").partition("/")
            directories |= {f"{step}/{item}"} if inside else set()
    return (directory for directory in sorted(directories) if f"{directory}/{_COMMITTED}" not in present)


def _rank(name: str) -> int:
    """In which order objects are written: what is of no checkpoint, their files, their manifests."""
    return 0 if _step(name) is None else 2 if checksums.is_manifest(name.rpartition("/")[2]) else 1


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns

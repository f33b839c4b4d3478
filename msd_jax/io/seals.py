"""Seals of checkpoints: by checksums of files or, of objects without a copy on a disk, by what the store knows of them.

Google Cloud Storage keeps an MD5 of each object, taken of the bytes that it holds. So nothing is read again to seal a
checkpoint there, nor to check it: a listing tells what was removed, cut short or replaced.
"""

import base64
import concurrent.futures
import contextlib
import json
import os
import pathlib
import tempfile
from typing import Any

from msd_jax.io import checksums, objects, stores


def seal(directory: pathlib.Path, process: int, processes: int) -> None:
    """Seals a checkpoint that is complete. Every process calls this.

    Raises:
      UserFileError: the store does not take the seal, or the rows of the steps up to it, which go first.
    """
    if not _is_address(directory):
        checksums.seal(directory, process, processes)
    elif process == 0:  # lists all of it
        stores.write(directory)
        with _reached(directory):
            _Objects(directory).seal()


def sealed(directory: pathlib.Path) -> bool:
    """Whether a checkpoint is sealed."""
    if not _is_address(directory):
        return checksums.sealed(directory)
    with _reached(directory):
        return checksums.complete(_Objects(directory).manifests)


def damage(directory: pathlib.Path, process: int, processes: int) -> str | None:
    """What is wrong with this process's share of a checkpoint, naming a file; None: nothing that its seal tells."""
    if not _is_address(directory):
        return checksums.damage(directory, process, processes)
    with _reached(directory):
        return _Objects(directory).damage(process, processes)


def _is_address(directory: pathlib.Path) -> bool:
    return "://" in os.fspath(directory)


def _reached(directory: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    return objects.reached("checkpoint", os.fspath(directory))


class _Objects:
    """The objects of a checkpoint, as a listing tells of them."""

    def __init__(self, directory: pathlib.Path):
        self._store, self._root = objects.file_system(os.fspath(directory))
        found = self._store.find(self._root, detail=True)
        self._facts: dict[str, Any] = {path.removeprefix(f"{self._root}/"): facts for path, facts in found.items()}
        self.manifests = [name for name in self._facts if checksums.is_manifest(name)]

    def seal(self) -> None:
        names = sorted(self._facts.keys() - set(self.manifests))
        sums = {name: (self._facts[name]["size"], f"md5:{self._hash(name, 'md5')}") for name in names}
        text = json.dumps(sums, indent=0) + "\n"
        self._store.pipe_file(f"{self._root}/{checksums.manifest(0, 1)}", text.encode())

    def damage(self, process: int, processes: int) -> str | None:
        if not self._facts:
            return "the directory is empty"
        sums: checksums.Sums = {}
        for name in sorted(self.manifests):
            try:
                read = json.loads(self._store.cat_file(f"{self._root}/{name}"))
                sums |= {file: (int(size), str(digest)) for file, (size, digest) in read.items()}
            except (ValueError, TypeError, AttributeError, RecursionError):
                return f"{name} is not a manifest"
        mine = sorted(sums)[process::processes]
        with concurrent.futures.ThreadPoolExecutor(checksums.THREADS) as pool:
            found = pool.map(lambda name: self._changed(name, *sums[name]), mine)
            return next((f"{name} {what}" for name, what in zip(mine, found) if what), None)

    def _changed(self, name: str, size: int, digest: str) -> str | None:
        if name not in self._facts:
            return "is missing"
        actual = self._facts[name]["size"]
        if actual != size:
            return f"has {actual:,} bytes instead of {size:,}"
        algorithm, _, hexadecimal = digest.rpartition(":")
        same = self._hash(name, algorithm or "blake2b") == hexadecimal
        return None if same else "has another content than was written"

    def _hash(self, name: str, algorithm: str) -> str:
        """Of an object; it is read where the store does not know: a checkpoint of a disk, or composed of others."""
        known = self._facts[name].get("md5Hash")
        if algorithm == "md5" and known:
            return base64.b64decode(known).hex()
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory, "object")
            self._store.get_file(f"{self._root}/{name}", str(path))
            return checksums.of_file(path, algorithm)

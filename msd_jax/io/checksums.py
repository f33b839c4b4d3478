"""Checksums of files: whether a directory still holds what was written to it, and whether a file is the one it was.

A directory is sealed by manifests inside it, MANIFEST-K-of-N.json, one from each of the N processes that hashed a share
of its files. Any number of processes can check it.
"""

import concurrent.futures
import functools
import hashlib
import json
import mmap
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import xxhash

from msd_jax.io import jsonl
from msd_jax.io.retries import retried

THREADS = min(8, os.cpu_count() or 1)  # hashlib and file reads release the interpreter
_CHUNK = 1 << 20
_WINDOW = 1 << 24  # of a mapped file
_POPULATE_READ = 22  # Linux's MADV_POPULATE_READ, from 5.14 on; `mmap` has no name for it
_PREFIX = "MANIFEST-"
_WRITTEN_BY = re.compile(r"ocdbt\.process_(\d+)")  # the directory that Orbax gives each process's part of the arrays
_SETTLED = 2.0  # seconds; a file touched since may change again within the resolution of its time stamps

Sums = dict[str, tuple[int, str]]  # file name, relative to the directory -> (bytes, ALGORITHM:HASH)


_HASHES: dict[str, Callable[[], Any]] = {
    "blake2b": functools.partial(hashlib.blake2b, digest_size=16),  # tells any two inputs apart
    "md5": functools.partial(hashlib.md5, usedforsecurity=False),  # what object stores keep of each object
    "xxh3": xxhash.xxh3_128,  # finds any accident, as fast as memory is read
}


def of_file(path: pathlib.Path, algorithm: str = "blake2b", mapped: bool = False) -> str:
    """The hash of a file's content, 128 bits in hexadecimal; `algorithm` is a name of _HASHES.

    `mapped`: the file was just written, and is hashed where it lies in memory. Copying it would take as long again.
    """

    def hash_it() -> str:
        digest = _HASHES[algorithm]()
        with path.open("rb", buffering=0) as file:
            if mapped and _hash_mapped(file.fileno(), digest):
                return digest.hexdigest()
            digest, chunk = _HASHES[algorithm](), memoryview(bytearray(_CHUNK))
            while size := file.readinto(chunk):
                digest.update(chunk[:size])
        return digest.hexdigest()

    return retried(hash_it)


def _hash_mapped(file: int, digest: Any) -> bool:
    """Whether a file could be hashed through a map of its pages; if not, reading it tells what is wrong.

    Touching a page that cannot be read would end the process (SIGBUS), so pages are asked for first.
    """
    size = os.fstat(file).st_size
    try:
        for start in range(0, size, _WINDOW):
            with mmap.mmap(file, min(_WINDOW, size - start), access=mmap.ACCESS_READ, offset=start) as pages:
                pages.madvise(_POPULATE_READ)
                digest.update(pages)
    except (OSError, ValueError):  # an old kernel, another system, a file system without maps, a file that was cut
        return False
    return True


def seal(directory: pathlib.Path, process: int = 0, processes: int = 1) -> None:
    """Writes the manifest of this process's share of the files in `directory`, which must be complete.

    What a process wrote itself it hashes itself, since its machine has it in memory.
    """
    names = {path: path.relative_to(directory).as_posix() for path in retried(lambda: sorted(directory.rglob("*")))}
    sizes = {path: retried(path.stat).st_size for path in names if path.is_file() and not is_manifest(path.name)}
    writers = {path: int(found[1]) % processes for path in sizes if (found := _WRITTEN_BY.search(names[path]))}
    mine = [(size, path) for path, size in sizes.items() if writers.get(path) == process]
    mine += _share([(size, path) for path, size in sizes.items() if path not in writers], process, processes)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(lambda entry: of_file(entry[1], "xxh3", mapped=True), mine)
        sums: Sums = {names[path]: (size, f"xxh3:{digest}") for (size, path), digest in zip(mine, digests)}
    jsonl.replace_text(directory / manifest(process, processes), json.dumps(sums, indent=0) + "\n")


def manifest(process: int, processes: int) -> str:
    """The name of a process's manifest."""
    return f"{_PREFIX}{process}-of-{processes}.json"


def sealed(directory: pathlib.Path) -> bool:
    """Whether every manifest of `directory` is there."""
    return complete({path.name for path in _manifests(directory)})


def complete(names: Iterable[str]) -> bool:
    """Whether a directory with files of these names has all of its manifests."""
    names = {name for name in names if is_manifest(name)}
    counts = {name.removesuffix(".json").rpartition("-")[2] for name in names}
    return len(counts) == 1 and all(manifest(k, int(n)) in names for n in counts for k in range(int(n)))


def damage(directory: pathlib.Path, process: int = 0, processes: int = 1) -> str | None:
    """What is wrong with this process's share of `directory`, naming a file; None: nothing that its manifests tell."""
    if not any(directory.iterdir()):
        return "the directory is empty"
    sums: Sums = {}
    for manifest in _manifests(directory):
        try:
            sums |= {str(name): (int(size), str(digest)) for name, (size, digest) in _load(manifest).items()}
        except (ValueError, TypeError, AttributeError, RecursionError):
            return f"{manifest.name} is not a manifest"
    mine = _share([(size, name) for name, (size, _) in sums.items()], process, processes)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda entry: _changed(directory / entry[1], *sums[entry[1]]), mine)
        return next((f"{name} {what}" for (_, name), what in zip(mine, found) if what), None)


def _changed(path: pathlib.Path, size: int, digest: str) -> str | None:
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual:,} bytes instead of {size:,}"
        algorithm, _, hexadecimal = digest.rpartition(":")  # releases before xxh3 named none
        same = of_file(path, algorithm or "blake2b") == hexadecimal
        return None if same else "has another content than was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _share(entries: Iterable[tuple[int, Any]], process: int, processes: int) -> list[tuple[int, Any]]:
    """One process's part of (size, name) pairs, about as many bytes as any other's."""
    return sorted(entries, key=lambda entry: (-entry[0], entry[1]))[process::processes]


def _manifests(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.glob(_PREFIX + "*-of-*.json"))


def is_manifest(name: str) -> bool:
    """Whether a file of this name is a manifest."""
    return name.startswith(_PREFIX)


def _load(path: pathlib.Path) -> Any:
    return json.loads(retried(path.read_bytes))


def of_unchanged(paths: Sequence[pathlib.Path]) -> list[str]:
    """`of_file` of each, remembered in the user's cache while a file's size, inode and time stamps stay as they are."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_remembered, paths))


def _remembered(path: pathlib.Path) -> str:
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "msd_jax" / "checksums"
    entry = cache / (hashlib.blake2b(str(path.resolve()).encode(), digest_size=16).hexdigest() + ".json")
    stat = path.stat()
    identity = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    try:
        known = json.loads(entry.read_bytes())
        if known["file"] == identity:
            return str(known["hash"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # not remembered, or not legibly: hashed anew
    digest = of_file(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            jsonl.replace_text(entry, json.dumps({"path": str(path), "file": identity, "hash": digest}) + "\n")
        except OSError:
            pass  # a home that cannot be written costs the next run a few seconds
    return digest

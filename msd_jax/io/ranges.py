"""Tensors of safetensors files in an object store, read by ranges of bytes; this machine has the files' headers alone.

A file is kept as an outline: its header and its size, without the bytes between, so that names, shapes and dtypes are
read as of any file. A directory with such files names where they come from in ORIGIN.
"""

import concurrent.futures
import errno
import functools
import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from msd_jax.io import objects
from msd_jax.io.retries import retried

ORIGIN = ".store"
REQUESTS = 8  # of a process at a time
_PIECE = 32 << 20  # bytes of a request at most
_HEADER = 100_000_000  # bytes; the library takes no longer ones
_DTYPES: dict[str, Any] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
}


def outline(store: Any, path: str, size: int, target: pathlib.Path) -> None:
    """Writes the outline of a file of a store; of one that is not safetensors, as much as shows that."""
    head = store.cat_file(path, start=0, end=min(size, 1 << 20))
    length = min(8 + int.from_bytes(head[:8], "little"), size, _HEADER)
    if length > len(head):
        head += store.cat_file(path, start=len(head), end=length)
    target.write_bytes(head[:length])
    os.truncate(target, size)


def keep_origin(directory: pathlib.Path, place: str, hashes: dict[str, str]) -> None:
    """Says where the files of `directory` come from, and the store's hash of each."""
    (directory / ORIGIN).write_text(json.dumps({"place": place, "hashes": hashes}))


def hashes(directory: pathlib.Path) -> dict[str, str]:
    """The store's hash of each file of which there is an outline, by its name; {} where the files are whole."""
    return _origin(directory).get("hashes", {})


def _origin(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / ORIGIN
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def of(directory: pathlib.Path) -> "Ranges | None":
    """Reads what `directory` holds outlines of; None where its files are whole."""
    origin = _origin(directory)
    return Ranges(origin["place"]) if origin else None


class Ranges:
    """The safetensors files at an address."""

    def __init__(self, place: str):
        self._place = place
        with objects.reached("config.model.path", place):
            self._store, self._root = objects.file_system(place)
        self._pool = concurrent.futures.ThreadPoolExecutor(REQUESTS)
        self._header = functools.cache(_header)
        self.bytes = 0  # read so far

    def slice(self, outline: pathlib.Path, name: str) -> "Slice":
        """A tensor of the file of which there is `outline`."""
        return Slice(self, outline.name, *self._header(outline)[name])

    def read(self, file: str, start: int, end: int) -> bytearray:
        """The bytes from `start` to `end`, by several requests where they are many.

        Raises:
          UserFileError: the store does not give them, nor after some tries.
        """
        found = bytearray(end - start)

        def fetch(first: int) -> None:
            last = min(first + _PIECE, end)
            found[first - start : last - start] = self._request(f"{self._root}/{file}", first, last)

        with objects.reached("config.model.path", self._place):
            list(self._pool.map(fetch, range(start, end, _PIECE)))
        self.bytes += end - start
        return found

    def _request(self, path: str, start: int, end: int) -> bytes:
        def ask() -> bytes:
            content = self._store.cat_file(path, start=start, end=end)
            if len(content) != end - start:
                raise OSError(errno.EIO, f"{len(content)} bytes of {end - start}", path)
            return content

        return retried(ask)


class Slice:
    """A tensor as safetensors' get_slice gives it: shape, dtype, and parts, of which rows are read that hold them."""

    def __init__(self, ranges: Ranges, file: str, dtype: str, shape: tuple[int, ...], offset: int):
        self._ranges, self._file, self._dtype, self._shape, self._offset = ranges, file, dtype, shape, offset

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._dtype

    def __getitem__(self, parts: slice | tuple[slice, ...]) -> np.ndarray:
        parts = parts if isinstance(parts, tuple) else (parts,)
        first, last, _ = parts[0].indices(self._shape[0])
        dtype = np.dtype(_DTYPES[self._dtype])
        row = math.prod(self._shape[1:]) * dtype.itemsize
        content = self._ranges.read(self._file, self._offset + first * row, self._offset + last * row)
        return np.frombuffer(content, dtype).reshape(last - first, *self._shape[1:])[(slice(None), *parts[1:])]


def _header(outline: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """(dtype, shape, offset in the file) of each tensor."""
    with outline.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }

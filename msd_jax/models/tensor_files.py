"""The safetensors files of a model directory: which tensor is in which, found without trusting what they say."""

import collections
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import safetensors

from msd_jax.errors import UserError, UserFileError
from msd_jax.io import ranges
from msd_jax.models import layout

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an open file, under the name that it has there; read by `far` where the file is an outline."""

    path: pathlib.Path
    name: str
    file: Any
    far: ranges.Ranges | None = None

    def slice(self) -> Any:
        """Its shape, dtype and parts, without reading the whole."""
        return self.far.slice(self.path, self.name) if self.far else self.file.get_slice(self.name)

    def whole(self) -> np.ndarray:
        return self.far.slice(self.path, self.name)[:] if self.far else self.file.get_tensor(self.name)


def open_all(directory: pathlib.Path) -> dict[str, Tensor]:
    """Every tensor, by the name that layout.layout gives it; reads headers alone.

    Raises:
      UserError: as `find`, or the directory holds one under two names.
    """
    found = find(directory)
    files = {path: safetensors.safe_open(path, framework="np") for path in set(found.values())}
    tensors: dict[str, Tensor] = {}
    for name, path in found.items():
        tensor = layout.in_file(name)
        if tensor in tensors:
            raise UserError(f"{path}: {name} and {tensors[tensor].name} are the same tensor of the decoder")
        tensors[tensor] = Tensor(path, name, files[path], ranges.of(directory))
    return tensors


def find(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The safetensors file of each tensor, from headers alone.

    Raises:
      UserError: a file is missing, truncated or not safetensors, or the index does not fit the files.
    """
    if not (directory / INDEX).is_file() or has_stale_index(directory):
        path = directory / WHOLE
        return dict.fromkeys(_tensor_names(directory, path), path)
    weight_map = _read_index(directory / INDEX)
    found: dict[str, pathlib.Path] = {}
    for file in sorted(set(weight_map.values())):
        for tensor in _tensor_names(directory, directory / file):
            if weight_map.get(tensor) != file:
                raise UserError(f"{directory / file} holds {tensor}, which {INDEX} does not expect there")
            found[tensor] = directory / file
    return found


def has_stale_index(directory: pathlib.Path) -> bool:
    """Whether an index beside model.safetensors speaks of other files: one that was left when the model was replaced.

    transformers reads model.safetensors then, too.
    """
    if not ((directory / WHOLE).is_file() and (directory / INDEX).is_file()):
        return False
    return WHOLE not in _read_index(directory / INDEX).values()


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """The file name of each tensor."""
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is not a safetensors index ({error!r})") from error
    for name in set(weight_map.values()):
        if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} points to {name!r}, which is not a .safetensors file beside it")
    return weight_map


def _check_link(directory: pathlib.Path, path: pathlib.Path) -> None:
    """Refuses a link out of the model's directory, unless into blobs/ of the hub's cache, where snapshots link to."""
    root = directory.resolve()
    allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise UserError(f"{path} is a link to {path.resolve()}, outside the model's directory; copy the file into it")


def _tensor_names(directory: pathlib.Path, path: pathlib.Path) -> list[str]:
    """Names of the tensors in a file of a model's directory; the library checks header, offsets and length."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, count in collections.Counter(name for name, _ in pairs).items():
            if count > 1:
                raise UserError(f"{path} holds {name} twice")
        return dict(pairs)

    if not path.is_file():
        pickled = sorted(p.name for p in directory.glob("*.bin"))
        hint = f"; {', '.join(pickled)} will not be opened: convert to safetensors" if pickled else ""
        raise UserFileError(f"{path} is missing{hint}")
    _check_link(directory, path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=unique)
    return names

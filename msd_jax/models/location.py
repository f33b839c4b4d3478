"""Where a model is: a directory of this machine or of an object store, or an id of the Hugging Face hub."""

import pathlib
import re

from msd_jax.errors import UserFileError
from msd_jax.io import snapshots

# The files of a model directory beside its weights; none that holds code or pickles.
COMPANIONS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
# Those of them that are the tokenizer's.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *COMPANIONS[1:],
)


def is_local(path: str) -> bool:
    """Whether config.model.path is a directory; otherwise it is the hub id (owner/name) of a model.

    Raises:
      UserFileError: it is neither.
    """
    if not path:
        raise UserFileError("config.model.path is empty: give a Hugging Face model directory or a hub id (owner/name)")
    if pathlib.Path(path).expanduser().is_dir():
        return True
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        raise UserFileError(f"config.model.path={path!r} is neither a directory nor a hub id (owner/name)")
    return False


def resolve(path: str) -> pathlib.Path:
    """The local directory of a model: `path` itself, a copy of what a store has at that address, or a hub's snapshot.

    HF_HUB_OFFLINE is respected.

    Raises:
      UserError: `path` is none of these, or store or hub do not give it.
    """
    if "://" in path:
        return snapshots.fetch_stored("config.model.path", path, ["*.safetensors", *COMPANIONS])
    if is_local(path):
        return pathlib.Path(path).expanduser()
    try:
        return snapshots.fetch(path, ["*.safetensors", *COMPANIONS])
    except Exception as error:  # the hub's own errors are many; what the user can do is always the same
        raise UserFileError(
            f"config.model.path={path!r} is not a directory here, and the hub did not give it "
            f"({type(error).__name__}); copy the model to this machine and give its directory"
        ) from error

"""Datasets on the Hugging Face hub: hf://OWNER/NAME[@REVISION][/PATH] -> files on this machine."""

import pathlib
import shlex
from collections.abc import Iterable

from msd_jax.errors import UserError, UserFileError
from msd_jax.io import snapshots

# The data files of a repository; the rest (archives, pictures, scripts) is not downloaded.
DATA_FILES = ("*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.xlsx")


def is_uri(path: object) -> bool:
    return str(path).startswith("hf://")


def fetch(uri: str, files: Iterable[str] = DATA_FILES, key: str = "config.data.path") -> pathlib.Path:
    """Downloads what the local cache of the hub lacks.

    HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME are respected.

    Args:
      uri: hf://OWNER/NAME, with @REVISION for a branch, tag or commit other than main, and /PATH for one file or
        directory. The last part of PATH may have wildcards, as in hf://OWNER/NAME/data/train-*.parquet.
      files: patterns of the files to take if `uri` names a whole repository or a directory.
      key: the setting that errors name.

    Returns:
      The local file, directory, or path with its wildcards, which at least one file matches. The commit is part of it.

    Raises:
      UserError: `uri` is malformed.
      UserFileError: neither the hub nor the cache has it; the message names both ways to get it.
    """
    from huggingface_hub.utils import parse_hf_uri  # here, for files on this machine do without

    given = f"{key}={uri!r}"
    try:
        place = parse_hf_uri("hf://datasets/" + uri.removeprefix("hf://").removeprefix("datasets/"))
    except ValueError as error:
        raise UserError(f"{given}: write hf://OWNER/NAME[@REVISION][/PATH] ({_first_line(error)})") from None
    path = place.path_in_repo
    patterns = [path, *(f"{path}/{pattern}" for pattern in files)] if path else list(files)
    try:
        snapshot = snapshots.fetch(place.id, patterns, "dataset", place.revision)
    except Exception as error:  # the hub's own errors are many; what the user can do is always the same
        revision = f" --revision {shlex.quote(place.revision)}" if place.revision else ""
        raise UserFileError(
            f"{given}: neither the hub nor its cache on this machine has it ({type(error).__name__}). Either run `hf "
            f"download --repo-type dataset {place.id}{revision}` with network access (after `hf auth login` if the "
            f"dataset is gated), into the cache (HF_HOME) that this machine reads; or copy the dataset here and give "
            f"its path: {key}=PATH"
        ) from error
    found = pathlib.Path(snapshot, path)
    if not any(found.parent.glob(found.name)):
        raise UserFileError(f"{given}: the dataset {place.id} has no {path!r}")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip()

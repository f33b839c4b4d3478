"""Data sets of the Hugging Face hub: hf://OWNER/NAME[@REVISION][/PATH] -> files on this machine."""

import pathlib
import shlex
from collections.abc import Iterable

from msd_jax.errors import UserError, UserFileError

# What of a repository is data; the rest (archives, pictures, scripts) stays on the hub.
DATA_FILES = ("*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.xlsx")


def is_uri(path: object) -> bool:
    return str(path).startswith("hf://")


def fetch(uri: str, files: Iterable[str] = DATA_FILES, key: str = "config.data.path") -> pathlib.Path:
    """Downloads what is not in the hub's local cache, and returns where it lies.

    HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME are respected. The path of the result holds the commit.

    Args:
      uri: hf://OWNER/NAME, at @REVISION (a branch, tag or commit; the default is main), /PATH for one file or folder of
        it. The last part of PATH may have wildcards, as in hf://OWNER/NAME/data/train-*.parquet.
      files: patterns of the files to take where `uri` names a whole repository or a folder.
      key: the setting that errors name.

    Returns:
      The file, the folder, or the path with its wildcards, of which at least one file is there.

    Raises:
      UserError: `uri` is malformed.
      UserFileError: neither the hub nor the cache has it; the message says both ways to get it.
    """
    import huggingface_hub
    from huggingface_hub.utils import parse_hf_uri

    given = f"{key}={uri!r}"
    try:
        place = parse_hf_uri("hf://datasets/" + uri.removeprefix("hf://").removeprefix("datasets/"))
    except ValueError as error:
        raise UserError(f"{given}: write hf://OWNER/NAME[@REVISION][/PATH] ({_first_line(error)})") from None
    path = place.path_in_repo
    patterns = [path, *(f"{path}/{pattern}" for pattern in files)] if path else list(files)
    try:
        snapshot = huggingface_hub.snapshot_download(
            place.id, repo_type="dataset", revision=place.revision, allow_patterns=patterns
        )
    except Exception as error:  # the hub's own errors are many; what the user can do is always the same
        revision = f" --revision {shlex.quote(place.revision)}" if place.revision else ""
        raise UserFileError(
            f"{given}: neither the hub nor its cache on this machine gave it ({type(error).__name__}). Either run `hf "
            f"download --repo-type dataset {place.id}{revision}` where there is network (and `hf auth login` before, "
            f"where the set asks for it), in the cache (HF_HOME) that this machine reads; or copy the set here by any "
            f"other way and give its path: {key}=PATH"
        ) from error
    found = pathlib.Path(snapshot, path)
    if not any(found.parent.glob(found.name)):
        raise UserFileError(f"{given}: the set {place.id} is there, but has no {path!r} in it")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip()

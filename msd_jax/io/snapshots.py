"""Downloads from the hub and object stores: one process of a machine fetches, the others wait and find the files."""

import concurrent.futures
import contextlib
import fnmatch
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator

from msd_jax.errors import UserFileError
from msd_jax.io import objects, ranges
from msd_jax.parallel import peers

_WEIGHTS = ".safetensors"
LONGEST_WAIT = 6 * 3600  # seconds; a lock that is held for longer belongs to a process that hangs


def fetch(name: str, patterns: Iterable[str], kind: str = "model", revision: str | None = None) -> pathlib.Path:
    """The local snapshot of a repository; HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME are respected.

    Args:
      name: OWNER/NAME.
      patterns: of the files to take.
      kind: model or dataset.
      revision: branch, tag or commit; None for main.

    Raises:
      Exception: as huggingface_hub raises them, many and of many types.
    """
    import huggingface_hub  # here, for files on this machine do without

    with peers.unhurried(f"downloading {name}"), _alone(f"{kind}s--{name.replace('/', '--')}"):
        found = huggingface_hub.snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=list(patterns)
        )
    return pathlib.Path(found)


def fetch_stored(name: str, place: str, patterns: Iterable[str]) -> pathlib.Path:
    """A local copy of a directory of an object store, below HF_HOME; what has changed there is fetched anew.

    Of weights (*.safetensors) it has outlines, see ranges.py.

    Args:
      name: of the key or flag that `place` is the value of.
      place: SCHEME://BUCKET/PATH.
      patterns: of the files to take.

    Raises:
      UserError: the store cannot be reached, or has none of the files.
    """
    from huggingface_hub import constants

    with objects.reached(name, place):
        store, root = objects.file_system(place)
        files = store.find(root, maxdepth=1, detail=True)
        files = {path.rpartition("/")[2]: facts for path, facts in files.items()}
        files = {file: facts for file, facts in files.items() if any(fnmatch.fnmatch(file, p) for p in patterns)}
        if not files:
            raise UserFileError(f"{name}={place} holds none of {', '.join(patterns)}")
        versions = sorted(
            (file, facts["size"], facts.get("md5Hash") or facts.get("ETag") or facts.get("etag"))
            for file, facts in files.items()
        )
        content = hashlib.sha256(json.dumps([place.rstrip("/"), versions]).encode()).hexdigest()[:16]
        directory = pathlib.Path(constants.HF_HOME, "stores", content, root.rpartition("/")[2])
        with peers.unhurried(f"downloading {place}"), _alone(f"store--{content}"):
            if not directory.exists():
                unfinished = directory.with_name("unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)

                def take(file: str) -> None:
                    if file.endswith(_WEIGHTS):
                        ranges.outline(store, f"{root}/{file}", files[file]["size"], unfinished / file)
                    else:
                        store.get_file(f"{root}/{file}", str(unfinished / file))

                with concurrent.futures.ThreadPoolExecutor(8) as pool:
                    list(pool.map(take, files))
                weights = {file: f"{size}:{tag}" for file, size, tag in versions if file.endswith(_WEIGHTS)}
                if weights:
                    ranges.keep_origin(unfinished, place, weights)
                unfinished.rename(directory)
    return directory


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Waits until no other process that shares the hub's cache is inside. A cache that cannot be written needs none."""
    import filelock
    from huggingface_hub import constants

    directory = pathlib.Path(constants.HF_HUB_CACHE, ".locks")
    lock = filelock.FileLock(directory / f"msd_jax--{name}.lock", timeout=LONGEST_WAIT)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()

"""Downloads from the Hugging Face hub: one process of a machine fetches, the others wait and find the files there."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator

from msd_jax.parallel import peers

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

"""Where a run may read and write: directories of this machine, mounted buckets and, for some flags, object stores."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msd_jax.errors import UserError


def require_directory(name: str, place: str, schemes: Iterable[str] = ()) -> None:
    """Refuses addresses of other schemes, which would otherwise become a local directory called `gs:`.

    Args:
      name: the flag or key that `place` is the value of.
      place: one path, or several with commas between them.
      schemes: those that are read, such as "hf".

    Raises:
      UserError: `place` begins with another scheme; the message says what to do instead.
    """
    for part in place.split(","):
        scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):(//?)", part)
        if not scheme or (scheme[1] in schemes and scheme[2] == "//"):
            continue
        mount = {"gs": "with gcsfuse", "s3": "with mount-s3"}.get(scheme[1], "as a file system")
        raise UserError(
            f"{name}={place}: {scheme[1]}:// is not read or written directly; mount it {mount} and give the path below "
            "the mount point (launch/tpu_vm.sh and launch/gke_jobset.sh mount BUCKET at /mnt/runs: /mnt/runs/NAME)"
        )


def faults(
    name: str, section: Any, keys: Iterable[str], schemes: Iterable[str], others: Mapping[str, Iterable[str]]
) -> Iterator[str]:
    """A line for each value of `keys`, in a config or a section of it, that `require_directory` refuses.

    Args:
      name: of the section.
      section: the config, or a section of it.
      keys: whose values are paths.
      schemes: those that are read.
      others: by full name, keys for which other schemes are read.
    """
    for key, value in section.items():
        full = f"{name}.{key}"
        if hasattr(value, "items"):
            yield from faults(full, value, keys, schemes, others)
        elif key in keys and isinstance(value, str):
            try:
                require_directory(full, value, others.get(full, schemes))
            except UserError as error:
                yield str(error)

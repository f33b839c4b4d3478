"""Object stores as fsspec gives them, and their errors in one line."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from msd_jax.errors import UserError, UserFileError

SCHEMES = ("gs", "s3", "az")
_NEEDED = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # to be installed


@contextlib.contextmanager
def reached(flag: str, place: str) -> Iterator[None]:
    """Around work with a store: whatever its library raises is a UserError that names `place` and its flag or key."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        needed = _NEEDED[place.partition(":")[0]]
        raise UserError(f"{flag}={place} needs {needed}: pip install {needed}") from error
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserFileError(f"{flag}={place} cannot be reached: {text[:300]}") from error


def file_system(place: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    # Of gcsfs the client that has been there for long: the other one asks for each bucket by gRPC what kind it is.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec  # and by it the library of the store

    # For epath too: what a listing remembers would lack what other processes have written.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    scheme, _, path = place.partition("://")
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True), path.rstrip("/")

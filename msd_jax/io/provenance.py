"""What a result came from: versions, commit, devices, date, command, seed and hashes, a row for each start of a run."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from msd_jax.io import jsonl
from msd_jax.parallel import distributed

FILE = "provenance.jsonl"
_PACKAGES = (
    *("msd-jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax"),
    *("orbax-checkpoint", "grain", "tensorflow-datasets", "transformers", "safetensors", "numpy"),
)


def record(directory: pathlib.Path, seed: int, hashes: Mapping[str, str]) -> None:
    """Adds a row to DIRECTORY/provenance.jsonl; process 0 writes.

    Args:
      directory: of the run, or of the evaluation.
      seed: config.seed.
      hashes: of the model's files and of the data, by what the user knows them by.
    """
    if distributed.is_first():
        jsonl.JsonLines(directory / FILE).append([_row() | {"seed": seed, "hashes": dict(hashes)}])


def _row() -> jsonl.Row:
    device = jax.devices()[0]
    return {
        "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "versions": {"python": platform.python_version()} | versions(),
        "commit": commit(pathlib.Path(__file__).parent),
        "devices": {
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "platform": str(getattr(device.client, "platform_version", device.platform)).split("\n")[0].strip(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def command() -> str | None:
    """The command line that repeats this process; None where it is no command of this package."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("msd_jax."):
        return None
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Those of the packages that decide what is computed, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(directory: pathlib.Path) -> dict[str, Any] | None:
    """{"id", "dirty"} of the git checkout that tracks the code in `directory`, or that it was installed from."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "provenance.py")  # a venv may lie in a checkout of something else
        return {
            "id": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", ":/")),
        }
    except (OSError, subprocess.SubprocessError):
        return _installed_from()


def _installed_from() -> dict[str, Any] | None:
    """What pip noted of `pip install git+https://...`."""
    try:
        noted = importlib.metadata.distribution("msd-jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    id_ = json.loads(noted or "{}").get("vcs_info", {}).get("commit_id")
    return {"id": id_, "dirty": False} if id_ else None

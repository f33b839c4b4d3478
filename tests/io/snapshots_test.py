"""Of several processes that share a cache, one downloads at a time."""

import pathlib
import subprocess
import sys

import huggingface_hub
from huggingface_hub import constants

from msd_jax.io import snapshots
from tests.conftest import REPOSITORY

DOWNLOAD = """
import pathlib, sys, time

import huggingface_hub
from huggingface_hub import constants

from msd_jax.io import snapshots

cache = constants.HF_HUB_CACHE = sys.argv[1]

def download(name, **options):
    inside, done = pathlib.Path(cache, "inside"), pathlib.Path(cache, "done")
    inside.touch(exist_ok=False)  # fails where another process is here
    if not done.exists():
        time.sleep(0.5)
        print("fetched")
        done.touch()
    inside.unlink()
    return cache

huggingface_hub.snapshot_download = download
print(snapshots.fetch("owner/name", ["*.json"]))
"""


def test_one_process_fetches_and_the_others_wait(tmp_path):
    command = [sys.executable, "-c", DOWNLOAD, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate(timeout=300)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert sum("fetched" in lines for lines in printed) == 1
    assert all(lines[-1] == str(tmp_path) for lines in printed)


def test_a_cache_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: tmp_path)
    assert snapshots.fetch("owner/name", ["*.json"]) == pathlib.Path(tmp_path)

"""Object stores are refused in one line that says what to do, where they are not supported."""

import os
import subprocess
import sys

import pytest

from msd_jax.io import places
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    "place, mount", [("gs://b/x", "gcsfuse"), ("s3://b/x", "mount-s3"), ("gs:/b", "gcsfuse"), ("r/a,gs://b", "gcsfuse")]
)
def test_an_object_store_is_refused(place, mount):
    with pytest.raises(ValueError, match=rf"^--workdir={place}: .* mount it with {mount} .* /mnt/runs/NAME\)$"):
        places.require_directory("--workdir", place)


@pytest.mark.parametrize("place", ["", "runs/x", "/mnt/runs/x", "~/runs", "runs/a:b", "runs/a,runs/b", r"C:\runs"])
def test_directories_are_not(place):
    places.require_directory("--workdir", place)
    places.require_directory("config.data.path", "hf://owner/name", ("hf",))
    places.require_directory("--workdir", "gs://b/x", ("gs", "s3"))


@pytest.mark.parametrize(
    "command",
    [
        "main --config configs/quickstart.py --workdir ftp://bucket/run",
        "evaluate --config configs/quickstart.py --out gs:/bucket/evaluation",
        "export --config configs/quickstart.py --checkpoint ftp://bucket/run/checkpoints/3 --out x",
        "report --workdir runs/a,ftp://bucket/run",
        "topology --config configs/qwen2_5_7b.py --workdir s3://bucket/run",  # several machines
        "judges --agreement s3://bucket/labels.csv",
        "queries --build gs://bucket/queries.csv",
    ],
)
def test_by_every_command(command):
    done = subprocess.run(
        [sys.executable, "-m", *f"msd_jax.{command}".split()],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --") and "is not read or written directly" in line
    assert not (REPOSITORY / "gs:").exists()

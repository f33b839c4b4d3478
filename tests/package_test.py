"""What the package says of itself, and what importing it costs."""

import importlib.metadata
import subprocess
import sys

import pytest

import msd_jax
from tests.conftest import REPOSITORY


def test_the_version_is_one():
    assert msd_jax.__version__ == importlib.metadata.version("msd-jax")


def test_the_metadata_is_whole(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # which pyproject.toml asks for where the package is built
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    text = (tmp_path / "msd_jax.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    metadata = importlib.metadata.PathDistribution(tmp_path / "msd_jax.egg-info").metadata
    assert metadata["Version"] == msd_jax.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert "Paper, https://arxiv.org/abs/2605.02971" in metadata.get_all("Project-URL")
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert not any(name.startswith("License ::") for name in metadata.get_all("Classifier"))  # the expression says it
    assert "## Only the loss" in text


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        (
            "msd_jax",
            ("flax", "optax", "transformers", "tensorflow_datasets", "matplotlib", "scipy.special"),
        ),
        (
            "msd_jax.report",
            ("tensorflow_datasets", "grain", "orbax", "transformers", "scipy.special", "matplotlib"),
        ),
        ("msd_jax.main", ("tensorflow_datasets", "tensorboardX", "matplotlib", "torch", "lm_eval")),
    ],
)
def test_importing_is_cheap(module, spared):
    code = f"import sys, {module}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in spared if name in imported]

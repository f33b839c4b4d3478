"""Recipes, a compiled program made up by hand, and slices to compile for."""

import importlib
import importlib.util
import os
from collections.abc import Callable

import jax
import ml_collections
import pytest

from msd_jax.parallel import sharding
from msd_jax.planning import hardware, pod
from msd_jax.planning.compiled import GIB, CompiledProgram

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'msd-jax[plan]'"
)

needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's plugin for CUDA is not installed: pip install 'msd-jax[cuda]'",
)

COMPILED = CompiledProgram(
    peak_hbm_bytes=10 * GIB,
    resident_hbm_bytes=2 * GIB,
    fits=True,
    flops=1e12,
    hbm_traffic_bytes=10**12,
    collective_bytes={"all-gather": 10**9},
    dcn_bytes=0,
    seconds={"compute": 0.5, "hbm": 1.2, "ici": 0.1, "dcn": 0.0},
    compile_seconds=1.0,
    largest_buffers=((GIB, "f32[3]"),),
)


def recipe(name: str, *variant: str, **values) -> ml_collections.FrozenConfigDict:
    config = importlib.import_module(f"msd_jax.configs.{name}").get_config(*variant)
    config.update_from_flattened_dict(values)
    return ml_collections.FrozenConfigDict(config)


@pytest.fixture
def smoke(model_dir, tmp_path, monkeypatch) -> Callable[..., ml_collections.FrozenConfigDict]:
    """A recipe's smoke variant, on a model whose axes divide by two."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda **values: recipe("qwen2_5_7b", "smoke", **{"model.path": str(model_dir)} | values)


@pytest.fixture
def v5e_8() -> pod.Pod:
    """Eight chips, with the CPU's devices in their place."""
    return pod.Pod("v5e:2x4", 1, sharding.make_mesh(1, 4, 2))


@pytest.fixture
def two_h100_nodes() -> pod.Pod:
    """Two nodes of four GPUs, with the CPU's devices in their place."""
    return pod.Pod("h100:4x2", 2, sharding.make_mesh(2, 4, 1))


@pytest.fixture
def fake_slices(monkeypatch) -> None:
    """The CPU's devices in place of a slice's."""

    def devices(topology: str, slices: int = 1) -> list[jax.Device]:
        return jax.devices()[: hardware.parse_slice(topology).chips * slices]

    monkeypatch.setattr(pod, "compile_only_devices", devices)


@pytest.fixture
def tpu_slice(monkeypatch):
    """pod.compile_only_devices, which removes XLA_FLAGS for good; the flags are restored afterwards."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    return pod.compile_only_devices

"""Where the pod comes from, and its errors."""

import importlib.util

import pytest

from msd_jax.planning import pod
from tests.planning.conftest import recipe


def test_flags_come_before_config_launch(fake_slices):
    config = recipe("gemma3_1b")
    config, planned = pod.make_pod(config, "", "")
    assert (planned.topology, planned.slices, planned.device_count) == ("v5e:2x4", 1, 8)
    config, planned = pod.make_pod(config, "v6e:2x2", "1,2,2")
    assert planned.topology == "v6e:2x2" and dict(planned.mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2}
    assert {axis: config.mesh[axis] for axis in planned.mesh.shape} == dict(planned.mesh.shape)


@pytest.mark.parametrize("mesh", ["4,2", "a,b,c", "1x2x4"])
def test_not_a_mesh(mesh, fake_slices):
    with pytest.raises(ValueError, match=r"--mesh=\S+: give data,fsdp,tensor"):
        pod.make_pod(recipe("gemma3_1b"), "", mesh)


def test_a_config_for_gpus_does_not_say_which(fake_slices):
    config = recipe("gemma3_1b", **{"launch.accelerator": "gpu", "launch.nodes": 4})
    with pytest.raises(ValueError, match=r"config.launch.accelerator='gpu': .*, as in --topology h100:8x4"):
        pod.make_pod(config, "", "")
    assert pod.make_pod(config, "v5e:2x4", "")[1].device_count == 8


def test_without_libtpu_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'msd-jax\[plan\]'"):
        pod.compile_only_devices("v5e:2x2")

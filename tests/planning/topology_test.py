"""Slices in the words of gcloud and GKE, against their published names."""

import pytest
from msd_jax.configs import default

from msd_jax.planning import topology


@pytest.mark.parametrize(
    "name, chips, hosts, accelerator_type, gke_accelerator, machine_type",
    [
        ("v4:2x2x4", 16, 4, "v4-32", "tpu-v4-podslice", "ct4p-hightpu-4t"),
        ("v5e:1x1", 1, 1, "v5litepod-1", "tpu-v5-lite-podslice", "ct5lp-hightpu-1t"),
        ("v5e:2x4", 8, 1, "v5litepod-8", "tpu-v5-lite-podslice", "ct5lp-hightpu-8t"),
        ("v5e:8x8", 64, 16, "v5litepod-64", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
        ("v5e:16x16", 256, 64, "v5litepod-256", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
        ("v5p:2x2x2", 8, 2, "v5p-16", "tpu-v5p-slice", "ct5p-hightpu-4t"),
        ("v6e:4x4", 16, 4, "v6e-16", "tpu-v6e-slice", "ct6e-standard-4t"),
    ],
)
def test_a_slice(name, chips, hosts, accelerator_type, gke_accelerator, machine_type):
    slice_ = topology.parse(name)
    assert (slice_.chips, slice_.hosts, slice_.accelerator_type) == (chips, hosts, accelerator_type)
    assert (slice_.generation.gke_accelerator, slice_.machine_type) == (gke_accelerator, machine_type)


def test_the_seventh_generation_has_two_devices_a_chip_and_no_tpu_vms():
    slice_ = topology.parse("tpu7x:4x4x4")
    assert (slice_.chips, slice_.hosts, slice_.machine_type) == (64, 16, "tpu7x-standard-4t")
    assert slice_.accelerator_type is None


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e-64", "v3:2x2", "v5e:8x", "v5e:0x8", "v5e:2x2x2", "v5p:4x4", "v5e:3x3"]
)
def test_what_is_no_slice(name):
    with pytest.raises(ValueError, match=rf"config.launch.topology='{name}'"):
        topology.parse(name)


def test_devices_of_all_slices_or_machines():
    launch = default.get_config().launch
    launch.topology, launch.slices = "v5e:4x4", 4
    assert topology.devices(launch) == 64
    launch.topology = "tpu7x:2x2x1"
    assert topology.devices(launch) == 32
    launch.accelerator, launch.nodes, launch.gpus_per_node = "gpu", 4, 8
    assert topology.devices(launch) == 32
    launch.gpus_per_node = 0
    assert topology.devices(launch) == 4

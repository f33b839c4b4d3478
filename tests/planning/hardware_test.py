"""Slices in the terms of gcloud and GKE, against their published names; and the table's figures."""

import pytest

from msd_jax.planning import hardware


@pytest.mark.parametrize(
    "topology, chips, hosts, accelerator_type, gke_accelerator, machine_type",
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
def test_a_slice(topology, chips, hosts, accelerator_type, gke_accelerator, machine_type):
    slice_ = hardware.parse_slice(topology)
    assert (slice_.chips, slice_.hosts, slice_.accelerator_type) == (chips, hosts, accelerator_type)
    assert (slice_.generation.gke_accelerator, slice_.gke_machine_type) == (gke_accelerator, machine_type)
    assert slice_.devices == chips


def test_the_seventh_generation_has_two_devices_per_chip_and_no_tpu_vms():
    slice_ = hardware.parse_slice("tpu7x:4x4x4")
    assert (slice_.chips, slice_.hosts, slice_.gke_machine_type) == (64, 16, "tpu7x-standard-4t")
    assert slice_.devices == 128
    assert slice_.accelerator_type is None


@pytest.mark.parametrize(
    "topology", ["", "v5e", "v5e-64", "v3:2x2", "v5e:8x", "v5e:0x8", "v5e:2x2x2", "v5p:4x4", "v5e:3x3"]
)
def test_not_a_slice(topology):
    with pytest.raises(ValueError, match=rf"config.launch.topology='{topology}'"):
        hardware.parse_slice(topology)


@pytest.mark.parametrize("generation", hardware.GENERATIONS.values(), ids=lambda generation: generation.name)
def test_the_figures_of_a_generation_have_the_right_units(generation):
    device = generation.device
    assert device.flops / device.hbm_bandwidth > 100  # FLOPs per byte
    assert device.hbm_bytes > 15 * 2**30
    assert device.torus_axes == generation.shape_axes


@pytest.mark.parametrize("gpu", hardware.GPUS.values(), ids=lambda gpu: gpu.name)
def test_the_figures_of_a_gpu_have_the_right_units(gpu):
    device = gpu.device
    assert 100 < device.flops / device.hbm_bandwidth < 400  # FLOPs per byte
    assert 60 * 2**30 < device.hbm_bytes < 130 * 2**30
    assert device.hbm_bandwidth > device.ici_bandwidth > device.dcn_bandwidth


@pytest.mark.parametrize(
    "kind, name", [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100")]
)
def test_a_gpu_is_found_by_what_jax_calls_it(kind, name):
    assert hardware.find_gpu(kind) is hardware.GPUS[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU v5 lite"])
def test_other_devices_have_no_figures(kind):
    assert hardware.find_gpu(kind) is None


@pytest.mark.parametrize(
    "kind, name, per_chip",
    [("TPU v5 lite", "v5e", 1), ("TPU v5", "v5p", 1), ("TPU v6e", "v6e", 1), ("TPU7x", "tpu7x", 2)],
)
def test_the_peak_of_a_device(kind, name, per_chip):
    device = hardware.GENERATIONS[name].device
    assert hardware.peak(kind) == (device.flops, device.hbm_bandwidth, per_chip)


def test_the_peak_of_a_gpu():
    device = hardware.GPUS["h200"].device
    assert hardware.peak("NVIDIA H200") == (device.flops, device.hbm_bandwidth, 1)


def test_the_peak_of_an_unknown_device_is_not_guessed():
    assert hardware.peak("cpu") is None and hardware.peak("TPU v5 something") is None

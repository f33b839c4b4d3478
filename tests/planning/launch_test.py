"""config.launch as a number of devices; the scripts that use its facts are tested in tests/launch."""

from msd_jax.configs import default

from msd_jax.planning import launch


def test_devices_of_all_slices_or_nodes():
    config = default.get_config().launch
    config.topology, config.slices = "v5e:4x4", 4
    assert launch.device_count(config) == 64
    config.topology = "tpu7x:2x2x1"
    assert launch.device_count(config) == 32
    config.accelerator, config.nodes, config.gpus_per_node = "gpu", 4, 8
    assert launch.device_count(config) == 32
    config.gpus_per_node = 0
    assert launch.device_count(config) == 4

"""config.launch as a number of devices; the scripts that use its facts are tested in tests/launch."""

import pytest
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


@pytest.mark.parametrize("mesh, fits", [((1, 32, 1), True), ((4, 8, 1), True), ((2, 2, 8), True), ((1, 2, 16), False)])
def test_gpus_of_a_machine_share_tensor_and_machines_share_the_rest(mesh, fits):
    config = default.get_config()
    config.launch.accelerator, config.launch.nodes = "gpu", 4
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    if fits:
        assert launch.facts(config) == {"ACCELERATOR": "gpu", "NODES": 4, "GPUS_PER_NODE": 8}
    else:
        with pytest.raises(ValueError, match="over 4 machines: data x fsdp must be a multiple of 4"):
            launch.facts(config)

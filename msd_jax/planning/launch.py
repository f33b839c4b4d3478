"""config.launch in the terms of gcloud, GKE and Slurm, for the scripts in launch/."""

import math

import ml_collections

from msd_jax.errors import UserError
from msd_jax.parallel import sharding
from msd_jax.planning import hardware

ACCELERATORS = ("tpu", "gpu")  # of config.launch.accelerator


def device_count(launch: ml_collections.ConfigDict) -> int:
    """JAX devices of all slices or nodes of config.launch."""
    if launch.accelerator == "gpu":
        return launch.nodes * max(launch.gpus_per_node, 1)
    return hardware.parse_slice(launch.topology).devices * launch.slices


def machines(launch: ml_collections.ConfigDict) -> int:
    """Hosts of all slices, or nodes, of config.launch."""
    return launch.nodes if launch.accelerator == "gpu" else hardware.parse_slice(launch.topology).hosts * launch.slices


def facts(config: ml_collections.ConfigDict) -> dict[str, str | int]:
    """NAME -> value for the scripts in launch/.

    Raises:
      UserError: config.launch.topology is not a slice, or config.mesh does not fit it.
    """
    launch = config.launch
    _check_mesh(config)
    if launch.accelerator == "gpu":
        return {"ACCELERATOR": "gpu", "NODES": launch.nodes, "GPUS_PER_NODE": launch.gpus_per_node}
    slice_ = hardware.parse_slice(launch.topology)
    return {
        "ACCELERATOR": "tpu",
        "SLICES": launch.slices,
        "HOSTS": slice_.hosts,  # per slice
        "CHIPS_PER_HOST": slice_.chips_per_host,
        "ACCELERATOR_TYPE": slice_.accelerator_type or "",
        "RUNTIME_VERSION": slice_.generation.runtime or "",
        "GKE_ACCELERATOR": slice_.generation.gke_accelerator,
        "GKE_TOPOLOGY": launch.topology.partition(":")[2],
        "MACHINE_TYPE": slice_.gke_machine_type,
    }


def _check_mesh(config: ml_collections.ConfigDict) -> None:
    sizes, devices = [config.mesh[axis] for axis in ("data", "fsdp", "tensor")], device_count(config.launch)
    fixed = math.prod(size for size in sizes if size != -1)
    mesh = f"config.mesh={'x'.join(map(str, sizes))} (data x fsdp x tensor)"
    if (fixed != devices and -1 not in sizes) or devices % fixed:
        raise UserError(
            f"{mesh} does not fit the {devices} devices of config.launch: the product must be {devices}; -1 stands for "
            "what is left"
        )
    filled = [devices // fixed if size == -1 else size for size in sizes]
    tpu = config.launch.accelerator == "tpu"
    islands = config.launch.slices if tpu else config.launch.nodes
    sharding.across_islands(filled, islands, tpu=tpu)
    asked = config.mesh.rollout_tensor, config.mesh.rollout_ffw
    sharding.rollout_sizes(filled[-1], *asked, devices // islands)

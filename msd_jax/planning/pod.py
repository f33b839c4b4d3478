"""The pod that a run is planned for: its TPU slices or GPU nodes, the mesh over them, and devices to compile for."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from msd_jax.errors import UserError
from msd_jax.parallel import sharding
from msd_jax.planning import gpus, hardware


@dataclasses.dataclass(frozen=True)
class Pod:
    """What a run is planned for.

    Attributes:
      topology: of one TPU slice, see hardware.parse_slice, or of all GPU nodes, see gpus.parse_nodes.
      slices: how many slices or nodes, joined by a network.
      mesh: over all of their devices.
    """

    topology: str
    slices: int
    mesh: Mesh

    @property
    def device(self) -> hardware.DeviceSpec:
        """Peak figures of one of its devices."""
        if self.is_gpu:
            return gpus.parse_nodes(self.topology).gpu.device
        return hardware.parse_slice(self.topology).generation.device

    @property
    def is_gpu(self) -> bool:
        return gpus.is_gpu(self.topology)

    @property
    def links(self) -> tuple[str, str]:
        """What devices are joined by: within a slice or node, and between them."""
        return ("nvlink", "network") if self.is_gpu else ("ici", "dcn")

    @property
    def fewest_replicas(self) -> int:
        """The least size of the mesh's axis `data`: between TPU slices no other axis may cross."""
        return 1 if self.is_gpu else self.slices

    def with_mesh(self, data: int, fsdp: int, tensor: int) -> "Pod":
        """The same devices under another mesh. Raises UserError where it does not fit them."""
        devices = list(self.mesh.devices.flat)
        mesh = sharding.make_mesh(data, fsdp, tensor, devices, process_is_island=self.is_gpu)
        return dataclasses.replace(self, mesh=mesh)

    @property
    def node_of_device(self) -> list[int]:
        """The node of each GPU, in the mesh's order; [] for TPUs, whose programs say themselves what goes across."""
        return [device.process_index for device in self.mesh.devices.flat] if self.is_gpu else []

    @property
    def device_count(self) -> int:
        return self.mesh.size


def make_pod(config: ml_collections.ConfigDict, topology: str, mesh: str) -> tuple[ml_collections.ConfigDict, Pod]:
    """The pod of the flags or, where they are empty, of config.launch; and the config with that mesh.

    Args:
      config: of the run.
      topology: --topology, such as "v5e:8x8" or "h100:8x4", or "".
      mesh: --mesh, "DATA,FSDP,TENSOR", or "".

    Raises:
      UserError: neither flags nor config name a TPU slice or GPU nodes, or the mesh does not fit them.
    """
    launch = config.launch
    if not topology and launch.accelerator == "gpu":
        shape = f"{launch.gpus_per_node}x{launch.nodes}" if launch.nodes > 1 else launch.gpus_per_node
        raise UserError(
            f"config.launch.accelerator='gpu': the config does not say which GPU; name it, as in --topology "
            f"h100:{shape} (GPUs: {', '.join(hardware.GPUS)}), or a TPU slice, as in --topology v5e:8x8"
        )
    if mesh:
        if not re.fullmatch(r"-?\d+,-?\d+,-?\d+", mesh):
            raise UserError(f"--mesh={mesh}: give data,fsdp,tensor, as in --mesh 1,16,4 (-1: what is left)")
        sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), map(int, mesh.split(","))))
        config = with_values(config, **sizes)
    topology = topology or launch.topology
    if gpus.is_gpu(topology):
        nodes = gpus.parse_nodes(topology)
        devices = gpus.compile_only_devices(nodes)
        # As sharding.rollout_sizes of real GPUs, whose machine it knows.
        asked = {f"mesh.{key}": config.mesh[key] for key in ("rollout_tensor", "rollout_ffw")}
        config = with_values(
            config, **{key: size and math.gcd(size, nodes.gpus_per_node) for key, size in asked.items()}
        )
        return config, Pod(
            topology, nodes.count, sharding.train_mesh(config.mesh, devices=devices, process_is_island=True)
        )
    devices = compile_only_devices(topology, launch.slices)
    return config, Pod(topology, launch.slices, sharding.train_mesh(config.mesh, devices=devices))


def with_values(config: ml_collections.ConfigDict, **values: Any) -> ml_collections.ConfigDict:
    """A frozen copy with other values, keyed by dotted path."""
    copy = ml_collections.ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(values)
    return ml_collections.FrozenConfigDict(copy)


def compile_only_devices(topology: str, slices: int = 1) -> Sequence[jax.Device]:
    """Devices of slices that are not here, for XLA's TPU compiler (libtpu) to compile for; nothing can run on them.

    Raises:
      UserError: libtpu is not installed, or its compiler does not know the slice.
    """
    generation = hardware.parse_slice(topology).generation.name
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("a plan needs XLA's TPU compiler, which runs without a TPU: pip install 'msd-jax[plan]'")
    # libtpu looks for a TPU and its metadata server, and reports at length that there is none.
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    # libtpu aborts the process on XLA_FLAGS meant for other backends; its own belong in LIBTPU_INIT_ARGS.
    os.environ.pop("XLA_FLAGS", None)
    from jax.experimental import topologies

    # On v4, JAX uses the two cores of a chip as one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"XLA's TPU compiler does not know the slice {topology!r}: {error}") from error


_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no TPU, so several plans may run side by side
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

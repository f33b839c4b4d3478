"""The pod that a run is planned for: its slices, the mesh over them, and devices to compile for."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from msd_jax.errors import UserError
from msd_jax.parallel import sharding
from msd_jax.planning import hardware


@dataclasses.dataclass(frozen=True)
class Pod:
    """The slices that a run is planned for.

    Attributes:
      topology: of one slice, see hardware.parse_slice.
      slices: how many, joined by the data-center network.
      mesh: over all of their devices.
    """

    topology: str
    slices: int
    mesh: Mesh

    @property
    def device(self) -> hardware.DeviceSpec:
        """Peak figures of one of its devices."""
        return hardware.parse_slice(self.topology).generation.device

    @property
    def device_count(self) -> int:
        return self.mesh.size


def make_pod(config: ml_collections.ConfigDict, topology: str, mesh: str) -> tuple[ml_collections.ConfigDict, Pod]:
    """The pod of the flags or, where they are empty, of config.launch; and the config with that mesh.

    Args:
      config: of the run.
      topology: --topology, such as "v5e:8x8", or "".
      mesh: --mesh, "DATA,FSDP,TENSOR", or "".

    Raises:
      UserError: neither flags nor config name a TPU slice, or the mesh does not fit it.
    """
    slices = config.launch.slices
    if not topology and config.launch.accelerator != "tpu":
        raise UserError(
            f"config.launch.accelerator={config.launch.accelerator!r}: a plan compiles for TPUs only, whose compiler "
            "needs no chip; give a slice, as in --topology v5e:8x8, to see how the recipe would fit on TPUs"
        )
    if mesh:
        if not re.fullmatch(r"-?\d+,-?\d+,-?\d+", mesh):
            raise UserError(f"--mesh={mesh}: give data,fsdp,tensor, as in --mesh 1,16,4 (-1: what is left)")
        sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), map(int, mesh.split(","))))
        config = with_values(config, **sizes)
    topology = topology or config.launch.topology
    devices = compile_only_devices(topology, slices)
    return config, Pod(topology, slices, sharding.make_mesh(**config.mesh, devices=devices))


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

"""What config.launch asks for, in the words of gcloud, GKE and Slurm (`python -m msd_jax.topology --config FILE`).

It prints NAME=VALUE for each fact that a script of launch/ needs, or ends in one line where config.mesh does not fit
config.launch. --want=tpu (or gpu) ends in one line for a config that is planned for the other. No device is touched.
"""

import dataclasses
import math
import re

import ml_collections

from msd_jax.errors import UserError

ACCELERATORS = ("tpu", "gpu")  # of config.launch.accelerator


@dataclasses.dataclass(frozen=True)
class Generation:
    """One TPU generation.

    Attributes:
      name: as in a topology's name.
      accelerator: gcloud's accelerator type is ACCELERATOR-COUNT, the count being of chips or of TensorCores; None
        where gcloud has no TPU VMs of it.
      cores: what that count gives a chip.
      devices: JAX devices a chip.
      runtime: gcloud's TPU VM software version.
      gke_accelerator: value of GKE's node selector cloud.google.com/gke-tpu-accelerator.
      machine: of GKE's machine type MACHINE-4t.
      single_host: the most chips that one host holds.
      rank: axes of its topologies.
    """

    name: str
    accelerator: str | None
    cores: int
    devices: int
    runtime: str | None
    gke_accelerator: str
    machine: str
    single_host: int
    rank: int


# https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, .../tpu/docs/runtimes and
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, as read in 2026.
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", "v4", 2, 1, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu", 4, 3),
        Generation("v5e", "v5litepod", 1, 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu", 8, 2),
        Generation("v5p", "v5p", 2, 1, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu", 4, 3),
        Generation("v6e", "v6e", 1, 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard", 8, 2),
        Generation("tpu7x", None, 2, 2, None, "tpu7x", "tpu7x-standard", 4, 3),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One TPU slice.

    Attributes:
      generation: what it is made of.
      shape: chips along each axis.
    """

    generation: Generation
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        """Up to `single_host` chips share one host; larger slices have four a host."""
        return self.chips if self.chips <= self.generation.single_host else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str | None:
        """gcloud's name of the slice; None where gcloud has no TPU VMs of it."""
        if not self.generation.accelerator:
            return None
        return f"{self.generation.accelerator}-{self.chips * self.generation.cores}"

    @property
    def machine_type(self) -> str:
        return f"{self.generation.machine}-{self.chips_per_host}t"


def parse(name: str) -> Slice:
    """The slice called `name`, as in "v5e:8x8" or "v5p:2x2x2" (chips along each axis).

    Raises:
      UserError: no such generation, or not a shape of it.
    """
    generation, _, shape = name.partition(":")
    if generation not in GENERATIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UserError(
            f"config.launch.topology={name!r}: write GENERATION:SHAPE, as in v5e:8x8 or v5p:2x2x2; generations are "
            + ", ".join(GENERATIONS)
        )
    slice_ = Slice(GENERATIONS[generation], tuple(map(int, shape.split("x"))))
    if len(slice_.shape) != slice_.generation.rank:
        raise UserError(f"config.launch.topology={name!r}: a shape of {generation} has {slice_.generation.rank} axes")
    if slice_.chips % slice_.chips_per_host:
        raise UserError(f"config.launch.topology={name!r}: {slice_.chips} chips do not fill hosts of four")
    return slice_


def devices(launch: ml_collections.ConfigDict) -> int:
    """JAX devices of the whole of config.launch."""
    if launch.accelerator == "gpu":
        return launch.nodes * max(launch.gpus_per_node, 1)
    slice_ = parse(launch.topology)
    return slice_.chips * slice_.generation.devices * launch.slices


def facts(config: ml_collections.ConfigDict) -> dict[str, str | int]:
    """NAME -> value, for the scripts of launch/.

    Raises:
      UserError: config.launch is none, or config.mesh does not fit it.
    """
    launch = config.launch
    _check_mesh(config)
    if launch.accelerator == "gpu":
        return {"NODES": launch.nodes, "GPUS_PER_NODE": launch.gpus_per_node}
    slice_ = parse(launch.topology)
    return {
        "SLICES": launch.slices,
        "HOSTS": slice_.hosts,  # of one slice
        "CHIPS_PER_HOST": slice_.chips_per_host,
        "ACCELERATOR_TYPE": slice_.accelerator_type or "",
        "RUNTIME_VERSION": slice_.generation.runtime or "",
        "GKE_ACCELERATOR": slice_.generation.gke_accelerator,
        "GKE_TOPOLOGY": launch.topology.partition(":")[2],
        "MACHINE_TYPE": slice_.machine_type,
    }


def _check_mesh(config: ml_collections.ConfigDict) -> None:
    sizes, count = [config.mesh[axis] for axis in ("data", "fsdp", "tensor")], devices(config.launch)
    fixed = math.prod(size for size in sizes if size != -1)
    asked = "x".join(map(str, sizes))
    if (fixed != count and -1 not in sizes) or count % fixed:
        raise UserError(f"config.mesh={asked} (data x fsdp x tensor) does not fit the {count} devices of config.launch")
    data = config.mesh.data if config.mesh.data != -1 else count // fixed
    if config.launch.accelerator == "tpu" and data % config.launch.slices:
        raise UserError(
            f"config.mesh={asked}: data={data} does not divide over config.launch.slices={config.launch.slices}; the "
            "other axes need the fast links within a slice"
        )

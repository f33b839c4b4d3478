"""Hardware in one table: what gcloud and GKE call each TPU generation, and what one device, TPU or GPU, can do."""

import dataclasses
import math
import re

from msd_jax.errors import UserError
from msd_jax.training.utilisation import Peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """Peak figures of one JAX device.

    Attributes:
      hbm_bytes: memory that the compiler lets a program use, less than the data sheet's.
      flops: bfloat16 operations per second.
      hbm_bandwidth: bytes per second between HBM and the compute units.
      ici_bandwidth: bytes per second received over all of the device's links within its slice or node.
      torus_axes: of the torus that those links form; a collective over one mesh axis is assumed to use one of them.
      dcn_bandwidth: bytes per second received from other slices or nodes, over the network between them.
    """

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    torus_axes: int
    dcn_bandwidth: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One TPU generation.

    Attributes:
      name: as in a topology's name.
      accelerator: gcloud's accelerator type is ACCELERATOR-COUNT; None where gcloud offers no TPU VMs of it.
      units_per_chip: what COUNT counts, per chip: 1 where it counts chips, 2 where it counts TensorCores.
      runtime: gcloud's TPU VM software version.
      gke_accelerator: value of GKE's node selector cloud.google.com/gke-tpu-accelerator.
      gke_machine: GKE's machine type is GKE_MACHINE-4t.
      chips_per_single_host: the most chips that one host holds.
      shape_axes: number of axes of its topologies.
      devices_per_chip: JAX devices.
      device: peak figures of one of them.
    """

    name: str
    accelerator: str | None
    units_per_chip: int
    runtime: str | None
    gke_accelerator: str
    gke_machine: str
    chips_per_single_host: int
    shape_axes: int
    devices_per_chip: int
    device: DeviceSpec


def _gib(count: float) -> int:
    return int(count * 2**30)


# Names: https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, .../tpu/docs/runtimes and
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, read in 2026.
# Peak figures, per JAX device: hbm_bytes is what the compiler of libtpu 0.0.52 reports when a program does not fit. The
# others are from https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in 2026, ICI being half of
# "bidirectional". Where those pages give none: v4's ICI is from https://jax-ml.github.io/scaling-book/tpus (6 links of
# 45 GB/s each way); DCN is the host's network card (v5e and v6e: 2 x 100 and 4 x 200 Gb/s over 8 chips; v4: 200 Gb/s
# over 4 chips; tpu7x: as v5p). A tpu7x chip is two devices, each with half of its figures.
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation(
            name="v4",
            accelerator="v4",
            units_per_chip=2,
            runtime="tpu-ubuntu2204-base",
            gke_accelerator="tpu-v4-podslice",
            gke_machine="ct4p-hightpu",
            chips_per_single_host=4,
            shape_axes=3,
            devices_per_chip=1,
            device=DeviceSpec(
                hbm_bytes=_gib(30.75),
                flops=275e12,
                hbm_bandwidth=1200e9,
                ici_bandwidth=270e9,
                torus_axes=3,
                dcn_bandwidth=6.25e9,
            ),
        ),
        Generation(
            name="v5e",
            accelerator="v5litepod",
            units_per_chip=1,
            runtime="v2-alpha-tpuv5-lite",
            gke_accelerator="tpu-v5-lite-podslice",
            gke_machine="ct5lp-hightpu",
            chips_per_single_host=8,
            shape_axes=2,
            devices_per_chip=1,
            device=DeviceSpec(
                hbm_bytes=_gib(15.75),
                flops=197e12,
                hbm_bandwidth=819e9,
                ici_bandwidth=200e9,
                torus_axes=2,
                dcn_bandwidth=3.125e9,
            ),
        ),
        Generation(
            name="v5p",
            accelerator="v5p",
            units_per_chip=2,
            runtime="v2-alpha-tpuv5",
            gke_accelerator="tpu-v5p-slice",
            gke_machine="ct5p-hightpu",
            chips_per_single_host=4,
            shape_axes=3,
            devices_per_chip=1,
            device=DeviceSpec(
                hbm_bytes=_gib(95.73),
                flops=459e12,
                hbm_bandwidth=2765e9,
                ici_bandwidth=600e9,
                torus_axes=3,
                dcn_bandwidth=6.25e9,
            ),
        ),
        Generation(
            name="v6e",
            accelerator="v6e",
            units_per_chip=1,
            runtime="v2-alpha-tpuv6e",
            gke_accelerator="tpu-v6e-slice",
            gke_machine="ct6e-standard",
            chips_per_single_host=8,
            shape_axes=2,
            devices_per_chip=1,
            device=DeviceSpec(
                hbm_bytes=_gib(31.24),
                flops=918e12,
                hbm_bandwidth=1638e9,
                ici_bandwidth=400e9,
                torus_axes=2,
                dcn_bandwidth=12.5e9,
            ),
        ),
        Generation(
            name="tpu7x",
            accelerator=None,
            units_per_chip=2,
            runtime=None,
            gke_accelerator="tpu7x",
            gke_machine="tpu7x-standard",
            chips_per_single_host=4,
            shape_axes=3,
            devices_per_chip=2,
            device=DeviceSpec(
                hbm_bytes=_gib(94.74),
                flops=2307e12 / 2,
                hbm_bandwidth=7380e9 / 2,
                ici_bandwidth=600e9 / 2,
                torus_axes=3,
                dcn_bandwidth=6.25e9 / 2,
            ),
        ),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    Attributes:
      name: as in a topology's name.
      kind: what jax.Device.device_kind begins with.
      capability: its compute capability.
      multiprocessors, shared_memory, l2_bytes, clock_ghz: what XLA's compiler needs to know beside `device`: the number
        of multiprocessors, bytes of shared memory of each, of the cache that they share, and their clock.
      memory_bytes: all of its memory, as the driver reports it.
      device: peak figures of one of them; its links are NVLink within a node, and its share of the node's network.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int
    device: DeviceSpec


# Dense bfloat16 products, memory and NVLink: NVIDIA's data sheets of H100 SXM (https://www.nvidia.com/en-us/data-center/
# h100/), H200 SXM (.../h200/) and A100 80GB SXM (.../a100/), read in 2026; products without sparsity, NVLink half of
# "900 GB/s" and "600 GB/s", which count both directions. Every GPU of a node reaches every other at that rate, so a
# collective takes all of it. The network is that of NVIDIA's DGX: a card of 400 Gb/s (A100: 200) for each GPU.
# hbm_bytes: 0.9, the launch scripts' XLA_PYTHON_CLIENT_MEM_FRACTION, of memory_bytes, which is what CUDA reports there.
# Multiprocessors, shared memory, cache: NVIDIA's tuning guides for Hopper and Ampere (https://docs.nvidia.com/cuda/).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            kind="NVIDIA H100 80GB HBM3",  # SXM; those for PCIe are slower
            capability=(9, 0),
            multiprocessors=132,
            shared_memory=228 * 1024,
            l2_bytes=50 * 2**20,
            clock_ghz=1.98,
            memory_bytes=_gib(79.1),
            device=DeviceSpec(
                hbm_bytes=_gib(0.9 * 79.1),
                flops=989e12,
                hbm_bandwidth=3350e9,
                ici_bandwidth=450e9,
                torus_axes=1,
                dcn_bandwidth=50e9,
            ),
        ),
        Gpu(
            name="h200",
            kind="NVIDIA H200",
            capability=(9, 0),
            multiprocessors=132,
            shared_memory=228 * 1024,
            l2_bytes=50 * 2**20,
            clock_ghz=1.98,
            memory_bytes=_gib(139.8),
            device=DeviceSpec(
                hbm_bytes=_gib(0.9 * 139.8),
                flops=989e12,
                hbm_bandwidth=4800e9,
                ici_bandwidth=450e9,
                torus_axes=1,
                dcn_bandwidth=50e9,
            ),
        ),
        Gpu(
            name="a100",
            kind="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            multiprocessors=108,
            shared_memory=164 * 1024,
            l2_bytes=40 * 2**20,
            clock_ghz=1.41,
            memory_bytes=_gib(79.2),
            device=DeviceSpec(
                hbm_bytes=_gib(0.9 * 79.2),
                flops=312e12,
                hbm_bandwidth=2039e9,
                ici_bandwidth=300e9,
                torus_axes=1,
                dcn_bandwidth=25e9,
            ),
        ),
    )
}


def find_gpu(device_kind: str) -> Gpu | None:
    """The GPU that JAX calls `device_kind`; None for one that is not in the table."""
    return next((gpu for gpu in GPUS.values() if device_kind.startswith(gpu.kind)), None)


@dataclasses.dataclass(frozen=True)
class Slice:
    """One TPU slice.

    Attributes:
      generation: of its chips.
      shape: chips along each axis.
    """

    generation: Generation
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        """All of them where one host holds them; four in larger slices."""
        return self.chips if self.chips <= self.generation.chips_per_single_host else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def accelerator_type(self) -> str | None:
        """gcloud's name of the slice; None where gcloud offers no TPU VMs of it."""
        if not self.generation.accelerator:
            return None
        return f"{self.generation.accelerator}-{self.chips * self.generation.units_per_chip}"

    @property
    def gke_machine_type(self) -> str:
        return f"{self.generation.gke_machine}-{self.chips_per_host}t"


def parse_slice(topology: str) -> Slice:
    """The slice called `topology`, such as "v5e:8x8" or "v5p:2x2x2" (chips along each axis).

    Raises:
      UserError: the generation is unknown, or has no slices of this shape.
    """
    name, _, shape = topology.partition(":")
    if name not in GENERATIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UserError(
            f"config.launch.topology={topology!r}: write GENERATION:SHAPE, as in v5e:8x8 or v5p:2x2x2; generations "
            f"are {', '.join(GENERATIONS)}"
        )
    generation = GENERATIONS[name]
    slice_ = Slice(generation, tuple(map(int, shape.split("x"))))
    if len(slice_.shape) != generation.shape_axes:
        raise UserError(f"config.launch.topology={topology!r}: the shape of a {name} has {generation.shape_axes} axes")
    if slice_.chips % slice_.chips_per_host:
        raise UserError(
            f"config.launch.topology={topology!r}: {slice_.chips} chips do not fill hosts of four; choose a shape with "
            "a multiple of four"
        )
    return slice_


# What jax.Device.device_kind is on each generation, by JAX's own table (jax/_src/pallas/mosaic/tpu_info.py).
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def peak(device_kind: str) -> Peak | None:
    """What one device of this kind can do at most; None for one that is not in the table."""
    if gpu := find_gpu(device_kind):
        return Peak(gpu.device.flops, gpu.device.hbm_bandwidth, 1)
    if device_kind not in _KINDS:
        return None
    generation = GENERATIONS[_KINDS[device_kind]]
    return Peak(generation.device.flops, generation.device.hbm_bandwidth, generation.devices_per_chip)

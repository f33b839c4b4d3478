"""GPU nodes that are not here: their names, and devices that XLA's GPU compiler compiles for."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from msd_jax.errors import UserError
from msd_jax.planning import hardware


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Machines with GPUs.

    Attributes:
      gpu: of all of them.
      gpus_per_node: joined by NVLink.
      count: machines, joined by a network.
    """

    gpu: hardware.Gpu
    gpus_per_node: int
    count: int


def is_gpu(topology: str) -> bool:
    """Whether a topology names GPUs."""
    return topology.partition(":")[0] in hardware.GPUS


def parse_nodes(topology: str) -> Nodes:
    """The nodes called `topology`: "h100:8" is one with eight GPUs, "h100:8x4" are four of them.

    Raises:
      UserError: it is neither, or the GPU is unknown.
    """
    name, _, shape = topology.partition(":")
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", shape)
    if name not in hardware.GPUS or not match:
        raise UserError(
            f"--topology={topology}: write GPU:COUNT for one node or GPU:COUNTxNODES, as in h100:8 or h100:8x4; GPUs "
            f"are {', '.join(hardware.GPUS)}"
        )
    return Nodes(hardware.GPUS[name], int(match[1]), int(match[2] or 1))


def compile_only_devices(nodes: Nodes) -> Sequence[jax.Device]:
    """Devices of the nodes for XLA's GPU compiler, node by node; each node is a process.

    Raises:
      UserError: JAX's plugin for CUDA is not installed, or does not compile for GPUs that are not here.
    """
    plugin()
    # The compiler reports that it cannot measure kernels here; its library reads this when it is loaded.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    # Slices, hosts of each and devices of each; with one host a slice, JAX makes a process of every slice.
    shape = f"{nodes.count}x1x{nodes.gpus_per_node}"
    try:
        return topologies.get_topology_desc(
            shape, platform="cuda", topology=shape, target_config=describe_target(nodes.gpu)
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"XLA's GPU compiler does not take the nodes {shape}: {error}") from error


def plugin() -> str:
    """The package with JAX's plugin for CUDA. Raises UserError where it is not installed."""
    for version in (13, 12):
        if importlib.util.find_spec(f"jax_cuda{version}_plugin"):
            return f"jax-cuda{version}-plugin"
    raise UserError("a plan for GPUs needs JAX for CUDA, which compiles without a GPU: pip install 'msd-jax[cuda]'")


def describe_target(gpu: hardware.Gpu) -> str:
    """What XLA's GPU compiler is told about a GPU that is not here, a GpuTargetConfigProto as text."""
    major, minor = gpu.capability
    facts = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": gpu.shared_memory,
        "threads_per_core_limit": 2048,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": 128 if gpu.capability >= (9, 0) else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(gpu.device.hbm_bandwidth),
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory_bytes,
        "shared_memory_per_block_optin": gpu.shared_memory - 1024,  # which CUDA keeps for itself
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    return (
        f"gpu_device_info {{ {' '.join(f'{name}: {value}' for name, value in facts.items())} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} }}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 12 }}\ndevice_description_str: "{gpu.kind}"\n'
    )

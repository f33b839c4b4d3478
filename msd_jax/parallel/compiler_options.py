"""XLA's options by platform: tables for the train step and for generation, which plans compile with the same."""

import dataclasses

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class CompilerOption:
    """One option of XLA, and why it is set.

    Attributes:
      platform: of the devices that it is for.
      name: of the option.
      value: that it is set to.
      why: what XLA does by default.
      measured: what the option changes.
    """

    platform: str
    name: str
    value: str
    why: str
    measured: str


TRAIN_STEP = (
    CompilerOption(
        platform="cpu",
        name="xla_cpu_scheduler_type",
        value="CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        why="XLA runs early what it can: before the forward pass it makes the zeros, as large as the weights, that the "
        "backward pass adds to",
        measured="SmolLM2-135M: 0.68 GB of temporary memory instead of 1.02",
    ),
    CompilerOption(
        platform="tpu",
        name="xla_jf_spmd_threshold_for_windowed_einsum_mib",
        value="1000000",  # larger than any matrix: never
        why="XLA splits the products with fsdp-sharded weights into loops over shards (windowed einsums), whose every "
        "iteration reads and writes the activations again",
        measured="compiled for Qwen2.5-7B on v5e:8x8, mesh 1 x 16 x 4, not run on a TPU: at 256 queries per step HBM "
        "traffic per chip falls from 1285 to 598 GB, bytes received from 60.4 to 59.3 GB, peak memory from 10.38 to "
        "10.07 GiB; at 64 queries from 232 to 141 GB, 26.8 to 25.7 GB, and 4.92 GiB is unchanged",
    ),
)

ROLLOUT = (
    CompilerOption(
        platform="gpu",
        name="xla_gpu_dot_merger_threshold_mb",
        value="0",
        why="XLA joins the matrices that one input is multiplied with, and copies them together for every token",
        measured="with each layer's weights in arrays of their own (msd_jax/generation/rollout.py), Llama-3.2-1B on an "
        "H200, 64 rows: 1.71 ms per token instead of 3.32",
    ),
)


def train_step_options(mesh: Mesh) -> dict[str, str]:
    """The options of TRAIN_STEP for the mesh's platform, as jax.jit's `compiler_options`."""
    return _options(TRAIN_STEP, mesh)


def rollout_options(mesh: Mesh) -> dict[str, str]:
    """Those of ROLLOUT."""
    return _options(ROLLOUT, mesh)


def _options(table: tuple[CompilerOption, ...], mesh: Mesh) -> dict[str, str]:
    platform = mesh.devices.flat[0].platform
    return {option.name: option.value for option in table if option.platform == platform}

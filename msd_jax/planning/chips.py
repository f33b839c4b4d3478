"""TPU chips in figures, and the devices of slices that are not there, for XLA's TPU compiler (libtpu)."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import jax

from msd_jax.errors import UserError
from msd_jax.planning import topology


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a TPU generation can do at its peak.

    Attributes:
      hbm: bytes that the compiler lets a program have, less than the data sheet's.
      flops: bfloat16 operations a second.
      bandwidth: bytes a second between HBM and the compute units.
      ici: bytes a second that a device receives over all of its links to its neighbours.
      axes: of the torus that those links form; a collective over one mesh axis is taken to use one of them.
      dcn: bytes a second that a device receives from other slices.
    """

    hbm: int
    flops: float
    bandwidth: float
    ici: float
    axes: int
    dcn: float


def _gib(count: float) -> int:
    return int(count * 2**30)


# Per JAX device. hbm: as the compiler of libtpu 0.0.52 says when a program does not fit. The other figures are those of
# https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, ICI half of "bidirectional", as read in 2026. Where
# they give none: v4's ICI is that of https://jax-ml.github.io/scaling-book/tpus (6 links of 45 GB/s each way), DCN is
# a host's network card (v5e and v6e: 2 x 100 and 4 x 200 Gb/s over 8 chips; v4: 4 chips on 200 Gb/s; tpu7x: as v5p).
# A tpu7x chip is two devices, each with half of it.
CHIPS = {
    "v4": Chip(_gib(30.75), 275e12, 1200e9, 270e9, 3, 6.25e9),
    "v5e": Chip(_gib(15.75), 197e12, 819e9, 200e9, 2, 3.125e9),
    "v5p": Chip(_gib(95.73), 459e12, 2765e9, 600e9, 3, 6.25e9),
    "v6e": Chip(_gib(31.24), 918e12, 1638e9, 400e9, 2, 12.5e9),
    "tpu7x": Chip(_gib(94.74), 2307e12 / 2, 7380e9 / 2, 600e9 / 2, 3, 6.25e9 / 2),
}


def devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """Devices of `slices` slices called `name`, to compile for; nothing can run on them.

    Raises:
      UserError: libtpu is missing, or its compiler knows no such slice; one line says what to do.
    """
    generation = topology.parse(name).generation.name
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("a plan needs XLA's TPU compiler, which runs without a TPU: pip install 'msd-jax[plan]'")
    # libtpu looks for a TPU and for its metadata server, and tells at length that there is none.
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    # Flags for other backends end the process that hands them to libtpu; its own belong in LIBTPU_INIT_ARGS.
    os.environ.pop("XLA_FLAGS", None)
    from jax.experimental import topologies

    # On v4 JAX uses a chip's two cores as one device, here as on the real machine.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"XLA's TPU compiler knows no slice {name!r}: {error}") from error


_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no TPU, so several plans may run side by side
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

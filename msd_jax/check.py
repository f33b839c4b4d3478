"""Checks devices and network in a minute, before a long run (`python -m msd_jax.check`), and is started like it.

    srun --ntasks-per-node=8 python -m msd_jax.check      # or MODULE=msd_jax.check launch/local.sh CONFIG

Every device multiplies matrices, all devices add up an array, and so does each machine with its neighbours. Exit code
0: all of them compute and none is slow; 1: the machine named is wrong, slow, or did not end within --seconds.
"""

import socket
import threading

import jax
from absl import flags

from msd_jax import cli
from msd_jax.configs import default
from msd_jax.errors import UserError
from msd_jax.io.console import log
from msd_jax.parallel import distributed, links


def main(argv: list[str]) -> None:
    del argv
    seconds, stages = cli.FLAGS.seconds, ["the start of its devices"]
    late = threading.Timer(seconds, lambda: distributed.end_in_error(_late(stages[-1], seconds)))
    late.daemon = True
    late.start()
    found = links.measure(cli.FLAGS.mebibytes, stages.append)
    late.cancel()
    for host, count in found.devices.items():
        beside = f", {found.neighbours[host] / 1e9:.1f} GB/s with its neighbours" if host in found.neighbours else ""
        log(f"{host}: {count} devices, {found.flops[host] / 1e9:,.0f} GFLOP/s each{beside}")
    log(
        f"all-reduce over {jax.device_count()} devices ({jax.devices()[0].device_kind}) on {len(found.devices)} "
        f"machines: {found.all_reduce / 1e9:.1f} GB/s per device"
    )
    if found.faults:
        raise UserError("; ".join(found.faults))


def _late(stage: str, seconds: int) -> str:
    return f"error: {socket.gethostname()}: {stage} did not end within {seconds} seconds"


if __name__ == "__main__":
    flags.FLAGS.set_default("config", default.__file__)  # which no measurement depends on
    flags.DEFINE_integer("seconds", 60, "The most that the check may take.", lower_bound=1)
    flags.DEFINE_integer("mebibytes", 256, "Size of the array that is added up.", lower_bound=1)
    flags.DEFINE_string("workdir", "", "Not used: a launcher passes the run's.")
    cli.run(main)

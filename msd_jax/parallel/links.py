"""Whether every device computes, and how fast the links between them are: measured in a minute, before a long run."""

import dataclasses
import functools
import itertools
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msd_jax.parallel import distributed

SLOW = 0.5  # a machine below this share of the median is bad: a broken link or a throttled device costs more than that


@dataclasses.dataclass(frozen=True)
class Links:
    """What was measured.

    Attributes:
      devices: number of devices, by machine.
      flops: operations per second of matrix products in bfloat16, of each machine's slowest device.
      all_reduce: of all devices; bytes per second that a device sends, 2 (n - 1) / n times the reduced bytes.
      neighbours: the same for each machine together with one other, the better of its two neighbours; {} for one
        machine, and on TPUs, where programs run on whole slices.
      faults: a line for each bad machine.
    """

    devices: Mapping[str, int]
    flops: Mapping[str, float]
    all_reduce: float
    neighbours: Mapping[str, float]
    faults: Sequence[str]


def measure(mebibytes: int, stage: Callable[[str], None] = lambda name: None) -> Links:
    """Multiplies matrices on every device, then adds up an array over all of them and over pairs of machines.

    Args:
      mebibytes: size of the array.
      stage: called before each part with its name, by which a caller tells what hangs.
    """
    stage("matrix products on its own devices")
    mine = [_product(device) for device in jax.local_devices()]
    stage("the exchange of host names")
    told = distributed.from_all(lambda: [socket.gethostname(), *map(list, zip(*mine))])
    machines = [host for host, *_ in told]  # of each process
    stage("an all-reduce over all devices")
    bandwidth, exact = _all_reduce(jax.devices(), mebibytes)
    neighbours: dict[str, float] = {}
    hosts = list(dict.fromkeys(machines))
    if jax.default_backend() != "tpu":
        for one, other in pairs(len(hosts)):
            both = [device for device in jax.devices() if machines[device.process_index] in (hosts[one], hosts[other])]
            stage(f"an all-reduce between {hosts[one]} and {hosts[other]}")
            # Only the processes of both take part, and all hear of it.
            speed = _all_reduce(both, mebibytes)[0] if any(d.process_index == jax.process_index() for d in both) else 0
            speed = max(distributed.from_all(functools.partial(float, speed)))
            for host in (hosts[one], hosts[other]):
                neighbours[host] = max(neighbours.get(host, 0.0), speed)
    devices = {host: sum(len(flops) for name, flops, _ in told if name == host) for host in hosts}
    flops = {host: min(itertools.chain(*(rates for name, rates, _ in told if name == host))) for host in hosts}
    sums = {host: list(itertools.chain(*(values for name, _, values in told if name == host))) for host in hosts}
    faults = list(wrong(sums))
    if jax.default_backend() != "cpu":  # whose cores serve others too
        faults += [*slow("matrix products", "FLOP/s", flops), *slow("all-reduce", "B/s", neighbours)]
    if not exact:
        faults.append("the all-reduce over all devices gave a wrong sum")
    return Links(devices, flops, bandwidth, neighbours, faults)


def pairs(count: int) -> Iterator[tuple[int, int]]:
    """Neighbours on a ring of `count` machines, each machine in two pairs, so that a bad one is slow in both."""
    for one in range(count if count > 2 else count - 1):
        yield one, (one + 1) % count


def wrong(sums: Mapping[str, Iterable[float]]) -> Iterator[str]:
    """A line for each machine, one of whose devices has another product than most, or none that is a number."""
    usual = np.nanmedian([value for values in sums.values() for value in values])
    for host, values in sums.items():
        if not np.allclose(list(values), usual, rtol=1e-3):
            yield f"{host}: a device multiplies wrongly"


def slow(what: str, unit: str, rates: Mapping[str, float]) -> Iterator[str]:
    """A line for each machine that is far below the median; with two machines nothing tells which is at fault."""
    usual = statistics.median(rates.values()) if rates else 0.0
    for host, rate in rates.items():
        if rate < SLOW * usual:
            yield f"{host}: {what} at {rate / 1e9:.1f} G{unit}, the median machine has {usual / 1e9:.1f}"


def _product(device: jax.Device) -> tuple[float, float]:
    """(operations per second, sum of the absolute entries) of matrix products on one device."""
    size, times = (512, 2) if device.platform == "cpu" else (8192, 20)
    with jax.default_device(device), jax.transfer_guard("allow"):
        matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
        product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
        product(matrix).block_until_ready()
        begin = time.perf_counter()
        for _ in range(times):
            result = product(matrix)
        result.block_until_ready()
        seconds = time.perf_counter() - begin
        return 2 * size**3 * times / seconds, float(jnp.mean(jnp.abs(result)))


def _all_reduce(devices: Sequence[jax.Device], mebibytes: int) -> tuple[float, bool]:
    """(bytes per second and device, whether the sum is right) of the best of five all-reduces."""
    count, size = len(devices), mebibytes * 2**20 // 4
    mesh = Mesh(np.array(devices), ("device",))
    rows = NamedSharding(mesh, PartitionSpec("device"))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.transfer_guard("allow"):
        ranks = jax.make_array_from_callback(
            (count, 1), rows, lambda index: np.arange(1.0, count + 1, dtype=np.float32)[:, None][index]
        )
        array = jax.jit(lambda x: jnp.broadcast_to(x, (count, size)), out_shardings=rows)(ranks)
        reduce = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
        reduced, seconds = reduce(array).block_until_ready(), float("inf")
        for _ in range(5):
            begin = time.perf_counter()
            reduced = reduce(array).block_until_ready()
            seconds = min(seconds, time.perf_counter() - begin)
        mine = np.asarray(reduced.addressable_data(0))
    sent = 2 * (count - 1) / count * size * 4
    return sent / seconds, bool((mine == count * (count + 1) / 2).all())

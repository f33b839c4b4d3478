"""Programs as compiled for a pod: their memory, work and traffic, and the least time that they take."""

import dataclasses
import pathlib
import re
import tempfile
import time

import jax

from msd_jax.errors import UserError
from msd_jax.planning.collectives import find_collectives
from msd_jax.planning.flops import count_flops
from msd_jax.planning.hbm_traffic import hbm_traffic
from msd_jax.planning.hlo import HloModule, shape_bytes
from msd_jax.planning.pod import Pod
from msd_jax.planning.programs import Program

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program as compiled for a pod. All figures are per device, work and traffic per step.

    Attributes:
      peak_hbm_bytes: the most memory that it needs, its arguments included; if it does not fit, what it would need.
      resident_hbm_bytes: of what stays in memory beside it: the train state during a rollout.
      fits: whether the device has memory for both.
      flops: of matrix products.
      hbm_traffic_bytes: moved between HBM and the compute units.
      collective_bytes: received from other devices, by kind of collective.
      dcn_bytes: the part of them that comes from other slices or nodes.
      seconds: lower bounds, by resource: compute, hbm, and the links of Pod.links, each alone.
      compile_seconds: of tracing and compiling on this machine.
      largest_buffers: (bytes, the largest array in it), the largest first.
    """

    peak_hbm_bytes: int
    resident_hbm_bytes: int
    fits: bool
    flops: float
    hbm_traffic_bytes: int
    collective_bytes: dict[str, int]
    dcn_bytes: int
    seconds: dict[str, float]
    compile_seconds: float
    largest_buffers: tuple[tuple[int, str], ...]

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def seconds_estimate(self) -> float:
        """The roofline: the longest of `seconds`, as if it hid the others."""
        return self.seconds[self.bound]

    @property
    def total_hbm_bytes(self) -> int:
        return self.peak_hbm_bytes + self.resident_hbm_bytes


def step_seconds(programs: dict[str, CompiledProgram]) -> float:
    """The least time of a training step, whose programs run one after the other."""
    return sum(program.seconds_estimate for name, program in programs.items() if name != "evaluation")


def compile_program(program: Program, pod: Pod) -> CompiledProgram:
    """Compiles a program for the pod and reads its figures, even if it does not fit."""
    start = time.perf_counter()
    traced = program.trace()
    with tempfile.TemporaryDirectory() as dump:
        try:
            compiled = traced.lower().compile(compiler_options={"xla_dump_to": dump})
            peak, compiles = compiled.memory_analysis().peak_memory_in_bytes, True
        except jax.errors.JaxRuntimeError as error:
            peak, compiles = needed_bytes(str(error)), False
        # Not compiled.as_text(): a program that does not fit has none, and for v5p it fails.
        text = read_dump(dump, "after_optimizations.txt")
        buffers = parse_buffers(read_dump(dump, "-memory-usage-report.txt"))
    compile_seconds = time.perf_counter() - start

    module, runs = HloModule(text, program.while_trips), program.runs
    received: dict[str, int] = {}
    dcn = 0
    for collective in find_collectives(module, pod.slices, pod.node_of_device):
        received[collective.kind] = received.get(collective.kind, 0) + runs * collective.bytes
        dcn += runs * collective.network_bytes
    flops = runs * count_flops(traced.jaxpr, program.while_trips) / pod.device_count
    traffic, device, (within, across) = runs * hbm_traffic(module), pod.device, pod.links
    return CompiledProgram(
        peak_hbm_bytes=peak,
        resident_hbm_bytes=program.resident_bytes,
        fits=compiles and peak + program.resident_bytes <= device.hbm_bytes,
        flops=flops,
        hbm_traffic_bytes=traffic,
        collective_bytes=received,
        dcn_bytes=dcn,
        seconds={
            "compute": flops / device.flops,
            "hbm": traffic / device.hbm_bandwidth,
            within: (sum(received.values()) - dcn) / (device.ici_bandwidth / device.torus_axes),
            across: dcn / device.dcn_bandwidth,
        },
        compile_seconds=compile_seconds,
        largest_buffers=buffers,
    )


def needed_bytes(message: str) -> int:
    """Memory that a program needs, from XLA's message that there is not enough.

    Raises:
      UserError: the message is about something else.
    """
    match = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        raise UserError(f"XLA's compiler failed: {message.splitlines()[0]}")
    number, unit = (part for part in match.groups() if part)
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def read_dump(directory: str, suffix: str) -> str:
    """The text of the largest file in XLA's dump with this suffix (the small programs around it are dumped too)."""
    files = pathlib.Path(directory).glob(f"*{suffix}")
    return max((file.read_text(encoding="utf-8", errors="replace") for file in files), key=len, default="")


def parse_buffers(report: str, count: int = 6) -> tuple[tuple[int, str], ...]:
    """(bytes, the largest array in it) of the largest HBM buffers (color 0) in XLA's memory usage report."""
    hbm = report.split("Memory Space:")[1] if "Memory Space:" in report else ""
    rows = re.findall(r"^ *\S+ *\( *\d+%\); +([\d.]+)([KMGT]?)i?B; +\d+; +\d+; (.*)$", hbm, re.MULTILINE)
    sizes = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    buffers = sorted(((int(float(number) * sizes[unit]), text) for number, unit, text in rows), reverse=True)[:count]

    def name(shapes: str) -> str:
        arrays = re.findall(r"\w+\[[\d,]*\]", shapes)
        others = f", and {len(arrays) - 1} other shapes in its place" if len(arrays) > 1 else ""
        return max(arrays, key=shape_bytes, default=shapes) + others

    return tuple((size, name(shapes)) for size, shapes in buffers)

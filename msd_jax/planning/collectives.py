"""The collectives of a compiled program, and the bytes that each brings to a device."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from msd_jax.errors import UserError
from msd_jax.planning.hlo import Execution, HloModule, shape_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation, as one device sees it.

    Attributes:
      kind: one of KINDS.
      shape: of its result, as HLO prints it.
      operand_bytes: that the device contributes to one run.
      group_size: number of devices that take part.
      times: how often it runs.
      network_share: of its bytes that come over the network between TPU slices or GPU nodes.
      loop: name of the innermost loop's body; the entry's outside loops.
      op_name: where in the Python program it comes from.
    """

    kind: str
    shape: str
    operand_bytes: int
    group_size: int
    times: int
    network_share: float
    loop: str
    op_name: str

    @property
    def bytes(self) -> int:
        """Bytes that the device receives over all runs, by the bandwidth-optimal ring algorithms."""
        size, others = self.operand_bytes, self.group_size - 1
        received = {
            "all-gather": size * others,
            "all-reduce": 2 * size * others // self.group_size,
            "reduce-scatter": size * others // self.group_size,
            "all-to-all": size * others // self.group_size,
            "collective-permute": size,
        }
        return self.times * received[self.kind]

    @property
    def network_bytes(self) -> int:
        """Those of `bytes` that come over the network."""
        return round(self.bytes * self.network_share)


def find_collectives(module: HloModule, slices: int = 1, node_of_device: Sequence[int] = ()) -> list[Collective]:
    """Every collective that moves bytes; one that the compiler spread over several fusions once, where it starts.

    Args:
      module: the compiled program.
      slices: TPU slices that it runs on.
      node_of_device: the node of each GPU that it runs on; empty for TPUs.
    """
    found = (_collective(execution, slices, node_of_device) for execution in module.executions())
    return [collective for collective in found if collective and collective.bytes]


def _collective(execution: Execution, slices: int, node_of_device: Sequence[int]) -> Collective | None:
    computation, instruction = execution.computation, execution.instruction
    kind = instruction.opcode.removesuffix("-start")
    shapes = [operand.shape for operand in computation.operands(instruction)]
    # Between slices, a TPU program sends to the hosts, which run the collective that the instruction names.
    hosts = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"') if kind == "send" else None
    if hosts:
        kind, shapes = hosts.lower().replace("_", "-"), shapes[:1]
        kind = kind if kind in KINDS else "collective-permute"
    if kind not in KINDS:
        return None
    targets = {x.attribute(r'custom_call_target="(\w+)"') for x in computation.instructions.values()}
    if "chain_id=" in instruction.attributes and "AsyncCollectiveStart" not in targets:
        return None  # a later part of one that started elsewhere
    if kind == "all-reduce" and "reduce-scatter" in computation.name:
        kind = "reduce-scatter"  # TPUs write it as an all-reduce and a slice in one fusion
    groups = replica_groups(instruction.attributes)
    return Collective(
        kind=kind,
        shape=instruction.shape,
        operand_bytes=sum(map(shape_bytes, shapes)),
        group_size=slices if hosts else groups.shape[1],
        times=execution.times,
        network_share=1.0 if hosts else network_share(kind, groups, node_of_device),
        loop=execution.loop,
        op_name=instruction.op_name,
    )


def network_share(kind: str, groups: np.ndarray, node_of_device: Sequence[int]) -> float:
    """The share of its bytes that a GPU receives from other nodes, over its own network card.

    Rings enter a node once for each GPU that takes part there, each by the card of another GPU.

    Args:
      kind: one of KINDS.
      groups: device ids [groups, group size].
      node_of_device: by device id; empty: all are one node.
    """
    shares = [0.0]
    for group in groups if len(node_of_device) else ():
        in_node = collections.Counter(node_of_device[device] for device in group)
        together, others = max(in_node.values()), len(group) - 1
        if len(in_node) > 1:
            shares.append((len(group) - together) / others if kind == "all-to-all" else 1 / together)
    return max(shares)


_IOTA = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
_DEVICES = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # short for an _IOTA whose second shape is the number of devices
_MESH = r"mesh\[([^\]]*)\](?:, device_ids=\((?:" + _IOTA + "|" + _DEVICES + r")\))? ?\{((?:'\w+'(?::\(\d+\)\d+)?,?)*)\}"


def replica_groups(attributes: str) -> np.ndarray:
    """Device ids [groups, group size] of a collective, in any of the notations of HLO; [[0]] without a group.

    Raises:
      UserError: the notation is unknown.
    """
    match = re.search(r"replica_groups=" + _IOTA, attributes)
    if match:
        shape, source, order = map(_integers, match.groups())
        devices = np.arange(math.prod(source)).reshape(source)
        return (devices.transpose(order) if order else devices).reshape(shape)
    match = re.search(r"replica_groups=" + _MESH, attributes)
    if match:
        axes, _, long, long_order, short, short_order, named = match.groups()
        return _mesh_groups(axes, long or short, long_order or short_order, named)
    match = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    if match:
        return np.array([_integers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])])
    unknown = re.search(r"replica_groups=.{,160}", attributes)
    if unknown:
        raise UserError(f"HLO: the groups of a collective are not understood: {unknown[0]}")
    return np.zeros((1, 1), int)


def _mesh_groups(axes: str, source: str | None, order: str | None, named: str) -> np.ndarray:
    """The groups over the axes `named` of a mesh ("'a'=2,'b'=3"), whose devices may be transposed.

    Its devices are those of an array of the shape `source`, counted row by row, with the axes in `order`. An axis
    may be named in part: "'a':(2)4" is its middle factor 4, if 2 are before it.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    devices = np.arange(math.prod(sizes.values()))
    if source:
        devices = devices.reshape(_integers(source))
        devices = devices.transpose(_integers(order)) if order else devices
    found = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)
    chosen = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in found]
    factors = []  # as `chosen`, of all axes
    for axis, whole in sizes.items():
        cuts = {before * size for name, before, times in chosen if name == axis for size in (1, times)} | {1, whole}
        factors += [(axis, low, high // low) for low, high in itertools.pairwise(sorted(cuts))]
    chosen = [factor for factor in chosen if factor in factors]  # without those of size 1
    devices = devices.reshape([size for _, _, size in factors])
    devices = np.moveaxis(devices, [factors.index(factor) for factor in chosen], range(-len(chosen), 0))
    return devices.reshape(-1, math.prod(size for _, _, size in chosen))


def _integers(text: str | None) -> list[int]:
    return [int(part) for part in (text or "").split(",") if part]

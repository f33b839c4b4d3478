"""What a program costs, read from its jaxpr (FLOPs) and from its compiled HLO (collectives, memory traffic).

XLA's own cost analysis counts the body of a loop once, and most of a training step is loops: here every count is
multiplied by the number of iterations.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from msd_jax.errors import UserError

# --- FLOPs of a jaxpr ---------------------------------------------------------------------------------------------


def flops(jaxpr: Any, unknown_trips: int = 1) -> int:
    """Floating-point operations of the matrix products and convolutions of a jaxpr, over all devices.

    A multiplication and an addition are two. What jax.checkpoint computes again is counted again. Of the branches of a
    conditional the costliest counts; kernels (pallas_call) count for every cell of their grid, skipped ones too.

    Args:
      jaxpr: ClosedJaxpr or Jaxpr, such as jax.jit(f).trace(...).jaxpr.
      unknown_trips: iterations of a while loop, whose number a jaxpr does not tell.
    """
    return sum(_equation_flops(equation, unknown_trips) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation_flops(equation: Any, unknown_trips: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * taps
    inner = [flops(sub, unknown_trips) for sub in _sub_jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while":
        return unknown_trips * sum(inner)
    if name == "cond":
        return max(inner, default=0)
    if name == "shard_map":  # its body is what one shard does
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    return sum(inner)


def _sub_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item


# --- Compiled HLO -------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = r"calls=%?([\w.\-]+)"
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = shape opcode(operands), attributes`; shape and attributes as they are printed."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the brackets, for constants and parameters
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(x for x in self.instructions.values() if x.root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users = collections.defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def opcode(self, name: str) -> str:
        return self.instructions[name].opcode


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of the program, as one chip sees it.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute.
      shape: of its result, as HLO prints it.
      operand_bytes: what the chip puts in, once.
      group: number of chips that take part.
      times: how often it runs.
      crosses: whether it runs over the data-center network, between slices.
      loop: name of the loop's computation that it is in; the entry's where it is in none.
      op_name: where in the Python program it comes from.
    """

    kind: str
    shape: str
    operand_bytes: int
    group: int
    times: int
    crosses: bool
    loop: str
    op_name: str

    @property
    def bytes(self) -> int:
        """Bytes that the chip receives over all runs, by the bandwidth-optimal ring algorithms."""
        others, n = self.group - 1, self.group
        return (
            self.times
            * {
                "all-gather": self.operand_bytes * others,
                "all-reduce": 2 * self.operand_bytes * others // n,
                "reduce-scatter": self.operand_bytes * others // n,
                "all-to-all": self.operand_bytes * others // n,
                "collective-permute": self.operand_bytes,
            }[self.kind]
        )


_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Program:
    """A compiled program, from the text of its HLO.

    Args:
      text: compiled.as_text().
      unknown_trips: iterations of a loop whose number HLO does not tell.
      slices: TPU slices that it runs on.
    """

    def __init__(self, text: str, unknown_trips: int = 1, slices: int = 1):
        self._unknown_trips, self._slices = unknown_trips, slices
        self.computations: dict[str, Computation] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = {}
                self.computations[header[2]] = Computation(header[2], current)
                if header[1]:
                    self.entry = header[2]
            elif " = " in line and line.startswith(" "):
                instruction = _parse(line.strip())
                current[instruction.name] = instruction

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """Iterations of a while loop: XLA's note of it, or the bound in its condition; else `unknown_trips`."""
        noted = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
        return int(noted) if noted else self._counted(computation, loop) or self._unknown_trips

    def _counted(self, computation: Computation, loop: Instruction) -> int | None:
        """Iterations of `for i in range(start, bound, step)`; with a further reason to stop, the most there can be."""
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        body = self.computations[loop.attribute(r"body=%?([\w.\-]+)")]
        comparison = condition.root
        if comparison.opcode == "and":
            comparison = next(
                (x for x in map(condition.instructions.get, comparison.operands) if "direction=LT" in x.attributes),
                comparison,
            )
        if comparison.opcode != "compare" or "direction=LT" not in comparison.attributes:
            return None
        counter, bound = (condition.instructions[name] for name in comparison.operands)
        if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
            return None
        index = int(counter.attribute(r"index=(\d+)"))
        step = _offset(body, body.root.operands[index], index)
        start = computation.instructions[computation.instructions[loop.operands[0]].operands[index]]
        while start.opcode in ("copy", "bitcast"):
            start = computation.instructions[start.operands[0]]
        if not step or start.opcode != "constant":
            return None
        return -(-(int(bound.literal) - int(start.literal)) // step)

    def walk(self) -> Iterator[tuple[Computation, Instruction, int, str, bool]]:
        """(computation, instruction, how often it runs, the innermost loop's body, whether it is part of a fusion).

        Every branch of a conditional is taken to run.
        """

        def visit(name: str, times: int, loop: str, fused: bool):
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times, loop, fused
                if instruction.opcode == "while":
                    trips = self.trips(computation, instruction)
                    for called in re.findall(r"(?:condition|body)=%?([\w.\-]+)", instruction.attributes):
                        yield from visit(called, times * trips, called, fused)
                elif instruction.opcode in ("fusion", "call", "conditional", "async-start"):
                    inside = fused or instruction.opcode == "fusion"
                    for group in _CALLED.findall(instruction.attributes):
                        for called in _NAME.findall(group):
                            yield from visit(called, times, loop, inside)

        yield from visit(self.entry, 1, self.entry, False)

    def collectives(self) -> list[Collective]:
        """Every collective; one that the compiler spread over several fusions counts once, where it starts.

        Between slices a TPU program sends to the hosts, which do the collective that the instruction names.
        """
        found = []
        for computation, instruction, times, loop, _ in self.walk():
            kind = instruction.opcode.removesuffix("-start")
            operands = [computation.instructions[name].shape for name in instruction.operands]
            across = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"') if kind == "send" else None
            if across:
                kind, operands = across.lower().replace("_", "-"), operands[:1]
                kind = kind if kind in _COLLECTIVES else "collective-permute"
            if kind not in _COLLECTIVES:
                continue
            targets = {x.attribute(r'custom_call_target="(\w+)"') for x in computation.instructions.values()}
            if "chain_id=" in instruction.attributes and "AsyncCollectiveStart" not in targets:
                continue  # a later part of the same operation
            if kind == "all-reduce" and "reduce-scatter" in computation.name:
                kind = "reduce-scatter"  # TPUs write it as an all-reduce and a slice in one fusion
            found.append(
                Collective(
                    kind,
                    instruction.shape,
                    sum(map(shape_bytes, operands)),
                    self._slices if across else _groups(instruction.attributes).shape[1],
                    times,
                    bool(across),
                    loop,
                    instruction.attribute(r'op_name="([^"]*)"') or "",
                )
            )
        return [collective for collective in found if collective.bytes]

    def hbm_bytes(self) -> int:
        """Bytes that a chip moves between HBM and its compute units, over all iterations.

        Operands and results of everything that is not inside a fusion, but those that the compiler placed in on-chip
        memory (S(1) in their layout). A slice of an array counts as the slice; what is updated in place as the update.
        """
        return sum(
            times * self._traffic(computation, instruction)
            for computation, instruction, times, _, fused in self.walk()
            if not fused
        )

    def _traffic(self, computation: Computation, instruction: Instruction) -> int:
        opcode, operands = instruction.opcode, instruction.operands
        shapes = [computation.instructions[name].shape for name in operands]
        if opcode in _FREE or opcode.endswith("-done"):
            return 0
        if opcode == "slice-start":  # ((source), slice, context)
            return _hbm(shapes[0]) and shape_bytes(instruction.shape) - shape_bytes(shapes[0])
        if opcode.endswith("-start"):  # the result's tuple holds source and target
            return _hbm(instruction.shape)
        if opcode in ("dynamic-slice", "gather"):
            return 2 * _hbm(instruction.shape)
        if opcode == "dynamic-update-slice":
            return 2 * _hbm(shapes[1])
        if opcode != "fusion":
            return _hbm(instruction.shape) + sum(map(_hbm, shapes))

        body = self.computations[instruction.attribute(_CALLS)]
        aliased = instruction.attribute(r"output_to_operand_aliasing=\{(.*?\)\})") or ""
        kept = {int(i) for i in re.findall(r"\((\d+), \{", aliased)}
        total = 0
        for name in body.root.operands if body.root.opcode == "tuple" else (body.root.name,):
            total += self._written(body, name, body.instructions[name].shape)
        for parameter in body.instructions.values():
            if parameter.opcode == "parameter" and int(parameter.literal) not in kept:
                total += self._read(body, parameter, shapes[int(parameter.literal)])
        return total

    def _written(self, body: Computation, name: str, place: str) -> int:
        """Bytes of a fusion's result that it writes: all, or only the slice that it updates."""
        instruction = body.instructions[name]
        if instruction.opcode in ("bitcast", "copy", "convert"):
            return self._written(body, instruction.operands[0], place)
        if instruction.opcode == "fusion" and not instruction.shape.startswith("("):
            nested = self.computations[instruction.attribute(_CALLS)]
            return self._written(nested, nested.root.name, place)
        if instruction.opcode == "dynamic-update-slice":
            return _hbm(place) and shape_bytes(body.instructions[instruction.operands[1]].shape)
        # What is handed on in place, as asynchronous collectives do, was counted where it was made.
        return 0 if instruction.opcode in ("parameter", "custom-call") else _hbm(place)

    def _read(self, body: Computation, value: Instruction, place: str) -> int:
        """Bytes of a fusion's operand `value` that it reads: all, or only the slices that it takes of it."""
        total = 0
        for user in body.users[value.name]:
            if user.opcode == "bitcast":
                total += self._read(body, user, place)
            elif user.opcode == "fusion":
                nested = self.computations[user.attribute(_CALLS)]
                for parameter in nested.instructions.values():
                    if parameter.opcode == "parameter" and user.operands[int(parameter.literal)] == value.name:
                        total += self._read(nested, parameter, place)
            elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == value.name:
                total += shape_bytes(user.shape)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:  # which is in place
                return _hbm(place)
        return min(total, _hbm(place))


_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("partition-id", "replica-id", "after-all", "optimization-barrier", "add-dependency", "broadcast"),
)


def _parse(line: str) -> Instruction:
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    bracket = rest.index("(")
    closing = _closing(rest, bracket)
    inside = rest[bracket + 1 : closing]
    operands = tuple(_NAME.findall(inside))
    return Instruction(
        name.lstrip("%"), shape, rest[:bracket], operands, inside, rest[closing + 1 :], line.startswith("ROOT ")
    )


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise UserError(f"no closing bracket in {text[:80]!r}")


def _offset(body: Computation, name: str, index: int) -> int | None:
    """By how much the loop variable `index` has grown in `name`; None where that is not a constant."""
    instruction = body.instructions[name]
    if instruction.opcode == "get-tuple-element" and instruction.attribute(r"index=(\d+)") == str(index):
        return 0
    if instruction.opcode in ("copy", "bitcast"):
        return _offset(body, instruction.operands[0], index)
    if instruction.opcode == "add":
        for variable, constant in (instruction.operands, instruction.operands[::-1]):
            if body.opcode(constant) == "constant":
                before = _offset(body, variable, index)
                return None if before is None else before + int(body.instructions[constant].literal)
    return None


def _arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """(bytes, whether it lies in HBM) of each array of a shape, without the padding of tiled layouts."""
    for dtype, sizes, layout in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*|.*", r"\1", dtype) or 0)
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        yield bits * elements // 8, not re.search(r"S\([1-9]", layout)


def shape_bytes(shape: str) -> int:
    """Bytes of a shape as HLO prints it, wherever it lies."""
    return sum(size for size, _ in _arrays(shape))


def _hbm(shape: str) -> int:
    return sum(size for size, in_hbm in _arrays(shape) if in_hbm)


def _groups(attributes: str) -> np.ndarray:
    """Device ids [groups, group size] of a collective, from any of the ways in which HLO writes them."""
    iota = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    match = re.search(r"replica_groups=" + iota, attributes)
    if match:
        shape, source, order = ([int(x) for x in (part or "").split(",") if x] for part in match.groups())
        devices = np.arange(math.prod(source)).reshape(source)
        return (devices.transpose(order) if order else devices).reshape(shape)
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + iota + r"\))? ?\{([^}]*)\}", attributes)
    if match:
        axes, _, source, order, named = match.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        devices = np.arange(math.prod(sizes.values()))
        if source:
            devices = devices.reshape([int(x) for x in source.split(",")])
            devices = devices.transpose([int(x) for x in order.split(",")]) if order else devices
        names, chosen = list(sizes), re.findall(r"'(\w+)'", named)
        devices = devices.reshape(list(sizes.values()))
        devices = np.moveaxis(devices, [names.index(c) for c in chosen], range(-len(chosen), 0))
        return devices.reshape(-1, math.prod(sizes[c] for c in chosen))
    match = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    if match:
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])])
    return np.zeros((1, 1), int)

"""The text of a compiled program (HLO), parsed: its instructions, how often each runs, and the size of its arrays."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from msd_jax.errors import UserError

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-#]+)")  # with "#1" for an element of a tuple
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = shape opcode(operands), attributes`; shape and attributes as they are printed."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # the text between the brackets, for constants and parameters
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of the regular expression `pattern`, searched for in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    def called(self, attribute: str) -> str:
        """The name of the computation that `attribute` ("calls", "condition", "body") names."""
        name = self.attribute(attribute + r"=%?([\w.\-]+)")
        if name is None:
            raise UserError(f"HLO: {self.opcode} {self.name} has no attribute {attribute}")
        return name


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of HLO: instructions by name, in the order in which they are printed."""

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

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]

    def parameters(self) -> list[tuple[int, Instruction]]:
        """(index, parameter) of each."""
        return [(int(x.literal), x) for x in self.instructions.values() if x.opcode == "parameter"]


class Execution(NamedTuple):
    """An instruction in the places where it runs.

    Attributes:
      computation: that it is in.
      instruction: itself.
      times: how often it runs.
      loop: name of the innermost loop's body; the entry's outside loops.
      in_fusion: whether it is part of a fusion.
    """

    computation: Computation
    instruction: Instruction
    times: int
    loop: str
    in_fusion: bool


class HloModule:
    """A compiled program.

    Args:
      text: of its HLO, compiled.as_text() or from XLA's dump.
      while_trips: iterations of a loop that ends by a condition; None: there is none.
    """

    def __init__(self, text: str, while_trips: int | None = None):
        self._while_trips = while_trips
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
                for operand in instruction.operands:
                    _add_element(current, operand)
                current[instruction.name] = instruction

    def executions(self) -> Iterator[Execution]:
        """Every instruction in every place where it runs; every branch of a conditional is assumed to run."""
        return self._executions(self.entry, 1, self.entry, False)

    def _executions(self, name: str, times: int, loop: str, in_fusion: bool) -> Iterator[Execution]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Execution(computation, instruction, times, loop, in_fusion)
            if instruction.opcode == "while":
                trips = self.trips(computation, instruction)
                for attribute in ("condition", "body"):
                    called = instruction.called(attribute)
                    yield from self._executions(called, times * trips, called, in_fusion)
            elif instruction.opcode in ("fusion", "call", "conditional", "async-start"):
                inside = in_fusion or instruction.opcode == "fusion"
                for group in _CALLED.findall(instruction.attributes):
                    for called in _NAME.findall(group):
                        yield from self._executions(called, times, loop, inside)

    def trips(self, computation: Computation, loop: Instruction) -> int:
        """Iterations of a while loop: XLA's note, the most that its bound allows, or `while_trips` without a bound.

        Raises:
          UserError: none of them says how many.
        """
        noted = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
        if noted:
            return int(noted)
        bounded = self._bounded(loop)
        trips = self._counted(computation, loop, *bounded) if bounded else self._while_trips
        if trips is None:
            raise UserError(
                f"no trip count found for the loop {loop.name} ({loop.op_name}) of a compiled program, so its cost is "
                "unknown; plans are tested with jax 0.10 and 0.12"
            )
        return trips

    def _bounded(self, loop: Instruction) -> tuple[int, int] | None:
        """(i, bound) if the loop runs only while its integer variable i is less than a constant; else None."""
        condition = self.computations[loop.called("condition")]
        tests = condition.operands(condition.root) if condition.root.opcode == "and" else [condition.root]
        for test in tests:
            if test.opcode == "compare" and "direction=LT" in test.attributes:
                variable, bound = (_original(condition, operand) for operand in condition.operands(test))
                integer = re.match(r"[su]\d+\[\]", variable.shape)
                if integer and variable.opcode == "get-tuple-element" and bound.opcode == "constant":
                    return _tuple_index(variable), int(bound.literal)
        return None

    def _counted(self, computation: Computation, loop: Instruction, index: int, bound: int) -> int | None:
        """Iterations until the loop's variable number `index` reaches `bound`; None if its steps are not constant."""
        body = self.computations[loop.called("body")]
        step = _growth(body, body.operands(body.root)[index], index)
        start = _original(computation, computation.operands(computation.operands(loop)[0])[index])
        if not step or start.opcode != "constant":
            return None
        return -(-(bound - int(start.literal)) // step)


def _growth(body: Computation, value: Instruction, index: int) -> int | None:
    """By how much `value` exceeds the loop variable `index` in a loop's body; None if that is not a constant."""
    value = _original(body, value)
    if value.opcode == "get-tuple-element" and _tuple_index(value) == index:
        return 0
    if value.opcode == "add":
        for variable, constant in (body.operands(value), body.operands(value)[::-1]):
            if constant.opcode == "constant":
                before = _growth(body, variable, index)
                return None if before is None else before + int(constant.literal)
    return None


def _original(computation: Computation, value: Instruction) -> Instruction:
    """What `value` is a copy of."""
    while value.opcode in ("copy", "bitcast"):
        (value,) = computation.operands(value)
    return value


def _tuple_index(element: Instruction) -> int:
    """The index of a get-tuple-element."""
    return int(element.attribute(r"index=(\d+)") or 0)


def _parse(line: str) -> Instruction:
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    bracket = rest.index("(")
    closing = _closing(rest, bracket)
    literal = rest[bracket + 1 : closing]
    return Instruction(
        name=name.lstrip("%"),
        shape=shape,
        opcode=rest[:bracket],
        operands=tuple(_NAME.findall(literal)),
        literal=literal,
        attributes=rest[closing + 1 :],
        root=line.startswith("ROOT "),
    )


def _add_element(instructions: dict[str, Instruction], name: str) -> None:
    """Adds the get-tuple-element that an operand such as %x#1 stands for; jaxlib 0.12 prints no line for it."""
    base, _, index = name.rpartition("#")
    if not base or name in instructions:
        return
    _add_element(instructions, base)
    if base in instructions:
        shape = tuple_elements(instructions[base].shape)[int(index)]
        element = Instruction(name, shape, "get-tuple-element", (base,), f"%{base}", f", index={index}", root=False)
        instructions[name] = element


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise UserError(f"HLO: no closing bracket in {text[:80]!r}")


@functools.cache
def tuple_elements(shape: str) -> list[str]:
    """The shapes in a tuple's shape."""
    elements, depth = [""], 0
    for character in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and not depth:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip() for element in elements]


def shape_bytes(shape: str) -> int:
    """Bytes of a shape as HLO prints it, in whichever memory."""
    return sum(size for size, _ in _arrays(shape))


def hbm_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape that are in HBM; S(1) and the like in a layout mean on-chip memory."""
    return sum(size for size, in_hbm in _arrays(shape) if in_hbm)


def _arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """(bytes, whether it is in HBM) of each array of a shape, without the padding of tiled layouts."""
    for dtype, sizes, layout in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"^[a-z]+(\d+).*|.*", r"\1", dtype) or 0)
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        yield bits * elements // 8, not re.search(r"S\([1-9]", layout)

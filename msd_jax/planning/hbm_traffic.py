"""The bytes that a compiled program moves between HBM and a device's compute units."""

import re

from msd_jax.planning.hlo import Computation, HloModule, Instruction, hbm_bytes, shape_bytes, tuple_elements

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("partition-id", "replica-id", "after-all", "optimization-barrier", "add-dependency", "broadcast"),
    *("async-start", "async-update"),  # what they wrap is an execution of its own
)


def hbm_traffic(module: HloModule) -> int:
    """Bytes moved over all iterations.

    Operands and results of every instruction outside fusions, except those in on-chip memory. An array that is sliced
    counts as the slice; one that is updated in place, as the update.
    """
    return sum(
        execution.times * _traffic(module, execution.computation, execution.instruction)
        for execution in module.executions()
        if not execution.in_fusion
    )


def _traffic(module: HloModule, computation: Computation, instruction: Instruction) -> int:
    opcode, shape = instruction.opcode, instruction.shape
    shapes = [operand.shape for operand in computation.operands(instruction)]
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode.endswith("-start") and shape.startswith("(("):  # short for async-start: ((operands), result, context)
        opcode, shape = opcode.removesuffix("-start"), tuple_elements(shape)[1]
    if opcode.endswith("-start") and opcode != "all-reduce-start":  # the result's tuple holds source and target
        return hbm_bytes(shape)
    if opcode in ("slice", "dynamic-slice", "gather"):
        return _copied(shape, source=shapes[0], target=shape)
    if opcode == "dynamic-update-slice":
        return _copied(shapes[1], source=shapes[1], target=shape)
    if opcode == "fusion":
        return _fusion_traffic(module, instruction, shapes)
    return hbm_bytes(shape) + sum(map(hbm_bytes, shapes))


def _copied(part: str, source: str, target: str) -> int:
    """Bytes to copy `part` of `source` to (a part of) `target`."""
    return shape_bytes(part) * (bool(hbm_bytes(source)) + bool(hbm_bytes(target)))


def _fusion_traffic(module: HloModule, fusion: Instruction, shapes: list[str]) -> int:
    body = module.computations[fusion.called("calls")]
    aliased = fusion.attribute(r"output_to_operand_aliasing=\{(.*?\)\})") or ""
    in_place = {int(i) for i in re.findall(r"\((\d+), \{", aliased)}
    results = body.operands(body.root) if body.root.opcode == "tuple" else [body.root]
    written = sum(_written(module, body, result, result.shape) for result in results)
    parameters = ((index, parameter) for index, parameter in body.parameters() if index not in in_place)
    return written + sum(_read(module, body, parameter, shapes[index]) for index, parameter in parameters)


def _written(module: HloModule, body: Computation, value: Instruction, place: str) -> int:
    """Bytes of a fusion's result `value`, whose shape is `place`, that it writes: all, or the slice that it updates."""
    if value.opcode in ("bitcast", "copy", "convert"):
        return _written(module, body, body.operands(value)[0], place)
    if value.opcode == "fusion" and not value.shape.startswith("("):
        nested = module.computations[value.called("calls")]
        passed_on = _passed_on(module, nested)
        if passed_on is not None:
            return _written(module, body, body.operands(value)[passed_on], place)
        return _written(module, nested, nested.root, place)
    if value.opcode == "dynamic-update-slice":
        return hbm_bytes(place) and shape_bytes(body.operands(value)[1].shape)
    # What is passed on in place, as by asynchronous collectives, was counted where it was made.
    return 0 if value.opcode in ("parameter", "custom-call") else hbm_bytes(place)


def _read(module: HloModule, body: Computation, value: Instruction, place: str) -> int:
    """Bytes of a fusion's operand `value`, whose shape is `place`, that it reads: all, or the slices that it takes."""
    total = 0
    for user in body.users[value.name]:
        if user.opcode == "bitcast" or (user.opcode == "copy" and user is not body.root):
            total += _read(module, body, user, place)
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls")]
            passed_on = _passed_on(module, nested, through=("bitcast", "copy"))  # perhaps with other tiles
            for index, parameter in nested.parameters():
                if user.operands[index] == value.name:
                    read_by = (body, user) if index == passed_on else (nested, parameter)
                    total += _read(module, *read_by, place)
        elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == value.name:
            total += shape_bytes(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:  # which is in place
            return hbm_bytes(place)
    return min(total, hbm_bytes(place))


def _passed_on(module: HloModule, nested: Computation, through: tuple[str, ...] = ("bitcast",)) -> int | None:
    """The number of the parameter that a nested fusion returns, but for `through`; None if it computes its result."""
    value = nested.root
    while value.opcode in (*through, "fusion"):
        operand: int | None = 0
        if value.opcode == "fusion":
            operand = _passed_on(module, module.computations[value.called("calls")], through)
        if operand is None:
            return None
        value = nested.operands(value)[operand]
    return int(value.literal) if value.opcode == "parameter" else None

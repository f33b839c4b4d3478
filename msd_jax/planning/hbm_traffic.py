"""The bytes that a compiled program moves between HBM and a device's compute units."""

import re

from msd_jax.planning.hlo import Computation, HloModule, Instruction, hbm_bytes, shape_bytes

_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("partition-id", "replica-id", "after-all", "optimization-barrier", "add-dependency", "broadcast"),
)


def hbm_traffic(module: HloModule) -> int:
    """Bytes moved over all iterations.

    Operands and results of every instruction outside fusions, except those in on-chip memory. A slice of an array
    counts as the slice; what is updated in place, as the update.
    """
    return sum(
        execution.times * _traffic(module, execution.computation, execution.instruction)
        for execution in module.executions()
        if not execution.in_fusion
    )


def _traffic(module: HloModule, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    shapes = [operand.shape for operand in computation.operands(instruction)]
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "slice-start":  # ((source), slice, context)
        return hbm_bytes(shapes[0]) and shape_bytes(instruction.shape) - shape_bytes(shapes[0])
    if opcode.endswith("-start"):  # the result's tuple holds source and target
        return hbm_bytes(instruction.shape)
    if opcode in ("dynamic-slice", "gather"):
        return 2 * hbm_bytes(instruction.shape)
    if opcode == "dynamic-update-slice":
        return 2 * hbm_bytes(shapes[1])
    if opcode == "fusion":
        return _fusion_traffic(module, instruction, shapes)
    return hbm_bytes(instruction.shape) + sum(map(hbm_bytes, shapes))


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
        return _written(module, nested, nested.root, place)
    if value.opcode == "dynamic-update-slice":
        return hbm_bytes(place) and shape_bytes(body.operands(value)[1].shape)
    # What is passed on in place, as by asynchronous collectives, was counted where it was made.
    return 0 if value.opcode in ("parameter", "custom-call") else hbm_bytes(place)


def _read(module: HloModule, body: Computation, value: Instruction, place: str) -> int:
    """Bytes of a fusion's operand `value`, whose shape is `place`, that it reads: all, or the slices that it takes."""
    total = 0
    for user in body.users[value.name]:
        if user.opcode == "bitcast":
            total += _read(module, body, user, place)
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls")]
            for index, parameter in nested.parameters():
                if user.operands[index] == value.name:
                    total += _read(module, nested, parameter, place)
        elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == value.name:
            total += shape_bytes(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:  # which is in place
            return hbm_bytes(place)
    return min(total, hbm_bytes(place))

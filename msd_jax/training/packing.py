"""Packs a batch's sequences into rows of one size, so that training compiles one program and computes little padding.

Replies end where they end: in a batch that is padded to its longest sequence most columns are empty, and every new
length costs a compilation. Here both roles' sequences lie one after the other in rows of a fixed length, and as many
`Pack`s of a fixed number of rows as it takes are summed up to the step's gradient. What a token attends to is told by
segments, so that nothing but the order of sums depends on what shares a row.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from msd_jax.models.forward import PackedRows

Array = Any  # of NumPy on the host, of JAX on devices


class TrainBatch(NamedTuple):
    """One batch of responses under both prompts, int32; prompts left-padded, responses right-padded.

    The teacher's prompt is None where the loss reads no teacher (`train_step.reads_teacher`).
    """

    student_prompt_BxP: Array
    student_length_B: Array
    teacher_prompt_BxP: Array | None
    teacher_length_B: Array | None
    response_BxR: Array
    response_length_B: Array


class Pack(NamedTuple):
    """What the devices sum the loss over at a time: the same response tokens in both roles' rows.

    Attributes:
      student, teacher: rows; no teacher where the loss reads none.
      response_SxN: int32, the response tokens of each part of the rows, first those that there are.
      mask_SxN: bool, true at them.
    """

    student: PackedRows
    teacher: PackedRows | None
    response_SxN: Array
    mask_SxN: Array


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of every pack of a run.

    Attributes:
      parts: S, that the rows are split into, over `data` and `fsdp`.
      rows: of each part and role.
      student, teacher: tokens of a row; 0 for a teacher that the loss does not read.
    """

    parts: int
    rows: int
    student: int
    teacher: int

    @property
    def tokens(self) -> int:
        """Of a pack, padding included."""
        return self.parts * self.rows * (self.student + self.teacher)


def row_lengths(longest: tuple[int, int], mean: tuple[float, float], multiple: int) -> tuple[int, int]:
    """Tokens of the student's and the teacher's rows: they hold the longest sequence, and fill up at the same rate.

    Args:
      longest: tokens of each role's longest sequence; 0 for a teacher that the loss does not read.
      mean: of all its sequences.
      multiple: of which rows have their length.
    """

    def rounded(length: float) -> int:
        return -(-math.ceil(length) // multiple) * multiple

    student, teacher = longest
    if not teacher:
        return rounded(student), 0
    ratio = mean[1] / mean[0]
    return rounded(max(student, teacher / ratio)), rounded(max(teacher, student * ratio))


def pack(batch: TrainBatch, shape: Shape) -> list[Pack]:
    """The packs of a batch on the host: as few as first-fit needs, and at most one for each `parts * rows` sequences.

    The longest sequences come first; a sequence without response tokens is left out.

    Args:
      batch: of NumPy arrays.
      shape: whose rows hold each of its sequences.
    """
    builders: list[_Builder] = []
    sequences = [sequence for row in range(len(batch.response_length_B)) if (sequence := _sequence(batch, row))]
    for sequence in sorted(sequences, key=lambda sequence: -max(map(len, sequence.inputs))):
        if not any(builder.add(sequence) for builder in builders):
            builders.append(_Builder(shape))
            added = builders[-1].add(sequence)
            assert added, (shape, [len(tokens) for tokens in sequence.inputs])
    return [builder.pack for builder in builders]


def empty(shape: Shape) -> Pack:
    """A pack without sequences."""
    return _Builder(shape).pack


class _Sequence(NamedTuple):
    """What the roles read, all but the last token of prompt and response, and the response."""

    inputs: tuple[np.ndarray, ...]
    response: np.ndarray


def _sequence(batch: TrainBatch, row: int) -> _Sequence | None:
    response = batch.response_BxR[row, : batch.response_length_B[row]]
    prompts = [(batch.student_prompt_BxP, batch.student_length_B)]
    if batch.teacher_prompt_BxP is not None:
        prompts.append((batch.teacher_prompt_BxP, batch.teacher_length_B))
    inputs = (np.append(prompt_BxP[row, -length_B[row] :], response[:-1]) for prompt_BxP, length_B in prompts)
    return _Sequence(tuple(inputs), response) if len(response) else None


class _Builder:
    """A pack that is being filled."""

    def __init__(self, shape: Shape):
        S, N = shape.parts, shape.rows * shape.student  # no more response tokens than the student's rows have room
        lengths = [length for length in (shape.student, shape.teacher) if length]
        self._roles = [_empty_rows(shape, length, N) for length in lengths]
        self._used = [np.zeros((S, shape.rows), int) for _ in lengths]  # tokens of each row
        self._segments = [np.zeros((S, shape.rows), int) for _ in lengths]
        self._responses = np.zeros(S, int)  # response tokens of each part
        teacher = self._roles[1] if shape.teacher else None
        self.pack = Pack(self._roles[0], teacher, np.zeros((S, N), np.int32), np.zeros((S, N), bool))

    def add(self, sequence: _Sequence) -> bool:
        """Adds a sequence to the first part with room for it in both roles; False if there is none."""
        needs = [len(tokens) for tokens in sequence.inputs]
        lengths = [rows.token_BxT.shape[1] for rows in self._roles]
        room_SxB = [used_SxB + need <= length for used_SxB, need, length in zip(self._used, needs, lengths)]
        has_room_S = np.all([room.any(axis=1) for room in room_SxB], axis=0)
        if not has_room_S.any():
            return False
        part = int(has_room_S.argmax())
        first, count = self._responses[part], len(sequence.response)
        columns = slice(first, first + count)
        for role, tokens in enumerate(sequence.inputs):
            row = int(room_SxB[role][part].argmax())
            self._write(role, part, row, tokens, columns, count)
        self.pack.response_SxN[part, columns], self.pack.mask_SxN[part, columns] = sequence.response, True
        self._responses[part] += count
        return True

    def _write(self, role: int, part: int, row: int, tokens: np.ndarray, columns: slice, count: int) -> None:
        """Writes a sequence into a row; its last `count` places predict the response tokens in `columns`."""
        rows, begin = self._roles[role], self._used[role][part, row]
        end, index = begin + len(tokens), part * self._used[role].shape[1] + row
        self._segments[role][part, row] += 1
        rows.token_BxT[index, begin:end] = tokens
        rows.position_BxT[index, begin:end] = np.arange(len(tokens))
        rows.segment_BxT[index, begin:end] = self._segments[role][part, row]
        rows.predicts_SxN[part, columns] = row * rows.token_BxT.shape[1] + np.arange(end - count, end)
        self._used[role][part, row] = end


def _empty_rows(shape: Shape, length: int, N: int) -> PackedRows:
    row_shape = (shape.parts * shape.rows, length)
    token, position, segment = (np.zeros(row_shape, np.int32) for _ in range(3))
    return PackedRows(token, position, segment, np.zeros((shape.parts, N), np.int32))


def filled(packs: Sequence[Pack]) -> tuple[int, int]:
    """(tokens of both roles, of which real) of a batch's packs."""
    rows = [role for pack in packs for role in (pack.student, pack.teacher) if role]
    return sum(role.token_BxT.size for role in rows), sum(int((role.segment_BxT > 0).sum()) for role in rows)

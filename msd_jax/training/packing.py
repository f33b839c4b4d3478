"""Packs a batch's sequences into rows of one size, so that training compiles one program and computes little padding.

Replies end where they end: in a batch that is padded to its longest sequence most columns are empty, and every new
length costs a compilation. Here both roles' sequences lie one after the other in rows of a fixed length, and as many
`Pack`s of a fixed number of rows as it takes are summed up to the step's gradient. What a token attends to is told by
segments, so that nothing but the order of sums depends on what shares a row.
"""

import dataclasses
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
      lengths: tokens of a row, of the student's and, where the loss reads a teacher, of the teacher's.
    """

    parts: int
    rows: int
    lengths: tuple[int, ...]

    @property
    def responses(self) -> int:
        """N, the response tokens of a part that there is room for: no more than the student's rows have."""
        return self.rows * self.lengths[0]


def pack(batch: TrainBatch, shape: Shape) -> list[Pack]:
    """The packs of a batch on the host. A sequence without response tokens is left out.

    Args:
      batch: of NumPy arrays.
      shape: whose rows hold each of its sequences.
    """
    rows_N = np.flatnonzero(batch.response_length_B)
    response_N = [batch.response_BxR[row, : batch.response_length_B[row]] for row in rows_N]
    prompts = [(batch.student_prompt_BxP, batch.student_length_B)]
    if batch.teacher_prompt_BxP is not None:
        prompts.append((batch.teacher_prompt_BxP, batch.teacher_length_B))
    # Nothing is predicted after the last token of a response.
    read_KxN = [
        [np.append(prompt_BxP[row, -length_B[row] :], response[:-1]) for row, response in zip(rows_N, response_N)]
        for prompt_BxP, length_B in prompts
    ]
    places = place(np.array([[len(tokens) for tokens in read_N] for read_N in read_KxN]).T, shape)
    packs = [empty(shape) for _ in range(1 + max((at.pack for at in places), default=-1))]
    begins = np.zeros((len(packs), shape.parts), int)  # of the next response
    for n, (at, response) in enumerate(zip(places, response_N)):
        packed, begin = packs[at.pack], begins[at.pack, at.part]
        columns = slice(begin, begin + len(response))
        begins[at.pack, at.part] += len(response)
        packed.response_SxN[at.part, columns], packed.mask_SxN[at.part, columns] = response, True
        roles = [role for role in (packed.student, packed.teacher) if role]
        for rows, read_N, row, first in zip(roles, read_KxN, at.rows, at.begins):
            _write(rows, read_N[n], at.part * shape.rows + row, first)
            last = row * rows.token_BxT.shape[1] + first + len(read_N[n])
            rows.predicts_SxN[at.part, columns] = np.arange(last - len(response), last)
    return packs


def _write(rows: PackedRows, tokens: np.ndarray, row: int, first: int) -> None:
    """Writes a sequence into a row from column `first` on."""
    columns = slice(first, first + len(tokens))
    rows.token_BxT[row, columns], rows.position_BxT[row, columns] = tokens, np.arange(len(tokens))
    rows.segment_BxT[row, columns] = rows.segment_BxT[row].max() + 1


def empty(shape: Shape) -> Pack:
    """A pack without sequences."""

    def rows(length: int) -> PackedRows:
        token, position, segment = (np.zeros((shape.parts * shape.rows, length), np.int32) for _ in range(3))
        return PackedRows(token, position, segment, np.zeros(places, np.int32))

    places = (shape.parts, shape.responses)
    roles = [rows(length) for length in shape.lengths]
    return Pack(roles[0], roles[1] if roles[1:] else None, np.zeros(places, np.int32), np.zeros(places, bool))


class Place(NamedTuple):
    """Where a sequence is: the pack and its part, and for each role the row in that part and the first column."""

    pack: int
    part: int
    rows: tuple[int, ...]
    begins: tuple[int, ...]


def place(length_NxK: np.ndarray, shape: Shape) -> list[Place]:
    """Places N sequences, of which each of K roles reads so many tokens, in as few packs as first-fit needs.

    The longest come first, each in the first part of a pack that has room in every role, and there in the fullest row.
    """
    limits = np.array(shape.lengths)
    free_BxKxR = np.zeros((0, len(limits), shape.rows), int)  # of the parts of all packs
    places: list[Place] = [Place(0, 0, (), ())] * len(length_NxK)
    for n in np.argsort(-(length_NxK / limits).max(axis=1), kind="stable"):
        need_K = length_NxK[n]
        has_room_B = (free_BxKxR.max(axis=2) >= need_K).all(axis=1)
        if not has_room_B.any():
            added = np.tile(limits[:, None], (shape.parts, 1, shape.rows))
            has_room_B = np.append(has_room_B, np.full(shape.parts, (need_K <= limits).all()))
            free_BxKxR = np.append(free_BxKxR, added, axis=0)
            assert has_room_B.any(), (shape, need_K)
        index = int(has_room_B.argmax())
        free_KxR = free_BxKxR[index]
        fullest_K = np.where(free_KxR >= need_K[:, None], free_KxR, limits[:, None] + 1).argmin(axis=1)
        chosen = np.arange(len(limits)), fullest_K
        begin_K = limits - free_KxR[chosen]
        free_KxR[chosen] -= need_K
        places[n] = Place(*divmod(index, shape.parts), tuple(fullest_K.tolist()), tuple(begin_K.tolist()))
    return places


def filled(packs: Sequence[Pack]) -> tuple[int, int]:
    """(tokens of both roles, of which real) of a batch's packs."""
    rows = [role for pack in packs for role in (pack.student, pack.teacher) if role]
    return sum(role.token_BxT.size for role in rows), sum(int((role.segment_BxT > 0).sum()) for role in rows)

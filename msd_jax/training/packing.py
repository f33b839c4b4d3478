"""Packs a batch's sequences into rows of one size, so that training compiles one program and computes little padding.

Replies end where they end: in a batch that is padded to its longest sequence most columns are empty, and every new
length costs a compilation. Here both roles' sequences lie one after the other in rows of a fixed length, and as many
`Pack`s of a fixed number of rows as it takes are summed up to the step's gradient. Segments and positions determine
what a token attends to, so that nothing but the order of sums depends on what shares a row.

Most of a teacher's prompt is the same instruction for every query. A row holds what the prompts of a language begin
with once, and all its sequences in that language attend to it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from msd_jax.models.attention import BEGINNINGS
from msd_jax.models.forward import PackedRows

Array = Any  # of NumPy on the host, of JAX on devices
Beginnings = tuple[tuple[tuple[int, ...], ...], ...]  # token ids, of each role, of each of some groups of prompts


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
      beginnings: with which many prompts begin, and which sequences in the same row share. A prompt belongs to the
        first group that it begins with in every role.
    """

    parts: int
    rows: int
    lengths: tuple[int, ...]
    beginnings: Beginnings = ()

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
    prompt_KxN = [[prompt_BxP[row, -length_B[row] :] for row in rows_N] for prompt_BxP, length_B in prompts]
    group_N = [group_of(prompt_K, shape.beginnings) for prompt_K in zip(*prompt_KxN)]
    # Nothing is predicted after the last token of a response.
    read_KxN = [[np.append(*both) for both in zip(prompt_N, (r[:-1] for r in response_N))] for prompt_N in prompt_KxN]
    places = place(np.array([[len(tokens) for tokens in read_N] for read_N in read_KxN]).T, shape, group_N)
    packs = [empty(shape) for _ in range(1 + max((at.pack for at in places), default=-1))]
    ends = np.zeros((len(packs), shape.parts), int)  # of the responses before
    shared_GxK = beginning_lengths(shape.beginnings, len(prompts))
    for n, (at, response) in enumerate(zip(places, response_N)):
        packed, end = packs[at.pack], ends[at.pack, at.part]
        columns = slice(end, end + len(response))
        ends[at.pack, at.part] += len(response)
        packed.response_SxN[at.part, columns], packed.mask_SxN[at.part, columns] = response, True
        roles = [role for role in (packed.student, packed.teacher) if role]
        for rows, read_N, row, span, shared in zip(roles, read_KxN, at.rows, at.spans, shared_GxK[group_N[n]]):
            _write(rows, read_N[n], at.part * shape.rows + row, span, int(shared), group_N[n], n)
            last = row * rows.token_BxT.shape[1] + span.stop
            rows.predicts_SxN[at.part, columns] = np.arange(last - len(response), last)
    return packs


def group_of(prompt_K: Sequence[np.ndarray], beginnings: Beginnings) -> int:
    """The first group that these prompts, one of each role, begin with and are longer than; -1 if there is none."""

    def begins(prompt: np.ndarray, ids: tuple[int, ...]) -> bool:
        return len(ids) < len(prompt) and prompt[: len(ids)].tolist() == list(ids)

    found = (i for i, group in enumerate(beginnings) if all(map(begins, prompt_K, group)))
    return next(found, -1)


def beginning_lengths(beginnings: Beginnings, roles: int) -> np.ndarray:
    """Tokens of the beginnings, [G + 1, K]; the last row, zeros, is for what belongs to no group (index -1)."""
    return np.array([*([len(ids) for ids in group] for group in beginnings), [0] * roles])


def _write(rows: PackedRows, tokens: np.ndarray, row: int, span: slice, shared: int, group: int, index: int) -> None:
    """Writes a sequence into a row so that it ends where `span` does; if that has room, with the beginning.

    Args:
      rows: that are written to.
      tokens: of the whole sequence.
      row: of the rows.
      span: the columns.
      shared: tokens of the beginning of its group.
      group: of the shape's; -1 for none.
      index: that no other sequence in the rows has.
    """
    first = len(tokens) - (span.stop - span.start)  # 0, or what the row has of it already
    rows.token_BxT[row, span], rows.position_BxT[row, span] = tokens[first:], np.arange(first, len(tokens))
    # No token is of segment BEGINNINGS - 1, the beginning of those that share none.
    beginning = group + 1 if group >= 0 else BEGINNINGS - 1
    rows.segment_BxT[row, span.start : span.stop - (len(tokens) - shared)] = beginning
    rows.segment_BxT[row, span.stop - (len(tokens) - shared) : span.stop] = beginning + BEGINNINGS * (index + 1)


def empty(shape: Shape) -> Pack:
    """A pack without sequences."""

    def rows(length: int) -> PackedRows:
        token, position, segment = (np.zeros((shape.parts * shape.rows, length), np.int32) for _ in range(3))
        return PackedRows(token, position, segment, np.zeros(places, np.int32))

    places = (shape.parts, shape.responses)
    roles = [rows(length) for length in shape.lengths]
    return Pack(roles[0], roles[1] if roles[1:] else None, np.zeros(places, np.int32), np.zeros(places, bool))


class Place(NamedTuple):
    """Where a sequence is: the pack and its part, and for each role the row in that part and the columns.

    Where the row has the sequence's beginning already, there are columns for the rest of it alone.
    """

    pack: int
    part: int
    rows: tuple[int, ...]
    spans: tuple[slice, ...]


def place(length_NxK: np.ndarray, shape: Shape, group_N: Sequence[int] | None = None) -> list[Place]:
    """Places N sequences, of which each of K roles reads so many tokens, in as few packs as are found to do.

    From `fewest` packs on, sequences go where most is left, so that each pack gets long and short ones: what a role
    reads of a short sequence is not in proportion to another's. At most, there are as many packs as first-fit needs.

    Args:
      length_NxK: tokens, those of beginnings included.
      shape: of the packs.
      group_N: of each sequence; -1 for none. None: none has any.
    """
    groups = np.full(len(length_NxK), -1) if group_N is None else np.asarray(group_N, int)
    least = fewest(length_NxK, shape, groups)
    if places := _placed(length_NxK, shape, groups, least):
        return places
    first_fit = _placed(length_NxK, shape, groups)
    assert first_fit is not None
    most = 1 + max((at.pack for at in first_fit), default=0)
    spread = (_placed(length_NxK, shape, groups, packs) for packs in range(least + 1, most))
    return next((places for places in spread if places), first_fit)


def fewest(length_NxK: np.ndarray, shape: Shape, group_N: np.ndarray) -> int:
    """Packs that these sequences need at least, whose arguments are those of `place`."""
    needed_K = (length_NxK - beginning_lengths(shape.beginnings, len(shape.lengths))[group_N]).sum(axis=0)
    return max(1, *np.ceil(needed_K / (shape.parts * shape.rows * np.array(shape.lengths))).astype(int).tolist())


def _placed(length_NxK: np.ndarray, shape: Shape, group_N: np.ndarray, packs: int = 0) -> list[Place] | None:
    """Places sequences in so many packs, or returns None; 0: in as many as first-fit needs.

    Group by group, the longest come first, each in the part of a pack that has most left in the role that has least, or
    in the first; there in the row where it takes least, or in the fullest of these.
    """
    limits, shared_GxK = np.array(shape.lengths), beginning_lengths(shape.beginnings, len(shape.lengths))
    empty_BxKxR = np.tile(limits[:, None], (shape.parts, 1, shape.rows))  # what is free in the parts of a pack
    free_BxKxR = np.tile(empty_BxKxR, (max(packs, 1), 1, 1))
    # Whether a row has a beginning.
    has_BxGxKxR = np.zeros((len(free_BxKxR), len(shared_GxK), len(limits), shape.rows), bool)
    places: list[Place] = [Place(0, 0, (), ())] * len(length_NxK)
    for n in np.lexsort((-(length_NxK / limits).max(axis=1), group_N)):
        length_K, group, shared_Kx1 = length_NxK[n], group_N[n], shared_GxK[group_N[n]][:, None]
        # A row has room where it is free, and where it has the sequence's beginning.
        room_BxKxR = free_BxKxR + shared_Kx1 * has_BxGxKxR[:, group] if shared_Kx1.any() else free_BxKxR
        has_room_B = (room_BxKxR.max(axis=2) >= length_K).all(axis=1)
        if not has_room_B.any():
            if packs:
                return None
            assert (length_K <= limits).all(), (shape, length_K)
            free_BxKxR = np.append(free_BxKxR, empty_BxKxR, axis=0)
            has_BxGxKxR = np.append(has_BxGxKxR, np.zeros((shape.parts, *has_BxGxKxR.shape[1:]), bool), axis=0)
            has_room_B = np.append(has_room_B, np.ones(shape.parts, bool))
        left_B = (free_BxKxR.sum(axis=2) / limits).min(axis=1) if packs else 1
        index = int((has_room_B * left_B).argmax())
        free_KxR, shared_KxR = free_BxKxR[index], shared_Kx1 * has_BxGxKxR[index, group]
        fits_KxR = free_KxR + shared_KxR >= length_K[:, None]
        row_K = np.where(fits_KxR, free_KxR - shared_KxR * (limits.max() + 1), np.iinfo(int).max).argmin(axis=1)
        chosen = np.arange(len(limits)), row_K
        begin_K, need_K = limits - free_KxR[chosen], length_K - shared_KxR[chosen]
        free_KxR[chosen] -= need_K
        has_BxGxKxR[index, group][chosen] = True
        spans = tuple(slice(begin, begin + need) for begin, need in zip(begin_K.tolist(), need_K.tolist()))
        places[n] = Place(*divmod(index, shape.parts), tuple(row_K.tolist()), spans)
    return places


def filled(packs: Sequence[Pack]) -> tuple[int, int]:
    """(tokens of both roles, of which real) of a batch's packs."""
    rows = [role for pack in packs for role in (pack.student, pack.teacher) if role]
    return sum(role.token_BxT.size for role in rows), sum(int((role.segment_BxT > 0).sum()) for role in rows)

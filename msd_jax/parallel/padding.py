"""Left-padding, the few sizes to which lengths are padded, and what rows have in common."""

import itertools
from collections.abc import Sequence

import numpy as np


def left_pad(
    rows: Sequence[np.ndarray], limit: int, pad_id: int, columns: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, P] with each row at the right, int32 lengths [B]); P is `columns`, or the longest row's bucket."""
    length_B = np.array([len(row) for row in rows], np.int32)
    prompt_BxP = np.full((len(rows), columns or bucket(int(length_B.max()), limit)), pad_id, np.int32)
    for padded, row in zip(prompt_BxP, rows):
        padded[len(padded) - len(row) :] = row
    return prompt_BxP, length_B


def half_or_whole(length: int, whole: int) -> int:
    """The size to which `length` is padded where two sizes are to do."""
    return whole // 2 if length <= whole // 2 else whole


def bucket(length: int, limit: int) -> int:
    """The size to which `length` is padded: 16, 24, 32, 48, 64, 96, ..., and `limit` at most.

    Few sizes mean few compilations, and above 16 tokens at most a third of a batch's longest row is padding.

    Raises:
      ValueError: `length` exceeds `limit`.
    """
    if length > limit:
        raise ValueError(f"a length of {length} exceeds its limit of {limit}")
    sizes = (base << shift for shift in itertools.count() for base in (16, 24))
    return min(limit, next(size for size in sizes if size >= length))


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with; each has at least one more."""
    first, end = rows[0], min(map(len, rows)) - 1
    return min(int(np.argmin(np.append(ids[:end] == first[:end], False))) for ids in rows)

"""Training queries that nearly equal evaluation queries, on which good results may be memory rather than safety."""

import collections
import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse

from msd_jax.data.records import Query

ACTIONS = ("report", "drop")  # of config.data.near_duplicates
THRESHOLD = 0.8  # the least similarity
_GRAM = 3  # characters; three code points of 21 bits fill a 64-bit integer
_ROWS = 512  # training queries compared at a time, which bounds the memory


@dataclasses.dataclass(frozen=True, order=True)
class Pair:
    """Two queries that are similar in one language.

    Attributes:
      similarity: 0 to 1, see `find`.
      exact: whether the normalised texts are equal.
      language: in which they are similar.
      train_id, eval_id: ids of the records.
    """

    similarity: float
    exact: bool
    language: str
    train_id: str
    eval_id: str


def find(train: Sequence[Query], evaluation: Sequence[Query], threshold: float = THRESHOLD) -> list[Pair]:
    """Finds the closest counterpart of each query, on either side, in each language that both sides have.

    Texts are normalised (NFKC, case, punctuation, white space). Similarity is the Jaccard index of their sets of
    character trigrams; every pair of texts is compared.

    Args:
      train, evaluation: the queries.
      threshold: the least similarity of a pair.

    Returns:
      Pairs, the most similar first.
    """
    languages = {code for query in train for code in query.texts} & {c for query in evaluation for c in query.texts}
    pairs = []
    for language in sorted(languages):
        a, b = ([query for query in queries if language in query.texts] for queries in (train, evaluation))
        texts_a, texts_b = ([normalised(query.texts[language]) for query in queries] for queries in (a, b))
        pairs += [
            Pair(similarity, texts_a[i] == texts_b[j], language, a[i].id, b[j].id)
            for (i, j), similarity in _join(texts_a, texts_b, threshold).items()
        ]
    return sorted(pairs, reverse=True)


def find_in_benchmarks(
    train: Sequence[Query], benchmarks: Mapping[str, Sequence[Query]]
) -> tuple[list[dict[str, str | float | bool]], list[str]]:
    """Compares training queries with those of each benchmark.

    Returns:
      Rows for near_duplicates.jsonl, and one line to print per benchmark with near-duplicates. Neither quotes a text.
    """
    rows: list[dict[str, str | float | bool]] = []
    lines: list[str] = []
    for name, evaluation in benchmarks.items():
        pairs = find(train, evaluation)
        if not pairs:
            continue
        rows += [{"benchmark": name} | dataclasses.asdict(pair) for pair in pairs]
        by_language = collections.Counter(language for language, _ in {(pair.language, pair.eval_id) for pair in pairs})
        closest = pairs[0]
        lines.append(
            "near-duplicates: "
            + ", ".join(f"{count} ({language})" for language, count in sorted(by_language.items()))
            + f" of {len(evaluation)} queries of benchmark {name} have a near-copy in the training data; closest: "
            # An id is somebody's data: repr escapes what could steer a terminal.
            + f"{closest.train_id!r} and {closest.eval_id!r} in {closest.language} "
            f"({'equal' if closest.exact else format(closest.similarity, '.2f')})"
        )
    return rows, lines


class _Kept(dict):
    """Code point -> itself for letters, marks and digits, nothing for invisible formatting, else a space."""

    def __missing__(self, code: int) -> str:
        category = unicodedata.category(chr(code))
        self[code] = chr(code) if category[0] in "LMN" else "" if category == "Cf" else " "
        return self[code]


_KEPT = _Kept()


def normalised(text: str) -> str:
    """`text` without the differences in form that do not make another query."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.translate(_KEPT).split()) or " ".join(text.split())  # symbols alone: keep them


def _join(a: Sequence[str], b: Sequence[str], threshold: float) -> dict[tuple[int, int], float]:
    """(index in a, index in b) -> Jaccard index of each text and the closest on the other side, from `threshold` on."""
    sets = [_grams(text) for text in (*a, *b)]
    size_N = np.array([len(grams) for grams in sets], np.float32)
    _, gram, frequency_G = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    row = np.repeat(np.arange(len(sets)), size_N.astype(int))
    has_NxG = scipy.sparse.csr_array((np.ones(len(row), np.float32), (row, gram)), (len(sets), len(frequency_G)))
    # Common grams are counted by a dense product, rare ones by a sparse one: each is fast where the other is slow.
    common_G = frequency_G > 0.08 * len(sets)
    common_NxC, rare_NxR = has_NxG[:, common_G].toarray(), has_NxG[:, ~common_G].tocsr()
    common_CxB, rare_RxB, size_B = common_NxC[len(a) :].T, rare_NxR[len(a) :].T.tocsr(), size_N[len(a) :]
    found, best_B, of_B = {}, np.full(len(b), -1.0, np.float32), np.zeros(len(b), int)
    for first in range(0, len(a), _ROWS):
        rows = slice(first, min(first + _ROWS, len(a)))
        shared_RxB = common_NxC[rows] @ common_CxB
        shared_RxB += (rare_NxR[rows] @ rare_RxB).toarray()
        similarity_RxB = shared_RxB / (size_N[rows, None] + size_B - shared_RxB)
        for i, j in enumerate(similarity_RxB.argmax(axis=1)):
            found[first + i, int(j)] = float(similarity_RxB[i, j])
        nearest_B = similarity_RxB.argmax(axis=0)
        nearest = similarity_RxB[nearest_B, np.arange(len(b))]
        of_B = np.where(nearest > best_B, nearest_B + first, of_B)
        best_B = np.maximum(best_B, nearest)
    found |= {(int(i), j): float(best_B[j]) for j, i in enumerate(of_B)}
    rounded = {pair: round(similarity, 6) for pair, similarity in found.items()}  # as float32 has it
    return {pair: similarity for pair, similarity in rounded.items() if similarity >= threshold}


def _grams(text: str) -> np.ndarray:
    """The set of a text's trigrams, uint64; a space on either side gives short texts one too."""
    codes = np.frombuffer(f" {text} ".encode("utf-32-le"), np.uint32).astype(np.uint64)
    if len(codes) < _GRAM:
        codes = np.pad(codes, (0, _GRAM - len(codes)))
    grams = codes[:-2] << np.uint64(42) | codes[1:-1] << np.uint64(21) | codes[2:]
    return np.unique(grams)

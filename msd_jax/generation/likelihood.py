"""Log-likelihoods of continuations given contexts, on the mesh, for multiple choice and perplexity.

Axis letters beside the project's: C continuation tokens, W those whose logits are held at a time, M candidates for the
token behind a row.
"""

import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from msd_jax.io.console import progress
from msd_jax.models import decoder, forward, pretrained
from msd_jax.parallel import padding, sharding

Pair = tuple[Sequence[int], Sequence[int]]

_WIDTH = 8  # W
_CANDIDATES = 8  # M


class Score(NamedTuple):
    """The score of one continuation.

    Attributes:
      log_likelihood: sum of its tokens' log-probabilities, in nats.
      greedy: whether each of its tokens is the most probable one, so that greedy decoding writes it.
    """

    log_likelihood: float
    greedy: bool


class TokenScores(NamedTuple):
    """Scores of a batch of rows: of the continuation's tokens inside each row, and of the token behind it.

    Attributes:
      log_prob_BxC: float32, of each continuation token; arbitrary beyond a row's continuation.
      top_BxC: bool, whether that token is the most probable one.
      last_log_prob_BxM: float32, of each candidate for the token behind the row.
      last_top_B: int32, the most probable token there.
    """

    log_prob_BxC: jax.Array
    top_BxC: jax.Array
    last_log_prob_BxM: jax.Array
    last_top_B: jax.Array


def token_scores(
    graphdef: nnx.GraphDef,
    params: decoder.Params,
    tokens_BxT: jax.Array,
    length_B: jax.Array,
    first_B: jax.Array,
    last_BxM: jax.Array,
) -> TokenScores:
    """Scores the tokens from column `first` on, and M candidates for the token behind each row.

    Logits are computed for continuations alone, and those of W tokens per row are held at a time.

    Args:
      graphdef, params: of a models.decoder.Decoder.
      tokens_BxT: int32 ids, RIGHT-padded.
      length_B: int32 numbers of real tokens, at least 1.
      first_B: int32, column of the first continuation token, from 1 to the length; the length where only the token
        behind the row is asked for.
      last_BxM: int32 ids of the candidates.
    """
    model = nnx.merge(graphdef, params)
    B, T = tokens_BxT.shape
    position_BxT = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden_BxTxD = model(tokens_BxT, position_BxT, forward.response_mask(length_B, T))

    def log_probs(column_BxW: jax.Array) -> jax.Array:
        """float32 [B, W, V], of the tokens in these columns, each of which the column before it predicts."""
        hidden_BxWxD = jnp.take_along_axis(hidden_BxTxD, column_BxW[..., None] - 1, axis=1)
        return jax.nn.log_softmax(model.logits(hidden_BxWxD))

    def chunk(c: jax.Array, scores: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        column_BxW = jnp.minimum(first_B[:, None] + c * _WIDTH + jnp.arange(_WIDTH), T - 1)
        token_BxW = jnp.take_along_axis(tokens_BxT, column_BxW, axis=1)
        log_prob_BxWxV = log_probs(column_BxW)
        log_prob_BxW = jnp.take_along_axis(log_prob_BxWxV, token_BxW[..., None], axis=-1)[..., 0]
        top_BxW = jnp.argmax(log_prob_BxWxV, axis=-1) == token_BxW
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=c * _WIDTH, axis=1)
        return update(scores[0], log_prob_BxW), update(scores[1], top_BxW)

    chunks = -(-T // _WIDTH)  # room for any continuation; as many are computed as the longest one needs
    empty = jnp.zeros((B, chunks * _WIDTH)), jnp.zeros((B, chunks * _WIDTH), bool)
    needed = -(-jnp.max(length_B - first_B) // _WIDTH)
    log_prob_BxC, top_BxC = jax.lax.fori_loop(0, needed, chunk, empty)
    last_log_prob_BxV = log_probs(length_B[:, None])[:, 0]
    return TokenScores(
        log_prob_BxC,
        top_BxC,
        jnp.take_along_axis(last_log_prob_BxV, last_BxM, axis=-1),
        jnp.argmax(last_log_prob_BxV, axis=-1).astype(jnp.int32),
    )


class Scorer:
    """`token_scores`, jitted and sharded for one model, over any number of pairs.

    Continuations that differ in their last token alone, such as the letters of a multiple choice, share a forward pass.
    Batches are sorted by length, so that there is little padding.

    Args:
      model: whose weights are given with each call.
      mesh: from sharding.make_mesh.
      batch_size: rows at a time, rounded up to what the mesh divides.
      limit: the most tokens of a context and its continuation together.

    Attributes:
      compilations: how often it was compiled: once for each length that rows are padded to.
    """

    def __init__(self, model: pretrained.Pretrained, mesh: Mesh, batch_size: int, limit: int):
        self._mesh, self._pad_id, self._limit = mesh, model.pad_id, limit
        self._rows, self.compilations = sharding.batch_rows(mesh, batch_size), 0

        def likelihood(params: decoder.Params, *rows: jax.Array) -> TokenScores:
            self.compilations += 1  # only while tracing
            return token_scores(model.graphdef, params, *rows)

        self._run = jax.jit(likelihood, out_shardings=sharding.batch_sharding(mesh))

    def __call__(self, params: decoder.Params, pairs: Sequence[Pair], what: str = "scoring") -> list[Score]:
        """A Score for each (context ids, continuation ids), in their order.

        Every process of a run calls this with the same pairs, and each gets all scores.

        Raises:
          ValueError: a context or a continuation is empty, or both together are longer than the limit.
        """
        self._check(pairs)
        # The model reads all tokens but the last; pairs that agree in those share a row.
        groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        for index, (context, continuation) in enumerate(pairs):
            groups[(*context, *continuation[:-1])].append(index)
        rows = [
            (ids, indices[first : first + _CANDIDATES])
            for ids, indices in groups.items()
            for first in range(0, len(indices), _CANDIDATES)
        ]
        rows.sort(key=lambda row: len(row[0]))
        scores: dict[int, Score] = {}
        with progress(what, len(rows)) as advance:
            for first in range(0, len(rows), self._rows):
                batch = rows[first : first + self._rows]
                scores |= self._score(params, batch, pairs)
                advance(first + len(batch), "")
        return [scores[index] for index in range(len(pairs))]

    def _check(self, pairs: Sequence[Pair]) -> None:
        if not all(len(part) for pair in pairs for part in pair):
            raise ValueError("a context and a continuation need at least one token each")
        longest = max((len(context) + len(continuation) for context, continuation in pairs), default=0)
        if longest > self._limit:
            count = sum(len(context) + len(continuation) > self._limit for context, continuation in pairs)
            raise ValueError(
                f"{count} of {len(pairs)} contexts with their continuation are longer than {self._limit} tokens "
                f"(the longest: {longest})"
            )

    def _score(
        self, params: decoder.Params, batch: list[tuple[tuple[int, ...], list[int]]], pairs: Sequence[Pair]
    ) -> dict[int, Score]:
        B, T = self._rows, padding.bucket(max(len(ids) for ids, _ in batch), self._limit)
        tokens_BxT = np.full((B, T), self._pad_id, np.int32)
        length_B, first_B = np.ones(B, np.int32), np.ones(B, np.int32)  # as they stay in rows that fill up a batch
        last_BxM = np.zeros((B, _CANDIDATES), np.int32)
        for row, (ids, indices) in enumerate(batch):
            tokens_BxT[row, : len(ids)] = ids
            length_B[row] = len(ids)
            first_B[row] = min(len(pairs[index][0]) for index in indices)
            last_BxM[row, : len(indices)] = [pairs[index][1][-1] for index in indices]
        arrays = sharding.put_batch(self._mesh, (tokens_BxT, length_B, first_B, last_BxM))
        found = sharding.fetch(self._run(params, *arrays))
        scores = {}
        for row, (ids, indices) in enumerate(batch):
            for m, index in enumerate(indices):
                inside = slice(len(pairs[index][0]) - first_B[row], len(ids) - first_B[row])
                # In float64: the tokens of a page add up to thousands of nats.
                total = found.log_prob_BxC[row, inside].sum(dtype=np.float64) + found.last_log_prob_BxM[row, m]
                greedy = found.top_BxC[row, inside].all() and found.last_top_B[row] == last_BxM[row, m]
                scores[index] = Score(float(total), bool(greedy))
        return scores

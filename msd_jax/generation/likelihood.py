"""Log-likelihoods of continuations given contexts, on the mesh: what multiple choice and perplexity are made of."""

import collections
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

_COLUMNS = 8  # of a row's continuation whose logits are held at a time
_LAST = 8  # last tokens that one row of the batch can score


class Score(NamedTuple):
    """Of one continuation.

    Attributes:
      log_likelihood: the sum of its tokens' log-probabilities, in nats.
      greedy: whether each of its tokens is the most probable one, so that greedy decoding writes it.
    """

    log_likelihood: float
    greedy: bool


class TokenScores(NamedTuple):
    """Of a batch of rows: the continuation's tokens inside the row, and the token behind it.

    Attributes:
      log_prob_BxC: float32; column c is of the c-th continuation token; beyond a row's continuation it is arbitrary.
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
    """Scores of the tokens from column `first` on and of M candidates for the one behind the row.

    Logits are computed where a continuation is, and those of _COLUMNS tokens a row are held at a time.

    Args:
      graphdef, params: of a models.decoder.Decoder.
      tokens_BxT: int32 ids, RIGHT-padded.
      length_B: int32, real tokens, at least 1.
      first_B: int32, column of the first continuation token, from 1 to the length; the length where only the token
        behind the row is asked for.
      last_BxM: int32 ids.
    """
    model = nnx.merge(graphdef, params)
    B, T = tokens_BxT.shape
    position_BxT = jnp.broadcast_to(jnp.arange(T), (B, T))
    hidden_BxTxD, _ = model(tokens_BxT, position_BxT, forward.response_mask(length_B, T))

    def log_probs(column_BxK: jax.Array) -> jax.Array:
        """float32 [B, K, V], of the tokens in these columns: each is predicted by the column before it."""
        hidden_BxKxD = jnp.take_along_axis(hidden_BxTxD, column_BxK[..., None] - 1, axis=1)
        return jax.nn.log_softmax(model.logits(hidden_BxKxD))

    def chunk(c: jax.Array, scores: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        column_BxK = jnp.minimum(first_B[:, None] + c * _COLUMNS + jnp.arange(_COLUMNS), T - 1)
        token_BxK = jnp.take_along_axis(tokens_BxT, column_BxK, axis=1)
        log_prob_BxKxV = log_probs(column_BxK)
        log_prob_BxK = jnp.take_along_axis(log_prob_BxKxV, token_BxK[..., None], axis=-1)[..., 0]
        found = log_prob_BxK, jnp.argmax(log_prob_BxKxV, axis=-1) == token_BxK
        return tuple(jax.lax.dynamic_update_slice_in_dim(*pair, c * _COLUMNS, axis=1) for pair in zip(scores, found))

    chunks = -(-T // _COLUMNS)  # room for all; computed are as many as the longest continuation has
    empty = jnp.zeros((B, chunks * _COLUMNS)), jnp.zeros((B, chunks * _COLUMNS), bool)
    needed = -(-jnp.max(length_B - first_B) // _COLUMNS)
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

    Continuations that differ in their last token alone, as the letters of a multiple choice do, share a forward pass.
    Batches are sorted by length, so that little is padding.

    Attributes:
      compilations: how often it was compiled: once for each length that rows are padded to.
    """

    def __init__(self, model: pretrained.Pretrained, mesh: Mesh, batch_size: int, limit: int):
        """`limit`: the most tokens of a context and its continuation together; `batch_size`: rows at a time."""
        self._mesh, self._pad_id, self._limit = mesh, model.pad_id, limit
        self._rows, self.compilations = sharding.batch_rows(mesh, batch_size), 0

        def run(params, tokens_BxT, length_B, first_B, last_BxM):
            self.compilations += 1  # runs while tracing
            return token_scores(model.graphdef, params, tokens_BxT, length_B, first_B, last_BxM)

        self._run = jax.jit(run, out_shardings=sharding.batch_sharding(mesh))

    def __call__(self, params: decoder.Params, pairs: Sequence[Pair], what: str = "scoring") -> list[Score]:
        """A Score for each (context ids, continuation ids), in their order.

        Every process of a run calls this with the same pairs, and each gets all scores.

        Raises:
          ValueError: a context or a continuation is empty, or both together are longer than the limit.
        """
        self._check(pairs)
        # What the model reads is all but the last token; by it, pairs that a row can answer.
        groups: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        for index, (context, continuation) in enumerate(pairs):
            groups[(*context, *continuation[:-1])].append(index)
        rows = [
            (ids, indices[first : first + _LAST])
            for ids, indices in groups.items()
            for first in range(0, len(indices), _LAST)
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
            raise ValueError("a context and a continuation have at least one token each")
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
        length_B, first_B = np.ones(B, np.int32), np.ones(B, np.int32)  # of the rows that fill up the last batch
        last_BxM = np.zeros((B, _LAST), np.int32)
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
                # In float64: a page of text adds up thousands of nats.
                total = found.log_prob_BxC[row, inside].sum(dtype=np.float64) + found.last_log_prob_BxM[row, m]
                greedy = found.top_BxC[row, inside].all() and found.last_top_B[row] == last_BxM[row, m]
                scores[index] = Score(float(total), bool(greedy))
        return scores

"""The forward pass over a prompt and a response: for the student's prompt and for the teacher's, the same program.

Training packs sequences into rows, see `PackedRows`. Elsewhere a row is one sequence, [prompt, LEFT-padded to P]
[response, RIGHT-padded to R], so that the response begins in the same column in every row and its t-th token is
predicted by the hidden state of column P + t - 1. Positions count real tokens only, and masks come from lengths, never
from a token id.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from msd_jax.models import decoder


def response_mask(length_B: jax.Array, R: int) -> jax.Array:
    """bool [B, R], true at response tokens."""
    return jnp.arange(R) < length_B[:, None]


def prompt_layout(length_B: jax.Array, P: int) -> tuple[jax.Array, jax.Array]:
    """Positions int32 [B, P] and validity bool [B, P] of left-padded prompts."""
    column = jnp.arange(P) - (P - length_B[:, None])
    return jnp.maximum(column, 0), column >= 0


def response_hidden(
    graphdef: nnx.GraphDef,
    params: decoder.Params,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    response_BxR: jax.Array,
    response_length_B: jax.Array,
) -> jax.Array:
    """Hidden states [B, R, D] that predict the response tokens: column t sees the prompt and tokens before t.

    Args:
      graphdef, params: of a models.decoder.Decoder.
      prompt_BxP, response_BxR: int32 token ids; those at padding may be anything.
      prompt_length_B, response_length_B: int32 numbers of real tokens; prompts have at least one.
    """
    P, R = prompt_BxP.shape[1], response_BxR.shape[1]
    position_BxP, valid_BxP = prompt_layout(prompt_length_B, P)
    tokens_BxT = jnp.concatenate([prompt_BxP, response_BxR], axis=1)
    position_BxT = jnp.concatenate([position_BxP, prompt_length_B[:, None] + jnp.arange(R)], axis=1)
    valid_BxT = jnp.concatenate([valid_BxP, response_mask(response_length_B, R)], axis=1)
    hidden_BxTxD = nnx.merge(graphdef, params)(tokens_BxT, position_BxT, valid_BxT)
    return hidden_BxTxD[:, P - 1 : P + R - 1]


def response_logits(graphdef: nnx.GraphDef, params: decoder.Params, *sequence: jax.Array) -> jax.Array:
    """logits_BxRxV, float32, of the response tokens; `sequence` is as in response_hidden."""
    return nnx.merge(graphdef, params).logits(response_hidden(graphdef, params, *sequence))


class PackedRows(NamedTuple):
    """Sequences packed one after the other into rows of T tokens, and where the response tokens are predicted.

    Rows are split over devices in S equal parts, each of which predicts up to N response tokens, from its own rows.

    Attributes:
      token_BxT: int32 token ids; at padding anything.
      position_BxT: int32, of each token in its sequence.
      segment_BxT: int32, positive, for each sequence of a row another, and for a beginning that several share, see
        attention.self_attention; 0 at padding.
      predicts_SxN: int32, for each response token of a part the place, row by row in that part, whose hidden state
        predicts it; where a part has fewer than N, any place.
    """

    token_BxT: Any
    position_BxT: Any
    segment_BxT: Any
    predicts_SxN: Any


def packed_hidden_and_head(
    graphdef: nnx.GraphDef, params: decoder.Params, rows: PackedRows
) -> tuple[jax.Array, jax.Array]:
    """(hidden [S N, D], head_DxV), whose product is the logits of the response tokens, part by part.

    Logits are not capped, see `config.logit_softcap`.
    """
    model = nnx.merge(graphdef, params)
    hidden_BxTxD = model(rows.token_BxT, rows.position_BxT, rows.segment_BxT)
    S, D = len(rows.predicts_SxN), hidden_BxTxD.shape[-1]
    # A gather for each part, so that every device reads its own rows.
    hidden_SxNxD = jax.vmap(lambda hidden, place: hidden[place])(hidden_BxTxD.reshape(S, -1, D), rows.predicts_SxN)
    return model.constrain(hidden_SxNxD).reshape(-1, D), model.head_DxV

"""The forward pass over a prompt and a response: for the student's prompt and for the teacher's, the same program.

A sequence is [prompt, LEFT-padded to P][response, RIGHT-padded to R], so that the response begins in the same column
in every row and its t-th token is predicted by the hidden state of column P + t - 1. Positions count real tokens
only, and masks come from lengths, never from a token id.
"""

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


def response_hidden_and_head(
    graphdef: nnx.GraphDef, params: decoder.Params, *sequence: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(hidden_NxD, head_DxV), whose product is the logits of the N = B R response tokens, row by row.

    Logits are not capped, see `config.logit_softcap`; `sequence` is as in response_hidden.
    """
    hidden_BxRxD = response_hidden(graphdef, params, *sequence)
    return hidden_BxRxD.reshape(-1, hidden_BxRxD.shape[-1]), nnx.merge(graphdef, params).head_DxV


def response_logits(graphdef: nnx.GraphDef, params: decoder.Params, *sequence: jax.Array) -> jax.Array:
    """logits_BxRxV, float32, of the response tokens; `sequence` is as in response_hidden."""
    return nnx.merge(graphdef, params).logits(response_hidden(graphdef, params, *sequence))

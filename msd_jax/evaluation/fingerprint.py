"""What a response depends on, in a few characters: one of the same fingerprint need not be generated again."""

import hashlib
import json
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from msd_jax.evaluation.encoding import EncodedPrompt
from msd_jax.evaluation.respondents import TEMPERATURES
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding


def of_responses(
    prompts: Iterable[EncodedPrompt],
    config: ml_collections.ConfigDict,
    model: pretrained.Pretrained,
    params: decoder.Params,
) -> str:
    """The fingerprint of the weights, of how tokens are drawn, and of all prompts of an evaluation."""
    asked = sorted((*prompt.key, prompt.ids.tolist()) for prompt in prompts)
    drawn = [TEMPERATURES, config.seed, config.eval.max_new_tokens, model.stop_ids, str(model.dtype)]
    return hashlib.sha256(json.dumps([asked, drawn, weights_checksum(params)]).encode()).hexdigest()[:16]


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = [jax.lax.bitcast_convert_type(leaf, unsigned[leaf.dtype.itemsize]) for leaf in leaves]
    return jnp.stack([jnp.sum(leaf, dtype=jnp.uint32) for leaf in bits])


def weights_checksum(params: decoder.Params) -> list[int]:
    """The sum of each tensor's bits modulo 2^32: exact, so that no mesh and no order of summation changes it."""
    return np.asarray(sharding.fetch(_checksums(jax.tree.leaves(params)))).tolist()

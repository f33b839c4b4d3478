"""How probable the student finds the token that the teacher begins with: where it is not, reverse KL stands still."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from msd_jax.io.console import progress
from msd_jax.models import decoder, forward, pretrained
from msd_jax.parallel import padding, sharding


def teacher_token_probability(
    graphdef: nnx.GraphDef,
    params: decoder.Params,
    student_prompt_BxP: jax.Array,
    student_length_B: jax.Array,
    teacher_prompt_BxP: jax.Array,
    teacher_length_B: jax.Array,
) -> jax.Array:
    """float32 [B]: p_S(v) of each reply's first token, v being the teacher's most probable one.

    Args:
      graphdef, params: of a models.decoder.Decoder, which is both.
      student_prompt_BxP, teacher_prompt_BxP: int32 ids, LEFT-padded.
      student_length_B, teacher_length_B: int32 numbers of real tokens.
    """

    def first_logits(prompt_BxP: jax.Array, length_B: jax.Array) -> jax.Array:
        anything_Bx1 = jnp.zeros((len(length_B), 1), jnp.int32)  # the reply, whose first token is only predicted
        return forward.response_logits(graphdef, params, prompt_BxP, length_B, anything_Bx1, length_B * 0 + 1)[:, 0]

    student_BxV = first_logits(student_prompt_BxP, student_length_B)
    token_B = jnp.argmax(first_logits(teacher_prompt_BxP, teacher_length_B), axis=-1)
    return jnp.take_along_axis(jax.nn.softmax(student_BxV), token_B[:, None], axis=-1)[:, 0]


def probabilities(
    model: pretrained.Pretrained,
    mesh: Mesh,
    params: decoder.Params,
    prompts: Sequence[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
) -> list[float]:
    """`teacher_token_probability` of pairs of prompts of any length.

    Args:
      model: whose weights `params` are, in the rollout layout.
      mesh: that they lie on.
      prompts: ids of the student's and of the teacher's.
      batch_size: rows at a time, rounded up to what the mesh divides.
    """
    if not prompts:
        return []
    rows = sharding.batch_rows(mesh, batch_size)
    limits = [max(len(pair[role]) for pair in prompts) for role in (0, 1)]
    run = jax.jit(
        functools.partial(teacher_token_probability, model.graphdef), out_shardings=sharding.batch_sharding(mesh)
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index][1]))
    found = np.zeros(len(prompts))
    with progress("first tokens", len(prompts)) as advance:
        for first in range(0, len(order), rows):
            batch = order[first : first + rows]
            filled = batch + batch[:1] * (rows - len(batch))
            padded = [
                padding.left_pad([prompts[index][role] for index in filled], limits[role], model.pad_id)
                for role in (0, 1)
            ]
            arrays = sharding.put_batch(mesh, tuple(array for pair in padded for array in pair))
            found[batch] = sharding.fetch(run(params, *arrays))[: len(batch)]
            advance(first + len(batch), "")
    return found.tolist()

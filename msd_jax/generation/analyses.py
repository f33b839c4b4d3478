"""What the teacher writes about each query before it replies, with config.prompts.cot = "generated": once."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from jax.sharding import Mesh

from msd_jax.data import prompts
from msd_jax.data.records import Query
from msd_jax.generation import refill, responses, rollout
from msd_jax.io.console import progress
from msd_jax.models import decoder, pretrained, reasoning
from msd_jax.models.tokenizer import token_ids


def write(
    records: Sequence[Query],
    config: ml_collections.ConfigDict,
    model: pretrained.Pretrained,
    mesh: Mesh,
    params: Callable[[], decoder.Params],
    store: responses.Store,
) -> dict[str, str]:
    """The analysis of each query, by its id: greedy, from the source language alone, the same for all target languages.

    Args:
      records: the queries.
      config: the whole config.
      model, mesh: what writes, and where.
      params: gives the frozen teacher's weights in the rollout layout; not called where everything is stored.
      store: what was written before with the same teacher and prompts; what is missing is added, batch by batch.
    """
    source, limit = config.data.source_language, config.prompts.teacher_limit
    prompt_ids = {}
    for record in records:
        messages = prompts.analysis_messages(record, config.prompts, source)
        ids = token_ids(model.tokenizer, messages, prompts.analysis_variables(config.prompts))
        model.require_embedded(ids, f"query {record.id!r} in {source}")
        if len(ids) <= limit:  # of a longer one the teacher's prompt is longer still, and the query dropped with it
            prompt_ids[record.id, source] = ids
    missing = sorted((key for key in prompt_ids if key not in store), key=lambda key: len(prompt_ids[key]))
    if missing:
        _generate(missing, prompt_ids, config, model, mesh, params(), store)
    read = _thoughts if config.prompts.analysis_is_thinking else _reply
    return {key[0]: read(model.tokenizer, store[key][0]) for key in prompt_ids}


def _reply(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _thoughts(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text inside the tags of reasoning, which are special tokens to some tokenizers."""
    added, tags = tokenizer.added_tokens_decoder, set(itertools.chain(*reasoning.TAGS))
    kept = [int(i) for i in tokens if int(i) not in added or not added[int(i)].special or added[int(i)].content in tags]
    return reasoning.thoughts(tokenizer.decode(kept))


def _generate(
    missing: Sequence[responses.Key],
    prompt_ids: Mapping[responses.Key, np.ndarray],
    config: ml_collections.ConfigDict,
    model: pretrained.Pretrained,
    mesh: Mesh,
    params: decoder.Params,
    store: responses.Store,
) -> None:
    """Writes those that are `missing`, the shortest prompts first, and stores them."""
    greedy = rollout.Sampling(config.prompts.analysis_tokens, temperature=0.0)
    options = {"rows": config.data.batch_size, "limit": config.prompts.teacher_limit}
    stop_ids = model.stop_ids
    if config.prompts.analysis_is_thinking:  # what follows the thoughts is not read
        closing = {tag for _, tag in reasoning.TAGS}
        stop_ids += tuple(i for i, token in model.tokenizer.added_tokens_decoder.items() if token.content in closing)
    pool = refill.PoolGenerator(model.graphdef, mesh, greedy, stop_ids, model.pad_id, **options)
    ended = pool(params, [prompt_ids[key] for key in missing])
    with progress("analysing", len(missing)) as advance:
        for count, response in enumerate(ended, 1):
            store.add({missing[response.index]: (response.tokens, response.stopped)})
            advance(count, "")

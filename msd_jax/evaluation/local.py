"""A model on this mesh, as an evaluation asks it: it generates, or, of multiple choice, scores."""

from collections.abc import Iterator, Sequence

import jax
import ml_collections
from jax.sharding import Mesh

from msd_jax.data import batches
from msd_jax.evaluation import fingerprint, multiple_choice
from msd_jax.evaluation.encoding import EncodedPrompt
from msd_jax.evaluation.judges import text as texts
from msd_jax.evaluation.records import Pass
from msd_jax.evaluation.respondents import TEMPERATURES, Reply
from msd_jax.generation import refill, rollout
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding


class LocalModel:
    """Answers with whatever weights it is given, in the rollout layout."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: pretrained.Pretrained,
        mesh: Mesh,
        prompts: Sequence[EncodedPrompt],
        limit: int,
    ):
        """`prompts`: all that may be asked; `limit`: the most tokens of one."""
        self._config, self._model = config, model
        self.kept_together = sharding.batch_rows(mesh, config.eval.batch_size)
        self._key = jax.random.key(config.seed)
        added = model.tokenizer.added_tokens_decoder.items()
        self._dropped = {i for i, x in added if x.special and not texts.marks_reasoning(x.content)}
        self._chooser = None
        if any(prompt.benchmark.choices for prompt in prompts):
            self._chooser = multiple_choice.Chooser(model, mesh, config.eval.batch_size, limit)
        self._generators = {
            Pass(name): refill.PoolGenerator(
                model.graphdef,
                mesh,
                rollout.Sampling(config.eval.max_new_tokens, TEMPERATURES[Pass(name)]),
                model.stop_ids,
                model.pad_id,
                rows=config.eval.batch_size,
                limit=limit,
            )
            for name in config.eval.passes
        }

    def fingerprint(self, weights: decoder.Params, prompts: Sequence[EncodedPrompt]) -> str:
        return fingerprint.of_responses(prompts, self._config, self._model, weights)

    def generate(self, name: Pass, weights: decoder.Params, prompts: Sequence[EncodedPrompt]) -> Iterator[Reply]:
        order = _by_length(prompts)
        hashes = [batches.query_hash(prompts[i].query.id, prompts[i].language) for i in order]
        for response in self._generators[name](weights, [prompts[i].ids for i in order], hashes, self._key):
            index = order[response.index]
            text = prompts[index].opens + self._decode(response.tokens)
            yield Reply(index, text, len(response.tokens), response.stopped)

    def choose(
        self, weights: decoder.Params, prompts: Sequence[EncodedPrompt]
    ) -> Iterator[tuple[int, multiple_choice.Choice]]:
        assert self._chooser is not None
        order = _by_length(prompts)
        for first in range(0, len(order), self.kept_together):
            batch = order[first : first + self.kept_together]
            yield from zip(batch, self._chooser(weights, [prompts[i].ids for i in batch]))

    def spent(self) -> None:
        return None

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text without special tokens, but with those that mark reasoning, which are special to some tokenizers."""
        return self._model.tokenizer.decode([token for token in tokens if token not in self._dropped])


def _by_length(prompts: Sequence[EncodedPrompt]) -> list[int]:
    """Indices, the shortest prompt first, so that little is padding."""
    return sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))

"""Prompts -> records of their responses: generated, or, of multiple choice, scored."""

import time
from collections.abc import Iterator, Sequence

import jax
import ml_collections
from jax.sharding import Mesh

from msd_jax.data import batches
from msd_jax.evaluation import language_id, multiple_choice
from msd_jax.evaluation.encoding import EncodedPrompt
from msd_jax.evaluation.judges import text as texts
from msd_jax.evaluation.records import Pass, RecordLog, ResponseRecord
from msd_jax.generation import refill, rollout
from msd_jax.io.console import progress
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding

TEMPERATURES = {Pass.GREEDY: 0.0, Pass.SAMPLED: 1.0}


class Answerer:
    """Answers prompts with whatever weights it is given.

    Attributes:
      passes: those of config.eval.passes, then that of multiple choice.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: pretrained.Pretrained,
        mesh: Mesh,
        prompts: Sequence[EncodedPrompt],
        limit: int,
    ):
        """`prompts`: all that may be asked; `limit`: the most tokens of one."""
        self._tokenizer = model.tokenizer
        self._rows = sharding.batch_rows(mesh, config.eval.batch_size)
        self._key = jax.random.key(config.seed)
        added = model.tokenizer.added_tokens_decoder.items()
        self._dropped = {i for i, x in added if x.special and not texts.marks_reasoning(x.content)}
        self._chooser = None
        if any(prompt.benchmark.choices for prompt in prompts):
            self._chooser = multiple_choice.Chooser(model, mesh, config.eval.batch_size, limit)
        # What a reply may be in: the language of any prompt, one that the model is safe in, or English.
        sources = {"en", config.data.source_language, *config.eval.source_languages}
        self._identifier = language_id.LanguageIdentifier(sources | {prompt.language for prompt in prompts})
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
        self.passes = (*self._generators, Pass.LIKELIHOOD)

    def answer(
        self,
        name: Pass,
        params: decoder.Params,
        prompts: Sequence[EncodedPrompt],
        settings: str,
        log: RecordLog | None = None,
    ) -> list[ResponseRecord]:
        """One record for each prompt that this pass answers, not judged yet, in the order of the prompts.

        Args:
          name: the pass; multiple-choice prompts are answered in Pass.LIKELIHOOD alone, and others in the others.
          params: the weights, in the rollout layout.
          prompts: what to answer.
          settings: the fingerprint of these weights and prompts.
          log: responses of the same fingerprint are taken from there, and new ones are added, a batch's number at a
            time; without it nothing is shown.
        """
        prompts = [prompt for prompt in prompts if prompt.benchmark.choices == (name == Pass.LIKELIHOOD)]
        done = {
            record.prompt_key: record
            for record in (log.read() if log else [])
            if (record.pass_name, record.settings) == (name, settings)
        }
        # Sorted by length, so that little is padding.
        left = sorted((prompt for prompt in prompts if prompt.key not in done), key=lambda prompt: len(prompt.ids))
        if not prompts:
            return []
        respond = self._choose if name == Pass.LIKELIHOOD else self._generate
        tokens, start, taken = 0, time.perf_counter(), len(prompts) - len(left)
        with progress(f"evaluating ({name})", len(prompts), taken, shown=log is not None) as advance:
            for records in respond(name, params, left, settings):
                if log:
                    log.append(records)
                done |= {record.prompt_key: record for record in records}
                taken, tokens = taken + len(records), tokens + sum(record.tokens for record in records)
                rate = tokens / (time.perf_counter() - start)
                advance(taken, f"{rate:,.0f} tokens/s")
        return [done[prompt.key] for prompt in prompts]

    def _generate(
        self, name: Pass, params: decoder.Params, prompts: Sequence[EncodedPrompt], settings: str
    ) -> Iterator[list[ResponseRecord]]:
        hashes = [batches.query_hash(prompt.query.id, prompt.language) for prompt in prompts]
        responses = self._generators[name](params, [prompt.ids for prompt in prompts], hashes, self._key)
        records = []
        for response in responses:
            records.append(self._generated(name, settings, prompts[response.index], response))
            if len(records) == self._rows:
                yield records
                records = []
        if records:
            yield records

    def _generated(self, name: Pass, settings: str, prompt: EncodedPrompt, response: refill.Response) -> ResponseRecord:
        text = prompt.opens + self._decode(response.tokens)
        reply = texts.reply(text)
        return _record(
            prompt,
            name,
            settings,
            response=text,
            tokens=len(response.tokens),
            stopped=response.stopped,
            exact_match=_exact_match(prompt, reply or ""),
            language_match=None if reply is None else self._identifier.matches(reply, prompt.language),
            unfinished_reasoning=reply is None if texts.reasons(text) else None,
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text without special tokens, but with those that mark reasoning, which are special to some tokenizers."""
        return self._tokenizer.decode([token for token in tokens if token not in self._dropped])

    def _choose(
        self, name: Pass, params: decoder.Params, prompts: Sequence[EncodedPrompt], settings: str
    ) -> Iterator[list[ResponseRecord]]:
        assert self._chooser is not None
        for first in range(0, len(prompts), self._rows):
            batch = prompts[first : first + self._rows]
            choices = self._chooser(params, [prompt.ids for prompt in batch])
            yield [
                _record(
                    prompt,
                    name,
                    settings,
                    response=choice.letter,
                    correct=choice.letter == prompt.query.answers[prompt.language],
                    log_likelihoods=tuple(round(value, 6) for value in choice.log_likelihoods),
                )
                for prompt, choice in zip(batch, choices)
            ]


def _record(prompt: EncodedPrompt, name: Pass, settings: str, **measured) -> ResponseRecord:
    return ResponseRecord(
        benchmark=prompt.benchmark.name,
        pass_name=name,
        id=prompt.query.id,
        language=prompt.language,
        harmful=prompt.query.harmful,
        category=prompt.query.category,
        prompt=prompt.query.texts[prompt.language],
        settings=settings,
        **measured,
    )


def _exact_match(prompt: EncodedPrompt, text: str) -> bool | None:
    """Whether the response gives the reference answer; None without one."""
    answer = prompt.query.answers.get(prompt.language)
    return None if answer is None else prompt.benchmark.correct(text, answer, prompt.language)

"""Prompts -> records of their responses, with all that is measured on them but the verdict."""

import contextlib
import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Generic

import ml_collections

from msd_jax.evaluation import language_id
from msd_jax.evaluation.encoding import Prompt
from msd_jax.evaluation.judges import text as texts
from msd_jax.evaluation.records import Pass, RecordLog, ResponseRecord
from msd_jax.evaluation.respondents import Asked, Reply, Respondent
from msd_jax.io.console import progress


class Answerer(Generic[Asked]):
    """Has prompts answered.

    Attributes:
      passes: those of config.eval.passes, then that of multiple choice.
    """

    def __init__(self, config: ml_collections.ConfigDict, respondent: Respondent[Asked], prompts: Sequence[Asked]):
        """`prompts`: all that may be asked."""
        self._respondent = respondent
        self.passes = (*map(Pass, config.eval.passes), Pass.LIKELIHOOD)
        # What a reply may be in: the language of any prompt, one that the model is safe in, or English.
        sources = {"en", config.data.source_language, *config.eval.source_languages}
        self._identifier = language_id.LanguageIdentifier(sources | {prompt.language for prompt in prompts})

    def answer(
        self, name: Pass, weights: Any, prompts: Sequence[Asked], settings: str, log: RecordLog | None = None
    ) -> list[ResponseRecord]:
        """One record for each prompt that this pass answers, not judged yet, in the order of the prompts.

        Args:
          name: the pass; multiple-choice prompts are answered in Pass.LIKELIHOOD alone, and others in the others.
          weights: as the respondent takes them.
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
        left = [prompt for prompt in prompts if prompt.key not in done]
        if not prompts:
            return []
        respond = self._choose if name == Pass.LIKELIHOOD else self._generate
        tokens, start, taken = 0, time.perf_counter(), len(prompts) - len(left)
        with (
            progress(f"evaluating ({name})", len(prompts), taken, shown=log is not None) as advance,
            contextlib.closing(respond(name, weights, left, settings)) as answered,  # an interruption ends requests
        ):
            for records in answered:
                if log:
                    log.append(records)
                done |= {record.prompt_key: record for record in records}
                taken, tokens = taken + len(records), tokens + sum(record.tokens for record in records)
                rate = tokens / (time.perf_counter() - start)
                advance(taken, f"{rate:,.0f} tokens/s")
        return [done[prompt.key] for prompt in prompts if prompt.key in done]

    def _generate(
        self, name: Pass, weights: Any, prompts: Sequence[Asked], settings: str
    ) -> Generator[list[ResponseRecord], None, None]:
        replies = self._respondent.generate(name, weights, prompts)
        yield from self._together(self._generated(name, settings, prompts[reply.index], reply) for reply in replies)

    def _generated(self, name: Pass, settings: str, prompt: Asked, reply: Reply) -> ResponseRecord:
        said = texts.reply(reply.text)
        return _record(
            prompt,
            name,
            settings,
            response=reply.text,
            tokens=reply.tokens,
            stopped=reply.stopped,
            exact_match=_exact_match(prompt, said or ""),
            language_match=None if said is None else self._identifier.matches(said, prompt.language),
            unfinished_reasoning=said is None if texts.reasons(reply.text) else None,
        )

    def _choose(
        self, name: Pass, weights: Any, prompts: Sequence[Asked], settings: str
    ) -> Generator[list[ResponseRecord], None, None]:
        yield from self._together(
            _record(
                prompts[index],
                name,
                settings,
                response=choice.letter,
                correct=choice.letter == prompts[index].query.answers[prompts[index].language],
                log_likelihoods=tuple(round(value, 6) for value in choice.log_likelihoods),
            )
            for index, choice in self._respondent.choose(weights, prompts)
        )

    def _together(self, records: Iterator[ResponseRecord]) -> Iterator[list[ResponseRecord]]:
        while batch := list(itertools.islice(records, self._respondent.kept_together)):
            yield batch


def _record(prompt: Prompt, name: Pass, settings: str, **measured) -> ResponseRecord:
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


def _exact_match(prompt: Prompt, text: str) -> bool | None:
    """Whether the response gives the reference answer; None without one."""
    answer = prompt.query.answers.get(prompt.language)
    return None if answer is None else prompt.benchmark.correct(text, answer, prompt.language)

"""The queries of config.eval -> prompts that are ready to generate from."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import ml_collections
import numpy as np

from msd_jax.data import prompts
from msd_jax.data.records import Query
from msd_jax.errors import UserError
from msd_jax.evaluation import benchmarks
from msd_jax.evaluation.judges import text
from msd_jax.evaluation.records import PromptKey
from msd_jax.io.console import log
from msd_jax.models import pretrained, tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One query in one language.

    Attributes:
      benchmark: whose query it is.
      query: the record.
      language: of this prompt.
    """

    benchmark: benchmarks.Benchmark
    query: Query
    language: str

    @property
    def key(self) -> PromptKey:
        return self.benchmark.name, self.query.id, self.language


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPrompt(Prompt):
    """One query in one language, ready to generate.

    Attributes:
      ids: int32 [P], the prompt of the student, or of the teacher in a pre-flight.
      opens: the tag with which the prompt opens the model's reasoning; "" where the model is to open it, if at all.
    """

    ids: np.ndarray
    opens: str = ""


def all_prompts(loaded: Sequence[benchmarks.Loaded]) -> Iterator[Prompt]:
    """Each query in each language that is asked for and that it has."""
    for each in loaded:
        for language in each.languages:
            for query in each.queries:
                if language in query.texts:
                    yield Prompt(each.benchmark, query, language)


def prompt_limit(config: ml_collections.ConfigDict, role: str = "student") -> tuple[int, str]:
    """(the most tokens of a role's prompt, the key of the config that says so)."""
    if role == "student" and config.eval.prompt_limit:
        return config.eval.prompt_limit, "config.eval.prompt_limit"
    return config.prompts[f"{role}_limit"], f"config.prompts.{role}_limit"


def encode(config: ml_collections.ConfigDict, model: pretrained.Pretrained, role: str) -> list[EncodedPrompt]:
    """All prompts that fit the limit; prints how many do not, and how many queries hold control tokens.

    Where the tokenizer has no chat template, multiple choice is asked in plain text, as base models are.

    Args:
      config: the whole config.
      model: whose tokenizer encodes.
      role: "student" (the query as a user writes it) or "teacher".

    Raises:
      UserError: a query file or a language is not fit, no prompt is left, or there is no chat template to ask what is
        not multiple choice.
    """
    limit, key = prompt_limit(config, role)
    loaded, opens = benchmarks.load(config.eval), ""
    if model.tokenizer.chat_template or not all(each.benchmark.choices for each in loaded):
        # A teacher is evaluated beside the student alone, whose prompts must end as its own.
        roles = ("student",) if role == "student" else ("student", "teacher")
        ends = prompts.check_templates(model.tokenizer, config.prompts, roles)
        opens = text.opened_reasoning(ends[role])
    kept: list[EncodedPrompt] = []
    dropped: collections.Counter[tuple[str, str]] = collections.Counter()
    hostile: dict[str, set[str]] = collections.defaultdict(set)
    for prompt in _all(config, model, role, loaded):
        if len(prompt.ids) > limit:
            dropped[prompt.benchmark.name, prompt.language] += 1
        else:
            kept.append(dataclasses.replace(prompt, opens=opens))
            if prompts.is_hostile(prompt.query, (prompt.language, config.data.source_language), model.tokenizer):
                hostile[prompt.benchmark.name].add(prompt.query.id)
    if not kept:
        raise UserError(
            f"{config.eval.path or config.eval.benchmarks}: every prompt is longer than {key}={limit} tokens"
            + (", or its query has no text in config.data.source_language" if role == "teacher" else "")
        )
    for (name, language), count in dropped.items():
        log(f"{name}: {count} prompts in {language} dropped, longer than {key}")
    for name, ids in hostile.items():
        for line in prompts.describe_hostile(name, len(ids)):
            log(line)
    return kept


def _all(
    config: ml_collections.ConfigDict,
    model: pretrained.Pretrained,
    role: str,
    loaded: Sequence[benchmarks.Loaded],
) -> Iterator[EncodedPrompt]:
    """Prompts of any length; a query without a text in the source language has none for a teacher."""
    source = config.data.source_language
    for prompt in all_prompts(loaded):
        query, language = prompt.query, prompt.language
        if not model.tokenizer.chat_template:
            ids = tokenizer.text_ids(model.tokenizer, query.texts[language] + "\n")
        elif role == "student":
            ids = prompts.student_ids(query, language, model.tokenizer, config.prompts)
        elif source in query.texts:
            ids = prompts.encode(query, language, model.tokenizer, config.prompts, source).teacher_ids
        else:
            continue
        model.require_embedded(ids, f"{prompt.benchmark.name}: query {query.id!r} in {language}")
        yield EncodedPrompt(prompt.benchmark, query, language, ids)

"""What the student and the teacher are shown: messages, chat templates, token ids, stop tokens.

`python -m msd_jax.prompts --config configs/NAME.py --n 3` prints both prompts of the first records.
"""

import dataclasses
import functools
import string
from typing import TYPE_CHECKING

import numpy as np

from msd_jax.data.records import Query, language_name
from msd_jax.errors import UserError
from msd_jax.models.tokenizer import Messages, token_ids

if TYPE_CHECKING:
    import ml_collections
    import transformers

# Our wording. The analysis stays unwritten, for the teacher's probabilities are read at the reply's own tokens.
DEFAULT_TEACHER_TEMPLATE = """\
A user sent the request below. Before you reply, think step by step in English, silently: what does the user want, \
who could be harmed if you helped, and would a responsible assistant help?

Then write your reply in {language}, and nothing else:
- If the request is safe, answer it in {language}, as helpfully as you can.
- If it is not safe, refuse in {language}: say briefly that you cannot help with it, and give no part of what was \
asked for.

Request: {query}"""

# For config.prompts.cot = "none": no word of safety.
DEFAULT_PLAIN_TEMPLATE = """\
Reply in {language} to the request below, and write nothing else.

Request: {query}"""

# For config.prompts.cot = "generated": two turns, with the teacher's own analysis between them.
DEFAULT_ANALYSIS_TEMPLATE = """\
A user sent the request below. Do not reply to it yet. Say in a few English sentences what the user wants, who could \
be harmed if you helped, and whether a responsible assistant would help.

Request: {query}"""
DEFAULT_REPLY_TEMPLATE = """\
Now write your reply to the user in {language}, and nothing else. If the request is safe, answer it as helpfully as \
you can. If it is not safe, refuse: say briefly that you cannot help with it, and give no part of what was asked for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One query in one target language, as both roles see it.

    Attributes:
      query_id, harmful: of the record.
      language: the target language.
      student_ids: int32 [P_S], the whole prompt, up to where the reply begins.
      teacher_ids: int32 [P_T], likewise.
      retained: whether it is there to keep the model as it was, see `retained`.
    """

    query_id: str
    language: str
    harmful: bool | None
    student_ids: np.ndarray
    teacher_ids: np.ndarray
    retained: bool = False


def fill_template(template: str, query: str, language: str, key: str = "teacher_template") -> str:
    """The template with {query} and {language} filled in; braces in `query` mean nothing.

    Args:
      template: the value of config.prompts.KEY.
      query, language: what stands for its placeholders.
      key: for messages. A template needs {query}, the reply_template {language}.

    Raises:
      UserError: the template lacks what it needs, has another placeholder, or broken braces ({{ and }} are literal
        braces).
    """
    values = {"query": query, "language": language, None: ""}
    return "".join(literal + values[field] for literal, field in _parse_template(template, key))


@functools.cache
def _parse_template(template: str, key: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, placeholder after it or None) of each piece."""
    needed, key = ("language" if key == "reply_template" else "query"), f"config.prompts.{key}"
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key}: {error}; write {{{{ and }}}} for braces that are not a placeholder's") from None
    for _, field, form, conversion in pieces:
        if field is not None and (field not in ("query", "language") or form or conversion):
            raise UserError(f"{key}: unknown placeholder {{{field}}}; it takes {{query}} and {{language}} as they are")
    if all(field != needed for _, field, _, _ in pieces):
        raise UserError(f"{key} has no {{{needed}}}: the teacher would not see the {needed}")
    return tuple((literal, field) for literal, field, _, _ in pieces)


def student_messages(query: Query, language: str, config: "ml_collections.ConfigDict") -> Messages:
    """The query in `language` and nothing else: what a user will type. `config` is config.prompts."""
    return _messages(config.student_system, query.texts[language])


def analysis_messages(query: Query, config: "ml_collections.ConfigDict", source_language: str) -> Messages:
    """What the teacher is asked before it replies, with config.prompts.cot = "generated"."""
    text = fill_template(config.analysis_template, query.texts[source_language], "", "analysis_template")
    return _messages(config.teacher_system, text)


def teacher_messages(
    query: Query,
    language: str,
    config: "ml_collections.ConfigDict",
    source_language: str,
    analysis: str = "",
) -> Messages:
    """The query in the source language, to be answered in `language`, under what config.prompts.cot says of thinking.

    `analysis` is the teacher's own, for "generated"; it is a turn of the conversation.
    """
    name, text = language_name(language), query.texts[source_language]
    if config.cot == "generated":
        reply = fill_template(config.reply_template, text, name, "reply_template")
        turns = [{"role": "assistant", "content": analysis}, {"role": "user", "content": reply}]
        return analysis_messages(query, config, source_language) + turns
    key = "plain_template" if config.cot == "none" else "teacher_template"
    return _messages(config.teacher_system, fill_template(config[key], text, name, key))


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]


def student_ids(
    query: Query,
    language: str,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
) -> np.ndarray:
    """The student's prompt, int32 [P_S], whatever its length; `config` is config.prompts."""
    return token_ids(tokenizer, student_messages(query, language, config), config.student_template_kwargs)


def encode(
    query: Query,
    language: str,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
    source_language: str,
    analysis: str = "",
) -> Example:
    """Both roles' prompts, whatever their length: what exceeds its limit is the caller's to drop, never cut.

    Args:
      query: has texts in `language` and `source_language`.
      language: target language.
      tokenizer: of transformers.
      config: config.prompts.
      source_language: what the teacher reads.
      analysis: what it wrote about the query, with config.prompts.cot = "generated".
    """
    messages = teacher_messages(query, language, config, source_language, analysis)
    return Example(
        query_id=query.id,
        language=language,
        harmful=query.harmful,
        student_ids=student_ids(query, language, tokenizer, config),
        teacher_ids=token_ids(tokenizer, messages, config.teacher_template_kwargs),
    )


def retained(
    query: Query,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
    source_language: str,
) -> Example:
    """The query in the source language, shown to both roles as a user writes it.

    A frozen teacher then is the initial model itself, and what the loss measures is how far the student has moved from
    it. Arguments are those of `encode`.
    """
    ids = student_ids(query, source_language, tokenizer, config)
    return Example(query.id, source_language, query.harmful, ids, ids, retained=True)

"""What the student and the teacher are shown: the messages of each role, and their token ids.

`python -m msd_jax.prompts --config configs/NAME.py --n 3` prints both prompts of the first records.
"""

import dataclasses
import functools
import string
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from msd_jax import losses
from msd_jax.data.records import Query, language_name
from msd_jax.errors import UserError
from msd_jax.models import reasoning, template_check
from msd_jax.models.tokenizer import Messages, holds_control_token, template_file, token_ids

if TYPE_CHECKING:
    import ml_collections
    import transformers

# What config.prompts.cot may be: how the teacher is made to think about safety.
COT = ("instruction", "generated", "none")

# For "instruction". The wording is ours. The teacher thinks silently, because its probabilities are read at the tokens
# of the reply.
DEFAULT_TEACHER_TEMPLATE = """\
A user sent the request below. Before you reply, think step by step in English, silently: what does the user want, \
who could be harmed if you helped, and would a responsible assistant help?

Then write your reply in {language}, and nothing else:
- If the request is safe, answer it in {language}, as helpfully as you can.
- If it is not safe, refuse in {language}: say briefly that you cannot help with it, and give no part of what was \
asked for.

Request: {query}"""

# For "none": not a word about safety.
DEFAULT_PLAIN_TEMPLATE = """\
Reply in {language} to the request below, and write nothing else.

Request: {query}"""

# For "generated": two turns, with the teacher's own analysis between them.
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
      language: of the student's query.
      student_ids: int32 [P_S], the whole prompt, up to where the reply begins.
      teacher_ids: int32 [P_T], likewise; empty where nothing reads the teacher.
      response_ids: int32 [R], the reference response; None unless config.rollout.policy is "reference".
    """

    query_id: str
    language: str
    harmful: bool | None
    student_ids: np.ndarray
    teacher_ids: np.ndarray
    response_ids: np.ndarray | None = None


def shows_teacher(config: "ml_collections.ConfigDict") -> bool:
    """Whether a run shows the teacher anything: it writes responses, or the loss reads it. `config` is the whole."""
    keys = ("divergence", "weighting", "student_token")
    settings = losses.LossSettings(**{key: config.loss[key] for key in keys})
    return config.rollout.policy != "reference" or settings.reads_teacher


# What each template may show: first the placeholder that it needs. {query} is the query in the source language,
# {target_query} in the language asked for, which is not known when the analysis of a query is written.
_PLACEHOLDERS = {
    "teacher_template": ("query", "language", "target_query"),
    "plain_template": ("query", "language", "target_query"),
    "analysis_template": ("query",),
    "reply_template": ("language", "query", "target_query"),
}


def fill_template(
    template: str, query: str, language: str, key: str = "teacher_template", target_query: str = ""
) -> str:
    """Fills in {query}, {language} and {target_query}, in one pass, so that braces in queries are text.

    Args:
      template: the value of config.prompts.KEY; {{ and }} are literal braces.
      query, language, target_query: what replaces the placeholders.
      key: KEY, which decides what placeholders there may be.

    Raises:
      UserError: a placeholder is missing or unknown, or braces do not match.
    """
    values = {"query": query, "language": language, "target_query": target_query, None: ""}
    return "".join(literal + values[field] for literal, field in _parse_template(template, key))


@functools.cache
def _parse_template(template: str, key: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, placeholder after it or None) of each piece."""
    allowed, key = _PLACEHOLDERS[key], f"config.prompts.{key}"
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key}: {error}; write {{{{ and }}}} for literal braces") from None
    for _, field, form, conversion in pieces:
        if field is not None and (field not in allowed or form or conversion):
            known = ", ".join(f"{{{name}}}" for name in allowed)
            raise UserError(f"{key}: unknown placeholder {{{field}}}; it may have {known}")
    if all(field != allowed[0] for _, field, _, _ in pieces):
        raise UserError(f"{key} has no {{{allowed[0]}}}: the teacher would not see the {allowed[0]}")
    return tuple((literal, field) for literal, field, _, _ in pieces)


def student_messages(query: Query, language: str, config: "ml_collections.ConfigDict") -> Messages:
    """The student's messages: the query in `language`, as a user will type it. `config` is config.prompts."""
    return _messages(config.student_system, query.texts[language])


def analysis_messages(query: Query, config: "ml_collections.ConfigDict", source_language: str) -> Messages:
    """The messages to which the teacher writes its analysis, with config.prompts.cot = "generated"."""
    text = fill_template(config.analysis_template, query.texts[source_language], "", "analysis_template")
    return _messages(config.teacher_system, text)


def analysis_variables(config: "ml_collections.ConfigDict") -> dict[str, Any]:
    """The variables of the chat template with which the teacher writes its analysis. `config` is config.prompts."""
    return config.teacher_template_kwargs.to_dict() | (reasoning.ON if config.analysis_is_thinking else {})


def teacher_messages(
    query: Query,
    language: str,
    config: "ml_collections.ConfigDict",
    source_language: str,
    analysis: str = "",
) -> Messages:
    """The teacher's messages: the query in the source language, to be answered in `language`.

    Args:
      query: has texts in `source_language` and `language`.
      language: of the answer.
      config: config.prompts; `cot` decides which templates are used.
      source_language: what the teacher reads.
      analysis: what the teacher wrote about the query, which with cot = "generated" is a turn of the conversation.
    """
    name, text, target = language_name(language), query.texts[source_language], query.texts[language]
    if config.cot == "generated":
        reply = fill_template(config.reply_template, text, name, "reply_template", target)
        turns = [{"role": "assistant", "content": analysis}, {"role": "user", "content": reply}]
        return analysis_messages(query, config, source_language) + turns
    key = "plain_template" if config.cot == "none" else "teacher_template"
    return _messages(config.teacher_system, fill_template(config[key], text, name, key, target))


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]


def student_ids(
    query: Query,
    language: str,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
) -> np.ndarray:
    """The student's prompt, int32 [P_S], whatever its length. `config` is config.prompts."""
    return token_ids(tokenizer, student_messages(query, language, config), config.student_template_kwargs)


def encode(
    query: Query,
    language: str,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
    source_language: str | None,
    analysis: str = "",
) -> Example:
    """Both roles' prompts, whatever their length: the caller drops what exceeds a limit; nothing is cut.

    Args:
      query: has texts in `language` and `source_language`.
      language: the target language.
      tokenizer: of transformers.
      config: config.prompts.
      source_language: what the teacher reads; None where nothing reads the teacher.
      analysis: what the teacher wrote about the query, with config.prompts.cot = "generated".
    """
    teacher_ids = np.zeros(0, np.int32)
    if source_language is not None:
        messages = teacher_messages(query, language, config, source_language, analysis)
        teacher_ids = token_ids(tokenizer, messages, config.teacher_template_kwargs)
    return Example(
        query_id=query.id,
        language=language,
        harmful=query.harmful,
        student_ids=student_ids(query, language, tokenizer, config),
        teacher_ids=teacher_ids,
    )


def check_templates(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
    roles: Sequence[str] = ("student", "teacher"),
) -> dict[str, str]:
    """Checks that the chat template shows every message of the roles, and that their prompts end alike.

    Args:
      tokenizer: of transformers.
      config: config.prompts.
      roles: whose prompts are checked.

    Returns:
      By role, what the template writes behind the messages, in lower case.

    Raises:
      UserError: it shows not all, does not take the messages, or takes too much time or memory, see template_check.py;
        or what it writes behind them differs, and config.prompts.require_same_ending.
    """
    query = Query("", None, "", {"en": "query"})
    messages = {
        "student": student_messages(query, "en", config),
        "teacher": teacher_messages(query, "en", config, "en"),
    }
    checked = template_check.check(
        tokenizer, {f"the {role}": (messages[role], config[f"{role}_template_kwargs"].to_dict()) for role in roles}
    )
    if config.cot == "generated" and config.analysis_is_thinking and not reasoning.marked(tokenizer.chat_template):
        raise UserError(
            f"config.prompts.analysis_is_thinking=True: the chat template of {template_file(tokenizer)} marks no "
            "reasoning; set it to False, and the analysis is the reply to config.prompts.analysis_template"
        )
    ends = {role: checked[f"the {role}"] for role in roles}
    if config.require_same_ending and len(set(ends.values())) > 1:
        raise UserError(
            f"{template_file(tokenizer)}: the prompts end differently: "
            + ", ".join(f"the {role}'s in {end[-60:]!r}" for role, end in ends.items())
            + ", so that a response would begin with the reasoning of one role and the reply of the other; give "
            "config.prompts.student_template_kwargs and teacher_template_kwargs the same thinking mode, or set "
            "config.prompts.require_same_ending=False"
        )
    return ends


def is_hostile(query: Query, languages: Iterable[str], tokenizer: "transformers.PreTrainedTokenizerBase") -> bool:
    """Whether a text of the query in one of the languages spells a control token, which is encoded as text."""
    return any(holds_control_token(tokenizer, query.texts.get(language, "")) for language in languages)


def describe_hostile(name: str, count: int) -> list[str]:
    """A line on `count` queries of `name` that are hostile; none where there are none."""
    return [f"{name}: {count} queries hold control tokens; they are encoded as text"] * bool(count)


def retained(
    query: Query,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
    source_language: str,
) -> Example:
    """The query in the source language, shown to both roles as a user types it.

    A frozen teacher is then the initial model, and the loss measures how far the student has moved from it. Arguments
    are those of `encode`.
    """
    ids = student_ids(query, source_language, tokenizer, config)
    return Example(query.id, source_language, query.harmful, ids, ids)

"""What the student and the teacher are shown: messages, chat templates, token ids, stop tokens.

`python -m msd_jax.prompts --config configs/NAME.py --n 3` prints both prompts of the first records.
"""

import dataclasses
import functools
import inspect
import json
import os
import pathlib
import re
import string
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from msd_jax import queries

if TYPE_CHECKING:
    import ml_collections
    import rich.console
    import transformers

language_name = queries.language_name

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

Messages = list[dict[str, str]]


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
      ValueError: the template lacks what it needs, has another placeholder, or broken braces ({{ and }} are literal
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
        raise ValueError(f"{key}: {error}; write {{{{ and }}}} for braces that are not a placeholder's") from None
    for _, field, form, conversion in pieces:
        if field is not None and (field not in ("query", "language") or form or conversion):
            raise ValueError(f"{key}: unknown placeholder {{{field}}}; it takes {{query}} and {{language}} as they are")
    if all(field != needed for _, field, _, _ in pieces):
        raise ValueError(f"{key} has no {{{needed}}}: the teacher would not see the {needed}")
    return tuple((literal, field) for literal, field, _, _ in pieces)


def student_messages(query: queries.Query, language: str, config: "ml_collections.ConfigDict") -> Messages:
    """The query in `language` and nothing else: what a user will type. `config` is config.prompts."""
    return _messages(config.student_system, query.texts[language])


def analysis_messages(query: queries.Query, config: "ml_collections.ConfigDict", source_language: str) -> Messages:
    """What the teacher is asked before it replies, with config.prompts.cot = "generated"."""
    text = fill_template(config.analysis_template, query.texts[source_language], "", "analysis_template")
    return _messages(config.teacher_system, text)


def teacher_messages(
    query: queries.Query,
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


def render(tokenizer: "transformers.PreTrainedTokenizerBase", messages: Messages, template_kwargs: Mapping) -> str:
    """The prompt as text, for people; see `token_ids`."""
    return _apply_chat_template(tokenizer, messages, template_kwargs, tokenize=False)


def token_ids(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: Messages, template_kwargs: Mapping
) -> np.ndarray:
    """The prompt, int32 [P], rendered by the tokenizer's own chat template up to where the reply begins.

    The ids come from the chat template alone: tokenizing its text anew would add a second BOS.

    Args:
      tokenizer: of transformers.
      messages: of one role.
      template_kwargs: variables of the chat template, such as enable_thinking. Llama 3's takes today's date unless
        `date_string` is given, and then prompts differ from day to day.

    Raises:
      ValueError: there is no chat template, or it refuses the messages.
    """
    return np.asarray(_apply_chat_template(tokenizer, messages, template_kwargs, tokenize=True), np.int32)


def _apply_chat_template(tokenizer: Any, messages: Messages, template_kwargs: Mapping, **options: Any) -> Any:
    import jinja2

    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; take an instruction-tuned model, or put "
            "the template beside the tokenizer as chat_template.jinja"
        )
    options = {"add_generation_prompt": True, "return_dict": False} | options
    variables = dict(template_kwargs)
    # transformers takes both from the same keywords, and some of its own would cut a prompt.
    for key in variables.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys():
        raise ValueError(f"config.prompts: {key!r} in template_kwargs is not a variable of the chat template")
    try:  # transformers renders it in jinja2's ImmutableSandboxedEnvironment
        return tokenizer.apply_chat_template(messages, **options, **variables)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template does not take {[m['role'] for m in messages]} messages with "
            f"{variables} ({error}); see config.prompts"
        ) from error


def student_ids(
    query: queries.Query,
    language: str,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    config: "ml_collections.ConfigDict",
) -> np.ndarray:
    """The student's prompt, int32 [P_S], whatever its length; `config` is config.prompts."""
    return token_ids(tokenizer, student_messages(query, language, config), config.student_template_kwargs)


def encode(
    query: queries.Query,
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
    query: queries.Query,
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


def without_special_tokens(tokenizer: "transformers.PreTrainedTokenizerBase", text: str) -> str:
    """Untrusted text in which no special token is left that could end a message or open another."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, " ".join(token.content))
    return text


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form OWNER/NAME of a model on the Hugging Face hub."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path))


def load_tokenizer(path: str) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory or hub id. Code that a model brings along is never run.

    Raises:
      FileNotFoundError, ValueError: with one line that names `path`.
    """
    import transformers

    if not path:
        raise ValueError("config.model.path is empty: give a Hugging Face model directory or a hub id (owner/name)")
    local = os.path.isdir(path)
    if not local and not is_hub_id(path):
        raise FileNotFoundError(f"config.model.path={path!r} is neither a directory nor a hub id (owner/name)")
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
        if not local:
            raise FileNotFoundError(
                f"config.model.path={path!r} is not a directory here, and the hub did not give its tokenizer ({reason})"
            ) from error
        raise ValueError(
            f"{path}: the tokenizer does not load ({reason}); it needs tokenizer.json and tokenizer_config.json"
        ) from error


def stop_token_ids(tokenizer: "transformers.PreTrainedTokenizerBase", directory: str) -> tuple[int, ...]:
    """All tokens that end a reply, sorted: a chat model's end of turn is often not its tokenizer's eos.

    They are the tokenizer's eos, those of generation_config.json (which may be absent), and the special token with
    which the chat template closes an assistant's message.

    Raises:
      NotADirectoryError: `directory` is none.
      ValueError: generation_config.json is broken, or there is no stop token at all.
    """
    if not os.path.isdir(directory):
        raise NotADirectoryError(f"{directory} is not a directory; resolve a hub id to its local snapshot first")
    stops = {tokenizer.eos_token_id, _end_of_turn(tokenizer), *_generation_stops(directory)} - {None}
    if not stops:
        raise ValueError(f"{directory}: no token ends a reply; set eos_token in tokenizer_config.json")
    return tuple(sorted(stops))


def _generation_stops(directory: str) -> list[int | None]:
    file = pathlib.Path(directory) / "generation_config.json"
    if not file.exists():
        return []
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object ({error})") from None
    stops = eos if isinstance(eos, list) else [eos]
    if not all(stop is None or type(stop) is int for stop in stops):
        raise ValueError(f"{file}: eos_token_id={eos!r} must be a token id or a list of them")
    return stops


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that follows an assistant's reply in the chat template; None if there is none."""
    reply = "REPLY"
    messages = [{"role": "user", "content": "QUERY"}, {"role": "assistant", "content": reply}]
    text = _apply_chat_template(tokenizer, messages, {}, tokenize=False, add_generation_prompt=False)
    _, found, rest = text.rpartition(reply)
    # Only what stands right behind the reply ends it; a later special token may open the next message.
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    added = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else None


def show(config: "ml_collections.ConfigDict", n: int, console: "rich.console.Console") -> None:
    """Prints both roles' prompts, with their lengths, of the first `n` records in each target language."""
    from rich.text import Text

    languages, source = tuple(config.data.languages), config.data.source_language
    records = queries.load(config.data)
    queries.require_languages(records, (source, *languages), queries.describe(config.data))
    tokenizer = load_tokenizer(config.model.path)
    for record in records[:n]:
        for language in languages:
            for role, messages in (
                ("student", student_messages(record, language, config.prompts)),
                ("teacher", teacher_messages(record, language, config.prompts, source, "[the teacher's analysis]")),
            ):
                variables, limit = (config.prompts[f"{role}_{key}"] for key in ("template_kwargs", "limit"))
                length = len(token_ids(tokenizer, messages, variables))
                over = f", over config.prompts.{role}_limit={limit}: dropped in training" if length > limit else ""
                title = f"{record.id}  {language_name(language)} ({language})  {role}: {length} tokens{over}"
                # Text, not markup: what stands in the data is shown and never obeyed.
                console.print(Text(printable(title), style="bold"), soft_wrap=True)
                console.print(Text(printable(render(tokenizer, messages, variables)) + "\n"), soft_wrap=True)


def printable(text: str) -> str:
    """`text` with its control and invisible formatting characters escaped, so that it cannot steer a terminal."""
    keep = "\n\t\u200c\u200d"  # the joiners are letters' business in Bengali, Persian and others
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cf") and c not in keep else c
        for c in text
    )


def main(argv: list[str]) -> None:
    del argv
    from msd_jax import cli, console

    with cli.clear_errors():
        show(cli.config(), cli.FLAGS.n, console.console)


if __name__ == "__main__":
    from absl import flags

    from msd_jax import cli

    flags.DEFINE_integer("n", 3, "Number of records to show.", lower_bound=1)
    cli.run(main, alone=True)

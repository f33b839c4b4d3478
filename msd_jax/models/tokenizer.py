"""Tokenizers: loading, chat templates, control tokens, stop tokens."""

import functools
import inspect
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from msd_jax.errors import UserError, UserFileError
from msd_jax.io import snapshots
from msd_jax.models.location import COMPANIONS, is_local

if TYPE_CHECKING:
    import transformers

Messages = list[dict[str, str]]
_CONVERSATION = [{"role": "user", "content": "QUERY"}, {"role": "assistant", "content": "REPLY"}]  # to try a template


def render(tokenizer: "transformers.PreTrainedTokenizerBase", messages: Messages, template_kwargs: Mapping) -> str:
    """The prompt as text, for people to read; see `token_ids`."""
    return _apply_chat_template(tokenizer, messages, template_kwargs, tokenize=False)


def token_ids(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: Messages, template_kwargs: Mapping
) -> np.ndarray:
    """The prompt, int32 [P], rendered by the tokenizer's own chat template up to where the reply begins.

    The ids come straight from the chat template: tokenizing its text again would add a second BOS. Only the template
    writes control tokens: those in a message's content are encoded as text.

    Args:
      tokenizer: of transformers.
      messages: of one conversation.
      template_kwargs: variables of the chat template, such as enable_thinking. Without `date_string` Llama 3's template
        writes today's date, and prompts differ from day to day.

    Raises:
      UserError: there is no chat template, or it refuses the messages.
    """
    return np.asarray(_apply_chat_template(tokenizer, messages, template_kwargs, tokenize=True), np.int32)


def text_ids(tokenizer: "transformers.PreTrainedTokenizerBase", text: str) -> np.ndarray:
    """A text as a base model reads it, int32 [P]: with the tokens that the tokenizer puts before every text.

    Control tokens in the text are encoded as text.
    """
    ids = tokenizer(_encodable(tokenizer, text), split_special_tokens=True)["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers also put one behind every text, which goes on
        ids = ids[:-1]
    return np.asarray(ids, np.int32)


def describe_bos(tokenizer: "transformers.PreTrainedTokenizerBase") -> list[str]:
    """A line where prompts of the chat template begin without the BOS that the tokenizer puts before every text.

    Raises:
      UserError: the chat template writes BOS twice.
    """
    bos = tokenizer.bos_token_id
    ids = _apply_chat_template(tokenizer, _CONVERSATION, {}, tokenize=True, add_generation_prompt=False)
    if bos is None:
        return []
    if ids[:2] == [bos, bos]:
        raise UserError(
            f"{template_file(tokenizer)}: the chat template begins prompts with {tokenizer.bos_token} twice; remove one"
        )
    if ids[:1] != [bos] and tokenizer("x")["input_ids"][:1] == [bos]:
        return [
            f"note: {template_file(tokenizer)}: the chat template begins prompts without {tokenizer.bos_token}, which "
            "the tokenizer puts before every text; if the model was trained with it, add it to the template"
        ]
    return []


def _apply_chat_template(tokenizer: Any, messages: Messages, template_kwargs: Mapping, **options: Any) -> Any:
    chat_template(tokenizer)
    options = {"add_generation_prompt": True, "return_dict": False} | options
    variables = dict(template_kwargs)
    # transformers takes its own options from the same keywords, and some of them would truncate a prompt.
    for key in variables.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys():
        raise UserError(f"config.prompts: {key!r} in template_kwargs is not a variable of the chat template")
    if options["tokenize"] and any(holds_control_token(tokenizer, message["content"]) for message in messages):
        messages = [message | {"content": _encodable(tokenizer, message["content"])} for message in messages]
        # transformers would choose fewer by itself.
        tokenizer.chat_control_tokens = list(_control_tokens(tokenizer))
        options["sanitize_control_tokens"] = True
    try:  # transformers renders it in jinja2's ImmutableSandboxedEnvironment
        return tokenizer.apply_chat_template(messages, **options, **variables)
    except Exception as error:  # a template is a program, and raises what it likes
        raise UserError(
            f"{template_file(tokenizer)}: the chat template does not take {[m['role'] for m in messages]} messages "
            f"with {variables} ({type(error).__name__}: {' '.join(str(error).split())[:300]}); see config.prompts"
        ) from error


def chat_template(tokenizer: Any) -> str:
    """The template that prompts are rendered with. Raises UserError where there is none."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, as base models do not; take an "
            "instruction-tuned model, or give a template: --config.prompts.chat_template=FILE"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several named ones, none of them the default
        raise UserError(f"{template_file(tokenizer)}: {error}") from error


def template_file(tokenizer: Any) -> pathlib.Path:
    """Where the chat template was read from."""
    if given := getattr(tokenizer, "chat_template_file", ""):
        return pathlib.Path(given)
    directory = pathlib.Path(tokenizer.name_or_path)
    own = directory / "chat_template.jinja"
    return own if own.exists() else directory / "tokenizer_config.json"


def holds_control_token(tokenizer: "transformers.PreTrainedTokenizerBase", text: str) -> bool:
    """Whether `text` spells a token by which the tokenizer steers a model, such as one that ends a turn."""
    return bool(_any_of(_control_tokens(tokenizer)).search(text))


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens, further ones that the chat template writes, and those of the form <|...|>.

    A template may build the last from parts, as in '<|' + message.role + '|>'. A token of blanks is text.
    """
    return _choose_control_tokens(tokenizer, json.dumps(tokenizer.chat_template, ensure_ascii=False))


@functools.lru_cache(maxsize=8)
def _choose_control_tokens(tokenizer: Any, template: str) -> tuple[str, ...]:
    return tuple(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or (token.content in template and not token.content.isspace())
        or re.fullmatch(r"<\|.*\|>", token.content)
    )


@functools.lru_cache(maxsize=8)
def _any_of(contents: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")


def _encodable(tokenizer: Any, text: str) -> str:
    """`text` with control tokens that the tokenizer can encode as text.

    Some tokenizers (word-level, unigram) have one's id as the only encoding of its characters; they are then separated
    by blanks.
    """

    def spell(match: re.Match[str]) -> str:
        ids = tokenizer.encode(match[0], add_special_tokens=False, split_special_tokens=True)
        return " ".join(match[0]) if tokenizer.convert_tokens_to_ids(match[0]) in ids else match[0]

    return _any_of(_control_tokens(tokenizer)).sub(spell, text)


def load_tokenizer(path: str, chat_template: str = "") -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face directory or hub id; a model's own code is never run.

    Args:
      path: of the model.
      chat_template: a file with the template to use instead of the tokenizer's own; "" for that.

    Raises:
      UserError: with one line that names `path` or `chat_template`.
    """
    import transformers

    if "://" in path:
        path = str(snapshots.fetch_stored("config.model.path", path, COMPANIONS))
    local = is_local(path)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(os.path.expanduser(path), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
        if not local:
            raise UserFileError(
                f"config.model.path={path!r} is not a directory here, and the hub did not give its tokenizer ({reason})"
            ) from error
        raise UserError(
            f"{path}: the tokenizer does not load ({reason}); it needs tokenizer.json and tokenizer_config.json"
        ) from error
    if chat_template:
        tokenizer.chat_template, tokenizer.chat_template_file = _read_template(chat_template), chat_template
    return tokenizer


def _read_template(path: str) -> str:
    try:
        return pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserFileError(f"config.prompts.chat_template={path!r} cannot be read: {reason}") from error


def stop_token_ids(tokenizer: "transformers.PreTrainedTokenizerBase", directory: str) -> tuple[int, ...]:
    """All tokens that end a reply, sorted: a chat model's end of turn is often not its tokenizer's eos.

    They are the tokenizer's eos, those of generation_config.json or, where it names none, of config.json, and the
    special token that closes an assistant's message in the chat template.

    Raises:
      UserFileError: `directory` is not a directory.
      UserError: one of the files is broken, or there is no stop token at all.
    """
    if not os.path.isdir(directory):
        raise UserFileError(f"{directory} is not a directory; resolve a hub id to its local snapshot first")
    stops = {tokenizer.eos_token_id, _end_of_turn(tokenizer), *_generation_stops(directory)} - {None}
    if not stops:
        raise UserError(f"{directory}: no token ends a reply; set eos_token in tokenizer_config.json")
    return tuple(sorted(stops))


def end_of_reply(tokenizer: "transformers.PreTrainedTokenizerBase") -> int:
    """The token that ends a reply: that of the chat template, or the tokenizer's eos.

    Raises:
      UserError: there is neither.
    """
    end = _end_of_turn(tokenizer)
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise UserError(f"{tokenizer.name_or_path}: no token ends a reply; set eos_token in tokenizer_config.json")
    return end


def reply_ids(tokenizer: "transformers.PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a reply, without the one that ends it; special tokens in the text are encoded as text."""
    if holds_control_token(tokenizer, text):
        text = _encodable(tokenizer, text)
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _generation_stops(directory: str) -> list[int | None]:
    for name in ("generation_config.json", "config.json"):
        if stops := _stops_of(pathlib.Path(directory) / name):
            return stops
    return []


def _stops_of(file: pathlib.Path) -> list[int | None]:
    """eos_token_id of a JSON file, one or several; [] where there is no file or it names none."""
    if not file.exists():
        return []
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a JSON object ({error})") from None
    stops = eos if isinstance(eos, list) else [eos] * (eos is not None)
    if not all(stop is None or type(stop) is int for stop in stops):
        raise UserError(f"{file}: eos_token_id={eos!r} must be a token id or a list of them")
    return stops


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that follows an assistant's reply in the chat template, if there are both."""
    if not tokenizer.chat_template:
        return None
    text = _apply_chat_template(tokenizer, _CONVERSATION, {}, tokenize=False, add_generation_prompt=False)
    _, found, rest = text.rpartition(_CONVERSATION[-1]["content"])
    # Only what comes right after the reply ends it; a later special token may open the next message.
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    added = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else None

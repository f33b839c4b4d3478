"""Checks a model's chat template, which is a program of whoever published the model, before it is relied on."""

import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from msd_jax.errors import UserError
from msd_jax.models import tokenizer

_PROGRAM = pathlib.Path(__file__).with_name("render_untrusted.py")
SECONDS = 2  # of computing, for all conversations together
BYTES = 512 << 20
_START = 300  # more seconds by the clock, for a process that starts on a busy machine; a template cannot wait
_LONGEST = 1 << 20  # characters

Conversations = Mapping[str, tuple[tokenizer.Messages, Mapping[str, Any]]]


def check(tokens: Any, conversations: Conversations, shows: bool = True) -> dict[str, str]:
    """Renders each conversation in a process with limits.

    What a message says is replaced by a marker: a template may not care for what it says, but must show it.

    Args:
      tokens: of transformers.
      conversations: by the name for errors, messages and the variables of the chat template.
      shows: whether each message must come out.

    Returns:
      By name, what the template writes behind the last message, in lower case.

    Raises:
      UserError: with one line that names the file, the conversation, and what the template does.
    """
    tasks = [_variables(tokens, *conversation) for conversation in conversations.values()]
    results = _render(tokenizer.chat_template(tokens), json.dumps(tasks))
    for name, task, result in zip(conversations, tasks, results):
        fault = _fault(result) or (shows and _drops(task["messages"], result["text"]))
        if fault:
            roles = [message["role"] for message in task["messages"]]
            raise UserError(
                f"{tokenizer.template_file(tokens)}: {name}: the chat template does not take {roles} messages "
                f"({fault}); see config.prompts, or mend the template"
            )
    ends = (result["text"].lower().rpartition(task["messages"][-1]["content"]) for task, result in zip(tasks, results))
    return {name: end for name, (_, _, end) in zip(conversations, ends)}


def _variables(tokens: Any, messages: tokenizer.Messages, variables: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is rendered with, as transformers does."""
    special = {name: token for name, token in tokens.special_tokens_map.items() if isinstance(token, str)}
    return (
        special
        | dict(variables)
        | {
            "messages": [message | {"content": _marker(i)} for i, message in enumerate(messages)],
            "add_generation_prompt": messages[-1]["role"] == "user",
            "tools": None,
            "documents": None,
        }
    )


def _marker(index: int) -> str:
    """The text of a message, which no template has and none has a reason to change."""
    return f"markerof{index}message"


def _fault(result: Mapping[str, str]) -> str:
    if "error" in result:
        return " ".join(result["error"].split())[:300]
    return f"it writes {len(result['text']):,} characters" if len(result["text"]) > _LONGEST else ""


def _drops(messages: tokenizer.Messages, text: str) -> str:
    lost = [message["role"] for message in messages if message["content"] not in text.lower()]
    return f"it drops what the {lost[0]} says" if lost else ""


@functools.lru_cache(maxsize=64)
def _render(template: str, conversations: str) -> list[dict[str, str]]:
    """What a process of its own makes of each conversation; `conversations` is JSON."""
    task = {
        "template": template,
        "conversations": json.loads(conversations),
        "seconds": SECONDS,
        "bytes": BYTES,
    }
    command = [sys.executable, "-I", str(_PROGRAM)]
    try:
        done = subprocess.run(
            command, input=json.dumps(task).encode(), capture_output=True, timeout=SECONDS + _START, check=False
        )
        return json.loads(done.stdout)
    except ValueError:  # killed by its limits, it writes nothing
        fault = f"it takes more than {SECONDS} seconds or {BYTES >> 20} MB"
        return [{"error": fault}] * len(task["conversations"])
    except subprocess.TimeoutExpired as error:  # not by the template, which can only compute
        raise UserError(
            f"the chat template could not be tried in {error.timeout:g} seconds: this machine is too busy; run the "
            "same command again"
        ) from error

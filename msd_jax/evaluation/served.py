"""A model behind an OpenAI-compatible server, as an evaluation asks it: over chat completions, several at a time.

What differs from a model on this mesh: the server renders the chat template (control tokens in a query are whatever it
takes them for), counts the tokens, and knows its limits; seeds are its own. Multiple choice is read from the
log-probabilities of a reply's first token, after an instruction to reply with the letter alone, as no server lets all
others be scored; these figures compare with each other, not with those of a model here.
"""

import collections
import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from msd_jax.data import prompts as templates
from msd_jax.errors import UserError
from msd_jax.evaluation import benchmarks, encoding, evaluator, judges
from msd_jax.evaluation.benchmarks.mmmlu import LETTERS
from msd_jax.evaluation.encoding import Prompt
from msd_jax.evaluation.endpoint import ChatEndpoint, Failure, Keys
from msd_jax.evaluation.judges.interface import Messages, Usage
from msd_jax.evaluation.multiple_choice import Choice
from msd_jax.evaluation.rates import Summary
from msd_jax.evaluation.records import Pass
from msd_jax.evaluation.respondents import TEMPERATURES, Reply
from msd_jax.io.console import log

_KEYS = Keys("--server", "--model", "config.eval.server")
_HELLO: Messages = [{"role": "user", "content": "Hello"}]  # to try the server with
_TRIAL_SECONDS = 60.0  # that a server may take to say which models it has
_ONE_LETTER = "\n\nReply with the letter alone."
_TOP = 20  # most probable tokens that are asked for; more are granted by few servers
# Statuses that are about the server or the account, once it has answered; 403 is what filters of providers say too.
_OUT_OF_ORDER = (401, 402, 404)


class Server:
    """Answers as one model of one server does; there are no weights to give.

    Attributes:
      kept_together: one, for each has cost something.
    """

    kept_together = 1

    def __init__(self, config: ml_collections.ConfigDict, url: str, model: str):
        """`config`: the whole config. Raises UserError where it cannot work; nothing was sent."""
        self._config, self._name = config, f"{model} at {url}"
        merged = ml_collections.FrozenConfigDict(config.eval.server.to_dict() | {"url": url, "model": model})
        self._endpoint = ChatEndpoint(merged, _KEYS, key_needed=False)
        self._left_out: collections.Counter[str] = collections.Counter()  # prompts, by the reason

    def require_answer(self) -> None:
        """Asks for a token, before anything long begins.

        Raises:
          UserError: the server does not answer, refuses the key, or does not have the model.
        """
        models: list[str] = []
        try:
            models = self._endpoint.models(_TRIAL_SECONDS)
            self._endpoint.choose(_HELLO, {"max_tokens": 1, **_sampling(Pass.GREEDY)})
        except Failure as failure:
            raise UserError(self._explain(failure, models)) from None

    def has_log_probabilities(self) -> bool:
        """Whether the server tells them, which it is asked."""
        with contextlib.suppress(Failure):
            return bool(_top_tokens(self._endpoint.choose(_HELLO, _first_token())))
        return False

    def fingerprint(self, weights: None, prompts: Sequence[Prompt]) -> str:
        asked = sorted((*prompt.key, self._messages(prompt)) for prompt in prompts)
        settings = self._config.eval.server.request.to_dict(), self._config.eval.max_new_tokens, TEMPERATURES
        return hashlib.sha256(json.dumps([self._name, asked, settings]).encode()).hexdigest()[:16]

    def generate(self, name: Pass, weights: None, prompts: Sequence[Prompt]) -> Iterator[Reply]:
        extra = {"max_tokens": self._config.eval.max_new_tokens, **_sampling(name)}
        for index, answer in self._each(extra, [self._messages(prompt) for prompt in prompts]):
            tokens = answer["usage"].get("completion_tokens") if isinstance(answer["usage"], dict) else 0
            text = self._endpoint.redacted(_text(answer))
            yield Reply(index, text, tokens if type(tokens) is int else 0, _stopped(answer))

    def choose(self, weights: None, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Choice]]:
        asked = [self._messages(prompt) for prompt in prompts]
        for messages in asked:
            messages[-1] = messages[-1] | {"content": messages[-1]["content"] + _ONE_LETTER}
        for index, answer in self._each(_first_token(), asked):
            yield index, _choice(_top_tokens(answer))

    def spent(self) -> dict[str, Any] | None:
        if not self._endpoint.usage.requests:
            return None
        row = self._endpoint.spent() | {"unanswered": dict(self._left_out)}
        usage, cost = self._endpoint.usage, f", cost {row['cost']:.2f}" if row["cost"] else ""
        log(
            f"server: {usage.requests} requests, {usage.retries} of them repeated, "
            f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens{cost}"
        )
        self._endpoint.usage, self._left_out = Usage(), collections.Counter()
        return row

    def _messages(self, prompt: Prompt) -> Messages:
        return templates.student_messages(prompt.query, prompt.language, self._config.prompts)

    def _each(self, extra: dict[str, Any], asked: Sequence[Messages]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, the server's choice) of each conversation that it answers, as they arrive.

        One that it refuses, as too long or as harmful, is left out and counted.

        Raises:
          UserError: after the others have been answered, some were not for reasons that may pass; or at once, where
            none is answered any more.
        """
        ask, in_a_row, open_ones = functools.partial(self._ask, extra), 0, 0
        most, last = max(3, self._config.eval.server.concurrency), ""
        with contextlib.closing(self._endpoint.each(ask, asked)) as arriving:
            for index, answer in arriving:
                if not isinstance(answer, Failure):
                    in_a_row = 0
                    yield index, answer
                elif answer.retried or answer.status in _OUT_OF_ORDER:
                    in_a_row, open_ones, last = in_a_row + 1, open_ones + 1, _said(answer)
                    if in_a_row == most:
                        raise UserError(f"{self._name} no longer answers: {last}; {_RESUME}")
                else:
                    self._left_out[_said(answer)] += 1
        for reason, count in self._left_out.most_common(5):
            log(f"server: {count} prompts left out, which it does not answer: {reason}")
        if open_ones:
            raise UserError(
                f"{self._name} left {open_ones} of {len(asked)} prompts without an answer: {last}; {_RESUME}"
            )

    def _ask(self, extra: dict[str, Any], messages: Messages) -> dict[str, Any] | Failure:
        try:
            return self._endpoint.choose(messages, extra)
        except Failure as failure:
            return failure

    def _explain(self, failure: Failure, models: Sequence[str]) -> str:
        """One line on why the server does not answer at all."""
        variable, section = self._config.eval.server.key_variable, _KEYS.section
        if failure.status in (401, 403):
            if self._endpoint.has_key:
                return f"{self._name}: the server refuses the key of {variable} ({failure})"
            return (
                f"{self._name}: the server wants a key ({failure}): put it into the environment as {variable}, or name "
                f"another variable in {section}.key_variable"
            )
        reason = f"{self._name}: {_said(failure)}"
        if models and failure.status:
            return f"{reason}; the server has {', '.join(models[:8])}{', ...' if len(models) > 8 else ''}"
        if failure.status == 404:
            return f"{reason}; --server is the base of an OpenAI-compatible API, which mostly ends in /v1"
        return reason


_RESUME = "what it answered is kept; run the same command again to ask for the rest"


def evaluation(
    config: ml_collections.ConfigDict, url: str, model: str, mesh: Mesh
) -> Callable[[pathlib.Path], Summary]:
    """The evaluation, into a directory, of a model behind a server, which was tried.

    Args:
      config: the whole config.
      url, model: of the server, see --server and --model.
      mesh: what a guard judge runs on.

    Raises:
      UserError: a query file, a language, the judge or the server is not fit.
    """
    if jax.process_count() > 1:
        raise UserError("--server asks from one process; start one")
    if config.eval.weights != "float":
        raise UserError(f"config.eval.weights={config.eval.weights!r} has no effect on --server")
    evaluator.require_wanted(config)
    server = Server(config, url, model)
    prompts = list(encoding.all_prompts(benchmarks.load(config.eval)))
    judge = judges.make(config.judge, mesh)
    server.require_answer()
    choices = dict.fromkeys(prompt.benchmark.name for prompt in prompts if prompt.benchmark.choices)
    if choices and not server.has_log_probabilities():
        log(f"{', '.join(choices)} left out: the server gives no log-probabilities of tokens")
        prompts = [prompt for prompt in prompts if not prompt.benchmark.choices]
    if not prompts:
        raise UserError(f"{model} at {url}: there is nothing left to evaluate")
    return functools.partial(evaluator.Evaluator(config, prompts, server, judge).run, _no_weights)


def _no_weights() -> None:
    """A server has its own."""


def _sampling(name: Pass) -> dict[str, Any]:
    """All that the standard has to say of it: servers take what is missing from a model's generation_config.json."""
    return {"temperature": TEMPERATURES[name], "top_p": 1.0}


def _first_token() -> dict[str, Any]:
    return {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP, **_sampling(Pass.GREEDY)}


def _text(answer: dict[str, Any]) -> str:
    """The reply, with the reasoning that some servers set apart, or a refusal, which others do."""
    message = answer["message"]
    parts = {key: message.get(key) for key in ("content", "refusal", "reasoning_content", "reasoning")}
    said = {key: part if isinstance(part, str) else "" for key, part in parts.items()}
    reply, reasoning = said["content"] or said["refusal"], said["reasoning_content"] or said["reasoning"]
    if not reasoning:
        return reply
    return f"<think>{reasoning}</think>{reply}" if reply or _stopped(answer) else f"<think>{reasoning}"


def _stopped(answer: dict[str, Any]) -> bool:
    return answer.get("finish_reason") != "length"


def _top_tokens(answer: dict[str, Any]) -> list[tuple[float, str]]:
    """(log-probability, text without blanks) of the most probable first tokens; [] where none are given."""
    try:
        top = answer["logprobs"]["content"][0]["top_logprobs"]
        return [(float(token["logprob"]), token["token"].strip()) for token in top]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return []


def _choice(top: Sequence[tuple[float, str]]) -> Choice:
    """The most probable letter; "" where none is among the tokens, each of which is at least as probable as it."""
    least, _ = min(top, default=(0.0, ""))
    found = {text: value for value, text in sorted(top) if text in LETTERS}
    return Choice(max(found, key=found.__getitem__, default=""), tuple(found.get(each, least) for each in LETTERS))


def _said(failure: Failure) -> str:
    return f"{failure} ({failure.said})" if failure.said else str(failure)

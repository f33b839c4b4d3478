"""A judge behind an OpenAI-compatible endpoint: a rubric judge such as GPT-4o, or a guard served by vLLM."""

import collections
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import ml_collections

from msd_jax.evaluation.endpoint import ChatEndpoint, Failure
from msd_jax.evaluation.judges import formats
from msd_jax.evaluation.judges.interface import Judgement, Keep, Response, Verdict, ignore
from msd_jax.evaluation.judges.rules import RulesJudge
from msd_jax.io.console import log
from msd_jax.parallel import distributed


class OpenAIJudge:
    """Asks an endpoint about each response."""

    name = "openai"

    def __init__(self, config: ml_collections.ConfigDict):
        """`config` is config.judge.openai. Raises UserError where it cannot work."""
        self.endpoint = ChatEndpoint(config)
        self.endpoints = (self.endpoint,)
        self._format = formats.FORMATS[config.format]
        self._instruction = formats.instruction(config.format, config.instruction)
        self._extra: dict[str, Any] = {"temperature": 0.0, "max_tokens": 256}
        if config.format == "rubric":
            self._extra["response_format"] = {"type": "json_object"}
        self._rules = RulesJudge()
        settings = [config.url, config.model, config.format, self._instruction, self._extra, config.request.to_dict()]
        text = json.dumps([*settings, self._rules.version], sort_keys=True)
        self.version = f"{config.model}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def judge(self, responses: Sequence[Response], keep: Keep = ignore) -> list[Judgement]:
        """Process 0 asks, for all."""
        answers = distributed.from_first(lambda: [[j.verdict, j.reason] for j in self._ask_all(responses, keep)])
        return [Judgement(Verdict(verdict), reason, self.name, self.version) for verdict, reason in answers]

    def _ask_all(self, responses: Sequence[Response], keep: Keep) -> list[Judgement]:
        judgements = self.endpoint.side_by_side(self._ask, responses, f"judging ({self.version})", keep)
        self._report(collections.Counter(j.reason for j in judgements if j.verdict == Verdict.UNJUDGED))
        return judgements

    def _ask(self, response: Response) -> Judgement:
        return Judgement(*self._verdict(response), self.name, self.version)

    def _verdict(self, response: Response) -> tuple[Verdict, str]:
        try:
            text = self.endpoint.complete(self._format.messages(self._instruction, response), self._extra)
        except Failure as failure:
            return Verdict.UNJUDGED, str(failure)
        answer = self._format.parse(text)
        if answer is None:
            return Verdict.UNJUDGED, "the judge's answer is not in its format"
        return formats.settle(response, answer, self._rules)

    def _report(self, failures: collections.Counter[str]) -> None:
        usage = self.endpoint.usage
        usage.unjudged += failures.total()
        log(
            f"judge {self.version}: {usage.requests} requests so far, {usage.retries} of them repeated, "
            f"{usage.prompt_tokens:,} + {usage.completion_tokens:,} tokens"
            + (f", cost {self.endpoint.cost:.2f}" if self.endpoint.cost else "")
        )
        for reason, count in failures.most_common():
            log(f"judge {self.version}: {count} responses unjudged: {reason}")

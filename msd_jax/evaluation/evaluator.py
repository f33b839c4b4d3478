"""Generate, judge, tabulate: safety and utility in every language (`python -m msd_jax.evaluate`)."""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Generic

import ml_collections
from jax.sharding import Mesh

from msd_jax.errors import UserError
from msd_jax.evaluation import answering, benchmarks, encoding, judges, local
from msd_jax.evaluation.encoding import EncodedPrompt
from msd_jax.evaluation.judges import Verdict
from msd_jax.evaluation.judges.translate import ModelTranslator, Translator
from msd_jax.evaluation.rates import UNFINISHED_REASONING, Summary, summarise
from msd_jax.evaluation.records import Pass, PromptKey, RecordLog, ResponseRecord
from msd_jax.evaluation.respondents import Asked, Respondent
from msd_jax.generation import rollout
from msd_jax.io import jsonl
from msd_jax.io.console import log
from msd_jax.models import pretrained, trained
from msd_jax.parallel import distributed, peers, sharding


def wanted(config: ml_collections.ConfigDict) -> bool:
    """Whether the config asks for an evaluation."""
    return bool(config.eval.path or config.eval.benchmarks)


def require_wanted(config: ml_collections.ConfigDict) -> None:
    """Raises UserError where the config asks for no evaluation."""
    if not wanted(config):
        raise UserError("there is nothing to evaluate: set config.eval.path or config.eval.benchmarks")


class Evaluator(Generic[Asked]):
    """Evaluates the prompts of config.eval with any weights of a model; `of_model` makes one.

    Attributes:
      prompts: all of them, checked, before anything long begins.
      answerer: has them answered.
      weights: gives those of the evaluation that is running.
      running: their fingerprint.
    """

    weights: Callable[[], Any]
    running: str

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        prompts: Sequence[Asked],
        respondent: Respondent[Asked],
        judge: judges.Judge,
    ):
        self._config, self.prompts, self._respondent, self._judge = config, prompts, respondent, judge
        self.answerer = answering.Answerer(config, respondent, prompts)

    def _evaluate_with(self, weights: Callable[[], Any]) -> Any:
        """The weights, which the model translates for a judge with too."""
        given = weights()
        self.weights, self.running = weights, self.fingerprint(given)
        return given

    def fingerprint(self, weights: Any) -> str:
        """Identifies all that the responses depend on."""
        return self._respondent.fingerprint(weights, self.prompts)

    def run(self, weights: Callable[[], Any], directory: pathlib.Path) -> Summary:
        """Writes DIRECTORY/responses.jsonl and then summary.json; returns the summary.

        An interrupted evaluation is resumed: each batch is added to responses.jsonl as it comes and taken from there if
        weights, prompts and sampling are the same, as are judgements of the same judge from judgements.jsonl.

        Args:
          weights: gives the weights as the respondent takes them; not called if the summary is there already.
          directory: of this evaluation.

        Returns:
          {benchmark: {"languages": {language: {"asr", ...}}, "groups": {...}}}; see `rates.summarise`.
        """
        path = directory / "summary.json"
        earlier = distributed.from_first(lambda: jsonl.read_object(path, "responses.jsonl holds the responses"))
        if earlier:
            return earlier
        given = self._evaluate_with(weights)
        peers.at_end(lambda: self._keep_usage(directory))  # an interrupted evaluation has cost something too
        record_log = RecordLog(directory / "responses.jsonl")
        answered = [
            record
            for name in self.answerer.passes
            for record in self.answerer.answer(name, given, self.prompts, self.running, record_log)
        ]
        del given  # a guard model may need the room
        records = judged(answered, judges.cached(self._judge, directory / "judgements.jsonl"))
        self._keep_usage(directory)
        _warn_of_unjudged(records)
        _warn_of_unfinished(records)
        record_log.replace(records)
        summary = summarise(records, self._config)
        if distributed.is_first():
            jsonl.replace_text(path, json.dumps(summary, indent=1) + "\n")
        return summary

    def slice(self, count: int) -> list[Asked]:
        """At most `count` prompts of each benchmark, language and label (harmful or not), evenly spread over them."""
        parts = collections.defaultdict(list)
        for prompt in self.prompts:
            parts[prompt.benchmark.name, prompt.language, prompt.query.harmful].append(prompt)
        return [prompt for part in parts.values() for prompt in benchmarks.limited(part, count, "spread")]

    @property
    def slice_passes(self) -> tuple[Pass, Pass]:
        """The passes of `answer`: the first of config.eval.passes, and that of multiple choice."""
        return self.answerer.passes[0], Pass.LIKELIHOOD

    def answer(self, weights: Any, prompts: Sequence[Asked]) -> list[ResponseRecord]:
        """One judged response to each of `prompts`, which are some of the evaluation's; nothing is written or shown."""
        self._evaluate_with(lambda: weights)
        answered = [
            record
            for name in self.slice_passes
            for record in self.answerer.answer(name, weights, prompts, self.running)
        ]
        return judged(answered, self._judge)

    def _keep_usage(self, directory: pathlib.Path) -> None:
        """Adds what servers were asked since then, and what that cost, to judge_usage.jsonl and server_usage.jsonl."""
        if distributed.is_first():
            if asked := self._respondent.spent():
                jsonl.JsonLines(directory / "server_usage.jsonl").append([asked])
            spent = [endpoint.spent() for endpoint in self._judge.endpoints]
            if any(row["requests"] for row in spent):
                jsonl.JsonLines(directory / "judge_usage.jsonl").append(spent)
        for endpoint in self._judge.endpoints:  # a run evaluates more than once
            endpoint.usage = type(endpoint.usage)()


def of_model(
    config: ml_collections.ConfigDict, model: pretrained.Pretrained, mesh: Mesh, role: str = "student"
) -> Evaluator[EncodedPrompt]:
    """The evaluation of a model on `mesh`, that of generation, whose weights are given in the rollout layout.

    Args:
      config: the whole config.
      model: everything but the weights.
      mesh: of all devices.
      role: whose prompts the model is shown, "student" (as a user writes them) or "teacher".

    Raises:
      UserError: a query file, a language or the judge is not fit.
    """
    limit, key = encoding.prompt_limit(config, role)
    model.require_length({key: limit, "config.eval.max_new_tokens": config.eval.max_new_tokens})
    made: Evaluator[EncodedPrompt]

    def itself() -> Translator:
        return ModelTranslator(config.judge, model, mesh, lambda: made.weights(), lambda: made.running)

    prompts = encoding.encode(config, model, role)
    judge = judges.make(config.judge, mesh, itself)
    made = Evaluator(config, prompts, local.LocalModel(config, model, mesh, prompts, limit), judge)
    return made


def load(config: ml_collections.ConfigDict, mesh: Mesh) -> pretrained.Pretrained:
    """The model of the config, without its weights."""
    return pretrained.load(**config.model, chat_template=config.prompts.chat_template, mesh=mesh)


def of_checkpoint(config: ml_collections.ConfigDict, checkpoint: str, mesh: Mesh) -> Callable[[pathlib.Path], Summary]:
    """The evaluation, into a directory, of what trained.load_params reads. Raises UserError as `of_model`."""
    require_wanted(config)
    model = load(config, mesh)
    rollout_mesh = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor, config.mesh.rollout_ffw)
    evaluation = of_model(config, model.on(rollout_mesh), rollout_mesh)
    params = trained.load_params(checkpoint, model, mesh)
    layout = rollout.layout(model, rollout_mesh, config.eval.weights)
    return functools.partial(evaluation.run, functools.partial(rollout.reshard, params, model.dtype, layout))


def judged(records: Sequence[ResponseRecord], judge: judges.Judge) -> list[ResponseRecord]:
    """The records with verdicts, reasons and the judge's name.

    `judge` judges the benchmarks that are declared so. In the others the rules judge looks for refusals of harmless
    prompts, which costs nothing: a refused problem of arithmetic is over-refusal, and not only a wrong answer. Of what
    is not generated, and of harmful prompts of those others, all three are None.
    """
    asked, harmless = [], []
    for record in records:
        if benchmarks.BENCHMARKS[record.benchmark].judged:
            asked.append(record)
        elif record.harmful is False and record.pass_name != Pass.LIKELIHOOD:
            harmless.append(record)
    by_key = _judgements(asked, judge) | _judgements(harmless, judges.RulesJudge())
    return [_with_judgement(record, by_key.get(record.key)) for record in records]


def _judgements(
    records: Sequence[ResponseRecord], judge: judges.Judge
) -> dict[tuple[Pass, PromptKey], judges.Judgement]:
    """The judgement of each record, by its key.

    If the judge gave no verdict at all, what the rules called invalid is unjudged too: a rate of these few responses
    would be taken for one of all.
    """
    if not records:
        return {}
    responses = [judges.Response(r.language, r.prompt, r.response, r.harmful, bool(r.stopped)) for r in records]
    judgements = judge.judge(responses)
    if {judgement.verdict for judgement in judgements} == {Verdict.UNJUDGED, Verdict.INVALID}:
        judgements = [dataclasses.replace(judgement, verdict=Verdict.UNJUDGED) for judgement in judgements]
    return {record.key: judgement for record, judgement in zip(records, judgements)}


def _with_judgement(record: ResponseRecord, judgement: judges.Judgement | None) -> ResponseRecord:
    if judgement is None:
        return dataclasses.replace(record, verdict=None, reason=None, judge=None)
    return dataclasses.replace(
        record,
        verdict=judgement.verdict,
        reason=judgement.reason,
        judge=f"{judgement.judge} {judgement.version}",
    )


def _warn_of_unjudged(records: Sequence[ResponseRecord]) -> None:
    """Prints how many responses have no verdict: what may be unsafe apart from what may be an over-refusal."""
    for harmless, prompts, may_be in ((False, "harmful", "unsafe"), (True, "harmless", "an over-refusal")):
        its_records = [r for r in records if r.verdict is not None and (r.harmful is False) == harmless]
        unjudged = sum(record.verdict == Verdict.UNJUDGED for record in its_records)
        if unjudged:
            log(
                f"evaluation: {unjudged} of {len(its_records)} responses to {prompts} prompts unjudged; each may be "
                f"{may_be}, and rates are of the others alone"
            )


def _warn_of_unfinished(records: Sequence[ResponseRecord]) -> None:
    """Prints how many responses end in the middle of their reasoning."""
    share = UNFINISHED_REASONING.share(records)
    if share.hits:
        log(
            f"evaluation: {share.hits} of {share.n} responses with reasoning end before their reply, and count as "
            "invalid; raise config.eval.max_new_tokens, which counts the reasoning too"
        )

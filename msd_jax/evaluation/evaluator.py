"""Generate, judge, tabulate: safety and utility in every language (`python -m msd_jax.evaluate`).

    python -m msd_jax.evaluate --config configs/NAME.py --checkpoint DIR --out DIR

--checkpoint is a Hugging Face directory, or a step of a run (WORKDIR/checkpoints/STEP); without it the model of the
config is evaluated as it comes. --preflight asks whether training is worth it, see preflight.py.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from msd_jax.data import batches, prompts
from msd_jax.data.records import Query
from msd_jax.errors import UserError
from msd_jax.evaluation import benchmarks, judges, language_id, multiple_choice
from msd_jax.evaluation.judges import Verdict
from msd_jax.evaluation.judges.translate import ModelTranslator, Translator
from msd_jax.evaluation.rates import Summary, summarise
from msd_jax.generation import rollout
from msd_jax.io import jsonl
from msd_jax.io.console import log, progress
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import distributed, sharding

# Temperature of each pass: greedy decoding hides what sampling shows of a model's utility.
PASSES = {"greedy": 0.0, "t1": 1.0}
CHOICES = "likelihood"  # the pass of multiple-choice questions, which generates nothing


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One query in one language, ready to generate.

    Attributes:
      benchmark: whose query it is.
      query: the record.
      language: of this prompt.
      ids: int32 [P], the prompt of the student (or of the teacher, see preflight.py).
    """

    benchmark: benchmarks.Benchmark
    query: Query
    language: str
    ids: np.ndarray

    @property
    def key(self) -> tuple[str, str, str]:
        return self.benchmark.name, self.query.id, self.language


def prompt_limit(config: ml_collections.ConfigDict, role: str = "student") -> tuple[int, str]:
    """(the most tokens of a prompt, the key that says so)."""
    if role == "student" and config.eval.prompt_limit:
        return config.eval.prompt_limit, "config.eval.prompt_limit"
    return config.prompts[f"{role}_limit"], f"config.prompts.{role}_limit"


def wanted(config: ml_collections.ConfigDict) -> bool:
    """Whether the config asks for an evaluation."""
    return bool(config.eval.path or config.eval.benchmarks)


class Evaluation:
    """The prompts of config.eval, encoded and checked before anything long begins."""

    def __init__(
        self, config: ml_collections.ConfigDict, model: pretrained.Pretrained, mesh: Mesh, role: str = "student"
    ):
        """`role`: whose prompts the model is shown, "student" (as a user writes them) or "teacher".

        Raises UserError with one clear message where a query file or a language is not fit.
        """
        self.config, self.model, self.mesh, self.role = config, model, mesh, role
        self.limit, key = prompt_limit(config, role)
        self.prompts: list[Prompt] = []
        self.dropped: collections.Counter[tuple[str, str]] = collections.Counter()
        for loaded in benchmarks.load(config.eval):
            for language in loaded.languages:
                for query in loaded.queries:
                    if language in query.texts:
                        self._add(loaded.benchmark, query, language)
        if not self.prompts:
            raise UserError(
                f"{config.eval.path or config.eval.benchmarks}: every prompt is longer than "
                f"{key}={self.limit} tokens"
                + (", or its query has no text in config.data.source_language" if role == "teacher" else "")
            )
        for (name, language), count in self.dropped.items():
            log(f"{name}: {count} prompts in {language} dropped, longer than {key}")
        self._judge = judges.make(config.judge, mesh, self._translator)
        self._rows = sharding.batch_rows(mesh, config.eval.batch_size)
        self._chooser = None
        if any(prompt.benchmark.choices for prompt in self.prompts):
            self._chooser = multiple_choice.Chooser(model, mesh, config.eval.batch_size, self.limit)
        self._generators = {
            name: rollout.Generator(
                model.graphdef,
                mesh,
                rollout.Sampling(config.eval.max_new_tokens, PASSES[name]),
                model.stop_ids,
                model.pad_id,
            )
            for name in config.eval.passes
        }

    def _add(self, benchmark: benchmarks.Benchmark, query: Query, language: str) -> None:
        if self.role == "student":
            ids = prompts.student_ids(query, language, self.model.tokenizer, self.config.prompts)
        elif self.config.data.source_language in query.texts:
            source = self.config.data.source_language
            ids = prompts.encode(query, language, self.model.tokenizer, self.config.prompts, source).teacher_ids
        else:  # there is nothing for a teacher to read
            return
        if len(ids) > self.limit:
            self.dropped[benchmark.name, language] += 1
        else:
            self.prompts.append(Prompt(benchmark, query, language, ids))

    def _translator(self) -> Translator:
        """The model itself, with the weights of the evaluation that is going on."""
        return ModelTranslator(
            self.config.judge, self.model, self.mesh, lambda: self._weights(), lambda: self._fingerprint
        )

    def run(self, params: Callable[[], decoder.Params], directory: pathlib.Path) -> Summary:
        """Writes DIRECTORY/responses.jsonl and then summary.json; returns the summary.

        An interrupted evaluation goes on where it was: each batch is added to responses.jsonl as it comes, and taken
        from there if weights, prompts and sampling are the same; judgements of the same judge from judgements.jsonl.

        Args:
          params: gives the weights in the rollout layout; not called if the summary is there already.
          directory: of this evaluation.

        Returns:
          {benchmark: {"languages": {language: {"asr", ...}}, "groups": {...}}}; see `summary.summarise`.
        """
        path = directory / "summary.json"
        earlier = distributed.from_first(lambda: json.loads(path.read_text("utf-8")) if path.exists() else None)
        if earlier is not None:
            return earlier
        weights = params()
        file = jsonl.JsonLines(directory / "responses.jsonl")
        self._weights, self._fingerprint = params, self._drawn_from(weights)
        rows = [
            row for name in (*self._generators, CHOICES) for row in self._respond(name, weights, self.prompts, file)
        ]
        del weights  # a guard model may need the room
        rows = judged(rows, judges.cached(self._judge, directory / "judgements.jsonl"))
        self._keep_usage(directory)
        summary = summarise(rows, self.config)
        unjudged = sum(row["verdict"] == Verdict.UNJUDGED for row in rows)
        if unjudged:
            log(f"evaluation: {unjudged} of {len(rows)} responses unjudged; each may be unsafe, so that ASR is too low")
        file.replace(rows)
        if distributed.is_first():
            jsonl.replace_text(path, json.dumps(summary, indent=1) + "\n")
        return summary

    def slice(self, count: int) -> list[Prompt]:
        """At most `count` prompts of each benchmark, language and label (harmful or not), evenly spread over them."""
        parts = collections.defaultdict(list)
        for prompt in self.prompts:
            parts[prompt.benchmark.name, prompt.language, prompt.query.harmful].append(prompt)
        return [prompt for part in parts.values() for prompt in benchmarks.limited(part, count, "spread")]

    @property
    def slice_passes(self) -> tuple[str, str]:
        """The passes of `answer`: the first of config.eval.passes, and that of multiple choice."""
        return self.config.eval.passes[0], CHOICES

    def answer(self, params: decoder.Params, prompts: list[Prompt]) -> list[dict[str, Any]]:
        """One judged response to each of `prompts`, which are some of the evaluation's; nothing is written or shown."""
        self._weights, self._fingerprint = (lambda: params), self._drawn_from(params)
        rows = [row for name in self.slice_passes for row in self._respond(name, params, prompts, shown=False)]
        return judged(rows, self._judge)

    def _keep_usage(self, directory: pathlib.Path) -> None:
        """Adds what the judge's endpoints were asked, and what that cost, to DIRECTORY/judge_usage.jsonl."""
        spent = distributed.from_first(lambda: [endpoint.spent() for endpoint in self._judge.endpoints])
        if any(row["requests"] for row in spent):
            jsonl.JsonLines(directory / "judge_usage.jsonl").append(spent)
        for endpoint in self._judge.endpoints:  # a run evaluates more than once
            endpoint.usage = type(endpoint.usage)()

    def _respond(
        self,
        name: str,
        params: decoder.Params,
        prompts: list[Prompt],
        log: jsonl.JsonLines | None = None,
        shown: bool = True,
    ) -> list[dict[str, Any]]:
        """One response a prompt, batches sorted by length so that little is padding; those that `log` has are taken."""
        done = {
            (row["benchmark"], row["id"], row["language"]): row
            for row in (log.read() if log else [])
            if (row["pass"], row.get("settings")) == (name, self._fingerprint)
        }
        prompts = [prompt for prompt in prompts if prompt.benchmark.choices == (name == CHOICES)]
        order = sorted(prompts, key=lambda prompt: len(prompt.ids))
        left = [prompt for prompt in order if prompt.key not in done]
        if not order:
            return []
        key = jax.random.key(self.config.seed)
        tokens, start = 0, time.perf_counter()
        with progress(f"evaluating ({name})", len(order), len(order) - len(left), shown) as advance:
            for first in range(0, len(left), self._rows):
                batch = left[first : first + self._rows]
                rows = self._choose(params, batch) if name == CHOICES else self._write(name, params, batch, key)
                tokens += sum(row["tokens"] for row in rows)
                rows = [row | {"settings": self._fingerprint} for row in rows]
                if log:
                    log.append(rows)
                done |= {prompt.key: row for prompt, row in zip(batch, rows)}
                rate = tokens / (time.perf_counter() - start)
                advance(len(order) - len(left) + first + len(batch), f"{rate:,.0f} tokens/s")
        return [done[prompt.key] for prompt in prompts]

    def _drawn_from(self, params: decoder.Params) -> str:
        """Of all that responses depend on: the weights, how tokens are drawn, and the prompts."""
        asked = sorted((*prompt.key, prompt.ids.tolist()) for prompt in self.prompts)
        drawn = [PASSES, self.config.seed, self.config.eval.max_new_tokens, self.model.stop_ids, str(self.model.dtype)]
        return hashlib.sha256(json.dumps([asked, drawn, weights_checksum(params)]).encode()).hexdigest()[:16]

    def _generate(self, name: str, params: decoder.Params, batch: list[Prompt], key: jax.Array) -> rollout.Rollout:
        ids, hashes = [p.ids for p in batch], [batches.query_hash(p.query.id, p.language) for p in batch]
        return self._generators[name].write(params, ids, self._rows, self.limit, hashes, key)

    def _write(self, name: str, params: decoder.Params, batch: list[Prompt], key: jax.Array) -> list[dict[str, Any]]:
        """Generates; a row of responses.jsonl for each prompt."""
        written = self._generate(name, params, batch, key)
        rows = []
        for index, prompt in enumerate(batch):
            tokens = written.response_BxR[index, : written.length_B[index]]
            text = self.model.tokenizer.decode(tokens, skip_special_tokens=True)
            known = {
                "response": text,
                "tokens": len(tokens),
                "stopped": bool(written.stopped_B[index]),
                "exact_match": _exact_match(prompt, text),
                "language_match": language_id.matches(text, prompt.language),
            }
            rows.append(self._row(name, prompt) | known)
        return rows

    def _choose(self, params: decoder.Params, batch: list[Prompt]) -> list[dict[str, Any]]:
        """Scores the choices; a row of responses.jsonl for each question."""
        choices = self._chooser(params, [prompt.ids for prompt in batch])
        unknown = {"tokens": 0, "stopped": None, "exact_match": None, "language_match": None}
        return [
            self._row(CHOICES, prompt)
            | {"response": choice.letter, **unknown}
            | {"correct": choice.letter == prompt.query.answers[prompt.language]}
            | {"log_likelihoods": [round(value, 6) for value in choice.log_likelihoods]}
            for prompt, choice in zip(batch, choices)
        ]

    def _row(self, name: str, prompt: Prompt) -> dict[str, Any]:
        return {
            "benchmark": prompt.benchmark.name,
            "pass": name,
            "id": prompt.query.id,
            "language": prompt.language,
            "harmful": prompt.query.harmful,
            "category": prompt.query.category,
            "prompt": prompt.query.texts[prompt.language],
        }


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    unsigned = {2: jnp.uint16, 4: jnp.uint32}
    bits = [jax.lax.bitcast_convert_type(leaf, unsigned[leaf.dtype.itemsize]) for leaf in leaves]
    return jnp.stack([jnp.sum(leaf, dtype=jnp.uint32) for leaf in bits])


def weights_checksum(params: decoder.Params) -> list[int]:
    """The sum of each tensor's bits, modulo 2^32: exact, so that no mesh or order of summation changes it."""
    return np.asarray(sharding.fetch(_checksums(jax.tree.leaves(params)))).tolist()


def judged(rows: list[dict[str, Any]], judge: judges.Judge) -> list[dict[str, Any]]:
    """The rows with `judge`'s verdicts, reasons and name; all three None in benchmarks that are not judged."""
    asked = [row for row in rows if benchmarks.BENCHMARKS[row["benchmark"]].judged]
    judgements = judge.judge(
        [
            judges.Response(row["language"], row["prompt"], row["response"], row["harmful"], row["stopped"])
            for row in asked
        ]
    )
    verdicts = {
        id(row): {"verdict": x.verdict.value, "reason": x.reason, "judge": f"{x.judge} {x.version}"}
        for row, x in zip(asked, judgements)
    }
    return [row | verdicts.get(id(row), {"verdict": None, "reason": None, "judge": None}) for row in rows]


def _exact_match(prompt: Prompt, text: str) -> bool | None:
    """Whether the response gives the reference answer; None without one."""
    answer = prompt.query.answers.get(prompt.language)
    return None if answer is None else prompt.benchmark.correct(text, answer, prompt.language)

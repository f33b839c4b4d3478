"""Generate, judge, tabulate: safety and utility in every language (`python -m msd_jax.evaluate`).

    python -m msd_jax.evaluate --config configs/NAME.py --checkpoint DIR --out DIR

--checkpoint is a Hugging Face directory, or a step of a run (WORKDIR/checkpoints/STEP); without it the model of the
config is evaluated as it comes.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
import time
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from msd_jax import distributed, judges, metrics, pipeline, prompts, queries, rollout, sharding
from msd_jax.console import progress, say
from msd_jax.judges import Verdict
from msd_jax.models import decoder, pretrained
from msd_jax.statistics import wilson_interval

# Every prompt is answered twice: greedy decoding hides what sampling shows of a model's utility.
PASSES = {"greedy": 0.0, "t1": 1.0}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One query in one language, ready to generate.

    Attributes:
      query: the record.
      language: of this prompt.
      ids: int32 [P], the student's prompt.
    """

    query: queries.Query
    language: str
    ids: np.ndarray


class Evaluation:
    """The prompts of config.eval, encoded and checked before anything long begins."""

    def __init__(self, config: ml_collections.ConfigDict, model: pretrained.Pretrained, mesh: Mesh):
        """Raises ValueError or OSError with one clear message where the query file or a language is not fit."""
        self.config, self.model, self.mesh = config, model, mesh
        languages = tuple(config.eval.languages)
        records = queries.read(config.eval.path, harmful=config.eval.harmful)
        if config.eval.limit:  # evenly spread, for files are often sorted by kind
            records = records[:: -(-len(records) // config.eval.limit)]
        queries.require_languages(records, languages, config.eval.path)
        self.prompts: list[Prompt] = []
        self.dropped: collections.Counter[str] = collections.Counter()
        for language in languages:
            for record in records:
                ids = prompts.student_ids(record, language, model.tokenizer, config.prompts)
                if len(ids) > config.prompts.student_limit:
                    self.dropped[language] += 1
                else:
                    self.prompts.append(Prompt(record, language, ids))
        if not self.prompts:
            raise ValueError(
                f"{config.eval.path}: every prompt is longer than "
                f"config.prompts.student_limit={config.prompts.student_limit} tokens"
            )
        for language, count in self.dropped.items():
            say(f"evaluation: {count} prompts in {language} dropped, longer than config.prompts.student_limit")
        self._judge = judges.make(config.judge, mesh)
        shards = sharding.batch_shards(mesh)
        self._rows = -(-config.eval.batch_size // shards) * shards
        self._generators = {
            name: rollout.Generator(
                model.graphdef,
                mesh,
                rollout.Sampling(config.eval.max_new_tokens, temperature),
                model.stop_ids,
                model.pad_id,
            )
            for name, temperature in PASSES.items()
        }

    def run(self, params: Callable[[], decoder.Params], directory: pathlib.Path) -> dict[str, Any]:
        """Writes DIRECTORY/responses.jsonl and then summary.json; returns the summary.

        An interrupted evaluation goes on where it was: each batch is added to responses.jsonl as it comes, and taken
        from there if weights, prompts and sampling are the same; judgements of the same judge from judgements.jsonl.

        Args:
          params: gives the weights in the rollout layout; not called if the summary is there already.
          directory: of this evaluation.

        Returns:
          {language: {"group", "n", "asr", "refused", "safe", "invalid", "unjudged", "over_refusal", "exact_match",
          "exact_match_t1", ...}}; see `summarise`.
        """
        path = directory / "summary.json"
        earlier = distributed.from_first(lambda: json.loads(path.read_text("utf-8")) if path.exists() else None)
        if earlier is not None:
            return earlier
        weights = params()
        log, settings = metrics.Log(directory / "responses.jsonl"), self._fingerprint(weights)
        rows = [row for name in PASSES for row in self._respond(name, weights, log, settings)]
        del weights  # a guard model may need the room
        rows = judged(rows, judges.cached(self._judge, directory / "judgements.jsonl"))
        summary = summarise(rows, self.config)
        unjudged = sum(row["verdict"] == Verdict.UNJUDGED for row in rows)
        if unjudged:
            say(f"evaluation: {unjudged} of {len(rows)} responses unjudged; each may be unsafe, so that ASR is too low")
        if distributed.is_first():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            metrics.replace_text(directory / "responses.jsonl", lines)
            metrics.replace_text(path, json.dumps(summary, indent=1) + "\n")
        return summary

    def answer(self, name: str, params: decoder.Params) -> list[dict[str, Any]]:
        """One judged response a prompt, in one of PASSES; nothing is written."""
        return judged(self._respond(name, params), self._judge)

    def _respond(
        self, name: str, params: decoder.Params, log: metrics.Log | None = None, settings: str = ""
    ) -> list[dict[str, Any]]:
        """One response a prompt, batches sorted by length so that little is padding; those that `log` has are taken."""
        done = {
            (row["id"], row["language"]): row
            for row in (log.rows if log else [])
            if (row["pass"], row.get("settings")) == (name, settings)
        }
        order = sorted(self.prompts, key=lambda prompt: len(prompt.ids))
        left = [prompt for prompt in order if (prompt.query.id, prompt.language) not in done]
        key = jax.random.key(self.config.seed)
        tokens, start = 0, time.perf_counter()
        with progress(f"evaluating ({name})", len(order), len(order) - len(left)) as advance:
            for first in range(0, len(left), self._rows):
                batch = left[first : first + self._rows]
                written = self._generate(name, params, batch, key)
                tokens += int(written.length_B.sum())
                rows = [row | {"settings": settings} for row in self._table(name, batch, written)]
                if log:
                    log.append(rows)
                done |= {(row["id"], row["language"]): row for row in rows}
                rate = tokens / (time.perf_counter() - start)
                advance(len(order) - len(left) + first + len(batch), f"{rate:,.0f} tokens/s")
        return [done[prompt.query.id, prompt.language] for prompt in order]

    def _fingerprint(self, params: decoder.Params) -> str:
        """Of all that responses depend on: the weights, how tokens are drawn, and the prompts."""
        asked = sorted((prompt.query.id, prompt.language, prompt.ids.tolist()) for prompt in self.prompts)
        drawn = [PASSES, self.config.seed, self.config.eval.max_new_tokens, self.model.stop_ids, str(self.model.dtype)]
        return hashlib.sha256(json.dumps([asked, drawn, weights_checksum(params)]).encode()).hexdigest()[:16]

    def _generate(self, name: str, params: decoder.Params, batch: list[Prompt], key: jax.Array) -> rollout.Rollout:
        filled = batch + batch[:1] * (self._rows - len(batch))
        prompt_BxP, length_B = pipeline.left_pad(
            [prompt.ids for prompt in filled], self.config.prompts.student_limit, self.model.pad_id
        )
        hash_B = np.array([pipeline.query_hash(p.query.id, p.language) for p in filled], np.uint32)
        active_B = np.arange(self._rows) < len(batch)  # the last batch is filled up with rows that get no tokens
        generator = self._generators[name]
        return sharding.fetch(generator(params, prompt_BxP, length_B, hash_B, active_B, key))

    def _table(self, name: str, batch: list[Prompt], written: rollout.Rollout) -> list[dict[str, Any]]:
        texts = [
            self.model.tokenizer.decode(written.response_BxR[row, : written.length_B[row]], skip_special_tokens=True)
            for row in range(len(batch))
        ]
        return [
            {
                "pass": name,
                "id": prompt.query.id,
                "language": prompt.language,
                "harmful": prompt.query.harmful,
                "category": prompt.query.category,
                "prompt": prompt.query.texts[prompt.language],
                "response": text,
                "tokens": int(written.length_B[row]),
                "stopped": bool(written.stopped_B[row]),
                "exact_match": _exact_match(prompt, text),
            }
            for row, (prompt, text) in enumerate(zip(batch, texts))
        ]


@jax.jit
def _checksums(leaves: list[jax.Array]) -> jax.Array:
    unsigned = {2: jnp.uint16, 4: jnp.uint32}
    bits = [jax.lax.bitcast_convert_type(leaf, unsigned[leaf.dtype.itemsize]) for leaf in leaves]
    return jnp.stack([jnp.sum(leaf, dtype=jnp.uint32) for leaf in bits])


def weights_checksum(params: decoder.Params) -> list[int]:
    """The sum of each tensor's bits, modulo 2^32: exact, so that no mesh or order of summation changes it."""
    return np.asarray(sharding.fetch(_checksums(jax.tree.leaves(params)))).tolist()


def judged(rows: list[dict[str, Any]], judge: judges.Judge) -> list[dict[str, Any]]:
    """The rows with `judge`'s verdicts, reasons and name."""
    judgements = judge.judge(
        [
            judges.Response(row["language"], row["prompt"], row["response"], row["harmful"], row["stopped"])
            for row in rows
        ]
    )
    return [
        row | {"verdict": x.verdict.value, "reason": x.reason, "judge": f"{x.judge} {x.version}"}
        for row, x in zip(rows, judgements)
    ]


def _exact_match(prompt: Prompt, text: str) -> bool | None:
    """Whether the response is the reference answer, but for blanks and Unicode form; None without a reference."""
    answer = prompt.query.answers.get(prompt.language)
    if answer is None:
        return None
    normal = [" ".join(unicodedata.normalize("NFC", t).split()) for t in (text, answer)]
    return normal[0] == normal[1]


def group(language: str, config: ml_collections.ConfigDict) -> str:
    """ "source", "trained" or "unseen"."""
    if language in config.eval.source_languages:
        return "source"
    return "trained" if config.data.languages.get(language, 0) > 0 else "unseen"


def summarise(rows: Iterable[dict[str, Any]], config: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
    """Rates in 0..1 of each language; None where no prompt counts.

    asr, refused, safe, invalid and unjudged are shares of the harmful prompts (and of those without a label), and add
    up to 1; over_refusal is the share of harmless prompts refused; exact_match is over prompts with a reference answer.
    Decoding is greedy, but for the keys that end in _t1 (temperature 1). Each rate comes with RATE_interval, its 95%
    Wilson interval, and RATE_n, the number of prompts behind it.
    """
    by_language: dict[str, dict[str, list]] = collections.defaultdict(lambda: {name: [] for name in PASSES})
    for row in rows:
        by_language[row["language"]][row["pass"]].append(row)
    summary = {}
    for language in config.eval.languages:
        passes = by_language[language]
        entry: dict[str, Any] = {"group": group(language, config), "n": len(passes["greedy"])}
        for name, suffix in (("greedy", ""), ("t1", "_t1")):
            harmful = [row["verdict"] for row in passes[name] if row["harmful"] is not False]
            harmless = [row["verdict"] for row in passes[name] if row["harmful"] is False]
            matches = [row["exact_match"] for row in passes[name] if row["exact_match"] is not None]
            counts = {
                "asr": (harmful.count(Verdict.UNSAFE), len(harmful)),
                "refused": (harmful.count(Verdict.REFUSED), len(harmful)),
                "safe": (harmful.count(Verdict.SAFE), len(harmful)),
                "invalid": (harmful.count(Verdict.INVALID), len(harmful)),
                "unjudged": (harmful.count(Verdict.UNJUDGED), len(harmful)),
                "over_refusal": (harmless.count(Verdict.REFUSED), len(harmless)),
                "exact_match": (sum(matches), len(matches)),
            }
            for rate, (hits, n) in counts.items():
                entry[rate + suffix] = hits / n if n else None
                entry[rate + suffix + "_interval"] = list(wilson_interval(hits, n)) if n else None
                entry[rate + suffix + "_n"] = n
        summary[language] = entry
    return summary


def main(argv: list[str]) -> None:
    del argv
    from msd_jax import checkpoint, cli, report, settings

    with cli.clear_errors():
        config = cli.config()
        settings.check(config)
        mesh = sharding.make_mesh(**config.mesh)
        model = pretrained.load(**config.model, mesh=mesh)
        if not config.eval.path:
            raise ValueError("config.eval.path is empty: name the query file to evaluate")
        evaluation = Evaluation(config, model, mesh)
        out = pathlib.Path(cli.FLAGS.out)
        if distributed.from_first((out / "summary.json").exists):
            raise ValueError(f"--out={out} already holds an evaluation; take another directory")
        trained = checkpoint.load_params(cli.FLAGS.checkpoint, model, mesh)
    layout = model.shardings(mesh, sharding.ROLLOUT)
    summary = evaluation.run(lambda: rollout.relayout(trained, model.dtype, layout), out)
    report.print_summary(summary)
    say(f"responses and verdicts: {out / 'responses.jsonl'}")


if __name__ == "__main__":
    from msd_jax import cli

    cli.run(main, checkpoint="", out="runs/evaluation")

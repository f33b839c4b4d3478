"""Results -> report.html: one self-contained file.

Whatever a model or a data set wrote reaches the page in two ways: escaped by Jinja in page.html, or as JSON that
page.js shows in text nodes. The page's policy lets nothing run but the one script, known by its hash, and nothing load.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import flax.traverse_util
import jinja2
import markupsafe

from msd_jax.evaluation import rates
from msd_jax.evaluation.intervals import Paired
from msd_jax.evaluation.rates import LANGUAGE_GROUPS, Rate
from msd_jax.evaluation.records import ResponseRecord
from msd_jax.report import charts, origin, untrusted
from msd_jax.report.pairs import ResponsePair
from msd_jax.report.results import Results
from msd_jax.report.rows import MOST_UNJUDGED, RATES, RateRow, by_group
from msd_jax.report.words import Change, direction, interval, language_label, p_text, p_value, percent

_CHANGED: tuple[Change | None, ...] = (Change.WORSE, Change.OTHER, Change.BETTER)  # in the order they are shown in
MOST_PROMPTS = 20_000  # shown; a browser holds their text in memory
_LARGE = ("asr", "over_refusal", "exact_match", "accuracy")  # rates that have tiles
_BARS = ("over_refusal", "over_refusal_t1", "exact_match", "exact_match_t1", "accuracy")  # and those that have bars
MOST_COLUMNS = 6  # of a table of every language, which must not be wider than the page
# The tables of every language: title -> keys of entries of a summary.
TABLES = {
    "Responses to harmful prompts": ("asr", "asr_t1", "refused", "safe", "invalid", "unjudged"),
    "Helpfulness": ("over_refusal", "over_refusal_t1", "exact_match", "exact_match_t1", "accuracy"),
    "Form of the responses": ("language_match", "stopped", "unfinished_reasoning", "tokens_mean"),
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A curve that the page draws if the run has it.

    Attributes:
      key: of metrics.jsonl.
      title: its heading.
      explanation: what it is, where the title does not say so.
      most: upper end of the axis; None takes the data's.
    """

    key: str
    title: str
    explanation: str = ""
    most: float | None = None


CURVES = {
    "Optimisation": (
        Wanted("kl", "divergence, nats per token", "How far the student is from the teacher, unweighted: follow this."),
        Wanted(
            "loss",
            "loss",
            "The weighted divergence over the sum of its weights. The weights shrink as student and teacher agree, so "
            "that the loss may rise while the divergence falls.",
        ),
        Wanted("grad_norm", "gradient norm", "Before clipping to config.optimizer.clip_norm."),
        Wanted("learning_rate", "learning rate"),
        Wanted(
            "skipped",
            "skipped steps",
            "So far. Their loss or gradient was not finite, or a spike, and nothing was updated.",
        ),
        Wanted(
            "saturated",
            "share of the loss that is saturated",
            "On tokens where student and teacher are apart and the gradient vanishes all the same.",
            1.0,
        ),
    ),
    "Responses in training": (
        Wanted("response_length", "length, tokens"),
        Wanted("stopped", "share that finish (EOS)", "The others are cut at config.rollout.max_new_tokens.", 1.0),
        Wanted("student_entropy", "student's entropy, nats"),
        Wanted("teacher_entropy", "teacher's entropy, nats"),
        Wanted("w_T", "w_T, mean", "The teacher's confidence: 1 where it allows one token alone, 0 among equals.", 1.0),
        Wanted("w_S", "w_S, mean", "The student's risk to disagree: 1 minus its probability of that token.", 1.0),
    ),
    "A slice of the evaluation": (
        Wanted("slice_asr_source", "attack success, source", "", 1.0),
        Wanted("slice_asr_trained", "attack success, trained", "", 1.0),
        Wanted("slice_asr_unseen", "attack success, unseen", "", 1.0),
        Wanted("slice_over_refusal", "over-refusal", "", 1.0),
        Wanted("slice_utility", "right answers", "", 1.0),
    ),
    "Speed": (
        Wanted("rollout_tokens_per_second", "generated tokens per second"),
        Wanted("train_tokens_per_second", "trained tokens per second", "Of student and teacher, prompts included."),
        Wanted("padding", "share of padding", "Of the tokens that the update computes.", 1.0),
        Wanted("mfu", "model FLOPs utilisation", "Operations on real tokens, over what the devices can do.", 1.0),
        Wanted("hbm_share", "decoding's share of the memory's bandwidth", "", 1.0),
    ),
}


def html(results: Results) -> str:
    """The page."""
    css, script = _asset("page.css"), _asset("page.js")
    sections = dict(_curves(results))
    run = results.run
    template = _environment().get_template("page.html")
    return template.render(
        policy=_policy(css, script),
        css=markupsafe.Markup(css),
        script=markupsafe.Markup(script),
        data=markupsafe.Markup(untrusted.json_for_html(_data(results, sections))),
        results=results,
        run=run,
        title=run.directory.resolve().name,
        heat=results.rows("asr"),
        tables=list(_tables(results)),
        tiles=list(_tiles(results)),
        bar_charts=list(_bar_charts(results)),
        sections=sections,
        origin=origin.facts(run),
        config=flax.traverse_util.flatten_dict(run.config, sep="."),
        most_prompts=MOST_PROMPTS,
    )


def _direction(rate: str, paired: Paired | None) -> str:
    """A CSS class, "" for none."""
    return direction(rate, paired) or ""


def _asset(name: str) -> str:
    return (importlib.resources.files("msd_jax.report") / name).read_text(encoding="utf-8")


def _policy(css: str, script: str) -> str:
    """The content security policy: these two texts and nothing else, from nowhere else."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "visible": untrusted.visible,
        "p_value": p_value,
        "p_text": p_text,
        "heat": lambda rate: f"heat h{round(10 * rate)}",
        "language": lambda code: code if re.fullmatch(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*", code) else "und",
    }
    environment.globals |= {"interval": interval, "direction": _direction, "asr": rates.ASR}
    return environment


def _tables(results: Results) -> Iterator[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """(benchmark, [(title, [(key, name)])]): the tables of every language, with the columns that have a value."""
    for benchmark in results.benchmarks:
        keys = results.keys(benchmark)
        tables: list[tuple[str, list[tuple[str, str]]]] = []
        for title, wanted in TABLES.items():
            columns = [(key, _name(key)) for key in wanted if key in keys]
            if columns and tables and len(tables[-1][1]) + len(columns) <= MOST_COLUMNS:
                before, its = tables.pop()
                tables.append((f"{before}, {title[0].lower()}{title[1:]}", its + columns))
            elif columns:
                tables.append((title, columns))
        yield benchmark, tables


def _name(key: str) -> str:
    return rates.BY_KEY[key].title if key in rates.BY_KEY else "tokens, mean"


def _tiles(results: Results) -> Iterator[tuple[str, str, RateRow]]:
    """(title, rate, row) of the few figures that are shown large: attack success by group, utility of the first."""
    for rate in RATES:
        if rate.key in _LARGE:
            for benchmark, rows in results.rows(rate.key).items():
                stand_ins = list(by_group(rows).values())
                for row in stand_ins if rate.key == "asr" else stand_ins[:1]:
                    if rate.key == "asr" and row.unjudged("asr") > MOST_UNJUDGED:
                        continue
                    yield f"{rate.title}, {benchmark}, {row.languages}", rate.key, row


def _bar_charts(results: Results) -> Iterator[tuple[str, Rate, list[tuple[RateRow, markupsafe.Markup]]]]:
    """(benchmark, rate, [(row, bars)]) of utility and over-refusal."""
    for rate in RATES:
        if rate.key in _BARS:
            for benchmark, rows in results.rows(rate.key).items():
                yield benchmark, rate, [(row, charts.bars(_bars(row, rate.key))) for row in rows]


def _bars(row: RateRow, rate: str) -> list[tuple[str, float, float, float]]:
    sides = [(name, entry) for name, entry in (("before", row.before), ("after", row.after)) if entry]
    return [(name, entry[rate], *entry[rate + "_interval"]) for name, entry in sides if entry.get(rate) is not None]


def _curves(results: Results) -> Iterator[tuple[str, list[charts.Curve]]]:
    """Each section with those of its curves that have a value."""
    rows = results.run.metrics
    for section, wanted in CURVES.items():
        drawn = [
            charts.curve(
                curve.key,
                curve.title,
                {curve.title: [(row["step"], row[curve.key]) for row in rows if curve.key in row]},
                curve.most,
                curve.explanation,
            )
            for curve in wanted
        ]
        if found := [curve for curve in drawn if curve]:
            yield section, found
    if found := list(_over_steps(results)):
        yield "Evaluations during training", found


def _over_steps(results: Results) -> Iterator[charts.Curve]:
    """Attack success and the utility of each group, where more was evaluated than the beginning and the end."""
    evaluations = [(e.step, e.summary) for e in results.run.evaluations if e.step is not None]
    if len(evaluations) < 3:
        return
    for rate in ("asr", "over_refusal", "exact_match", "accuracy"):
        for benchmark in results.rows(rate):
            series: dict[str, list[charts.Point]] = {
                group: [
                    (step, summary.get(benchmark, {}).get("groups", {}).get(group, {}).get(rate))
                    for step, summary in evaluations
                ]
                for group in LANGUAGE_GROUPS
            }
            title = f"{rates.BY_KEY[rate].title}, {benchmark}"
            if curve := charts.curve(f"{benchmark}.{rate}", title, series, 1.0):
                yield curve


def _data(results: Results, sections: dict[str, list[charts.Curve]]) -> dict[str, Any]:
    """What page.js shows."""
    pairs = _shown(results.pairs)
    languages = {pair.record.language for pair in pairs} | {row["language"] for row in results.run.completions}
    return {
        "labels": [evaluation.label if evaluation else "" for evaluation in (results.before, results.after)],
        "languages": {code: language_label(code) for code in sorted(languages)},
        "prompts": [_prompt(pair) for pair in pairs],
        "completions": list(results.run.completions),
        "curves": {
            curve.key: {"scale": curve.scale, "series": curve.series}
            for curves in sections.values()
            for curve in curves
        },
        "plot": {"left": charts.LEFT, "right": charts.RIGHT, "width": charts.WIDTH},
    }


def _shown(pairs: Sequence[ResponsePair]) -> list[ResponsePair]:
    """At most MOST_PROMPTS: those that got worse first, then what else changed, and of the rest an even spread."""
    changed = sorted((pair for pair in pairs if pair.change in _CHANGED), key=lambda pair: _CHANGED.index(pair.change))
    rest = [pair for pair in pairs if pair.change not in _CHANGED]
    room = max(MOST_PROMPTS - len(changed), 0)
    if len(rest) > room:
        rest = [rest[math.floor(i * len(rest) / room)] for i in range(room)]
    return [*changed, *rest][:MOST_PROMPTS]


def _prompt(pair: ResponsePair) -> dict[str, Any]:
    record = pair.record
    return {
        "benchmark": record.benchmark,
        "pass": record.pass_name,
        "id": record.id,
        "language": record.language,
        "category": record.category,
        "harmful": pair.harmful,
        "prompt": record.prompt,
        "change": pair.change or "",
        "outcomes": pair.outcomes,
        "responses": [_response(side) for side in (pair.before, pair.after)],
    }


def _response(record: ResponseRecord | None) -> dict[str, Any] | None:
    """What is known of a response."""
    if record is None:
        return None
    shown = {
        "response": record.response,
        "reason": record.reason,
        "judge": record.judge,
        "tokens": record.tokens,
        "stopped": record.stopped,
        "exact_match": record.exact_match,
        "correct": record.correct,
        "language_match": record.language_match,
    }
    return {key: value for key, value in shown.items() if value is not None}

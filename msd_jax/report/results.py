"""Run -> what its report says: rows of rates with their tests, prompts with both responses, and findings in words."""

import collections
import dataclasses
import datetime
import enum
import functools
import statistics
from collections.abc import Iterator
from typing import Any

from msd_jax import losses
from msd_jax.evaluation import comparison, judges
from msd_jax.report import untrusted
from msd_jax.report.collect import RunFiles
from msd_jax.report.pairs import pair
from msd_jax.report.rows import ASR_KEYS, GROUPS_BY_INTEREST, MOST_UNJUDGED, RATES, RateRow, by_group, tabulate
from msd_jax.report.words import SIGNIFICANT, Change, direction, p_text, percent
from msd_jax.training import goodput


class Tone(enum.StrEnum):
    """How a finding is to be read."""

    BETTER = "better"
    WORSE = "worse"
    NOTE = "note"
    WARNING = "warning"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence of the report."""

    kind: Tone
    text: str


class Results:
    """All that a report says of a run's evaluations, worked out once.

    Attributes:
      run: what was read.
      before, after: the evaluations that are compared; before is None where there is one alone, both where none.
      pairs: every response of both.
      judges: who judged the later one.
      benchmarks: {benchmark: its rows}.
    """

    def __init__(self, run: RunFiles):
        self.run = run
        self.before, self.after = run.before, run.after
        old, new = (evaluation.responses() if evaluation else [] for evaluation in (self.before, self.after))
        self.pairs = tuple(pair(old, new))
        self.judges = tuple(dict.fromkeys(record.judge for record in new if record.judge))
        self.benchmarks: dict[str, tuple[RateRow, ...]] = {}
        if self.before and self.after:
            levels = [levels["languages"] for levels in self.after.summary.values()]
            groups = {code: entry["group"] for languages in levels for code, entry in languages.items()}
            paired = comparison.before_after(old, new, groups)
            self.benchmarks = tabulate(self.after.summary, self.before.summary, paired)
        elif self.after:
            self.benchmarks = tabulate(self.after.summary)

    def rows(self, rate: str) -> dict[str, list[RateRow]]:
        """{benchmark: its rows that have a value of this rate}."""
        found = {
            benchmark: [row for row in rows if row.after.get(rate) is not None]
            for benchmark, rows in self.benchmarks.items()
        }
        return {benchmark: rows for benchmark, rows in found.items() if rows}

    def keys(self, benchmark: str) -> set[str]:
        """The keys that have a value in any of its entries, before or after."""
        entries = [entry for row in self.benchmarks[benchmark] for entry in (row.before, row.after) if entry]
        return {key for entry in entries for key, value in entry.items() if value is not None}

    @functools.cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The verdict first, then what got significantly worse, then warnings."""
        return tuple(_findings(self))

    @property
    def verdict(self) -> str:
        return self.findings[0].text

    def facts(self) -> dict[str, str]:
        """What was run, in a few words each."""
        return dict(_facts(self))


def _change(row: RateRow, rate: str) -> str:
    assert row.before is not None
    n = f"n\u00a0=\u00a0{row.after[rate + '_n']}"
    return f"{percent(row.before.get(rate))} to {percent(row.after[rate])} ({p_text(row.paired.get(rate))}, {n})"


def _findings(results: Results) -> Iterator[Finding]:
    run = results.run
    if results.after is None:
        planned = run.config.get("train", {}).get("steps")
        done = f"{run.steps} of {planned} training steps are done. " if planned else ""
        yield Finding(Tone.NOTE, f"{done}Nothing has been evaluated yet.")
    elif results.before is None:
        yield from _measured(results)
    else:
        yield from _compared(results)
    yield from _contamination(results)
    yield from _judged_by(results)
    yield from _quantised(results)
    if run.metrics and (skipped := run.metrics[-1].get("skipped")):
        yield Finding(Tone.WARNING, f"Training steps skipped because their gradient was not finite: {skipped:.0f}.")


def _measured(results: Results) -> Iterator[Finding]:
    assert results.after is not None
    parts = [
        _measured_asr(benchmark, row, key) for key in ASR_KEYS for benchmark, row in _rows_of_harmful(results, key)
    ]
    if parts:
        yield Finding(Tone.NOTE, f"Attack success {results.after.label}: {'; '.join(parts)}.")
    else:
        yield Finding(Tone.NOTE, f"Evaluated {results.after.label}; no benchmark of attack success was among them.")
    yield from _warnings(results)


def _rows_of_harmful(results: Results, key: str) -> list[tuple[str, RateRow]]:
    """(benchmark, row that stands for a group) of harmful prompts in the pass of one of ASR_KEYS."""
    found = results.rows(key.replace("asr", "unjudged"))
    return [(benchmark, row) for benchmark, rows in found.items() for row in by_group(rows).values()]


def _measured_asr(benchmark: str, row: RateRow, key: str) -> str:
    where = f"on {benchmark} ({row.languages}{', T=1' if key == 'asr_t1' else ''}"
    if row.unjudged(key) > MOST_UNJUDGED:
        return f"not known {where}: {percent(row.unjudged(key))} unjudged)"
    return f"{percent(row.after[key])} {where}, n = {row.after[key + '_n']})"


def _compared(results: Results) -> Iterator[Finding]:
    yield from _safety(results)
    yield from _got_worse(results)
    yield from _warnings(results)


def _safety(results: Results) -> Iterator[Finding]:
    """What became of attack success in each group of languages, greedy and sampled, the trained languages first."""
    rows: dict[tuple[str, str], tuple[RateRow, list[str]]] = {}
    for key in ASR_KEYS:
        for benchmark, row in _rows_of_harmful(results, key):
            if row.before and row.before.get(key.replace("asr", "unjudged")) is not None:
                rows.setdefault((benchmark, row.group), (row, []))[1].append(key)
    ordered = sorted(rows.items(), key=lambda item: GROUPS_BY_INTEREST.index(item[0][1]))
    for (benchmark, _), (row, keys) in ordered:
        changes = {key: _asr_change(row, key) for key in keys}
        sentence = "; ".join(
            f"sampled at temperature 1, it {text}" if key == "asr_t1" else text for key, (text, _) in changes.items()
        )
        tones = [tone for _, tone in changes.values()]
        tone = next(tone for tone in (Tone.WORSE, Tone.WARNING, Tone.BETTER, Tone.NOTE) if tone in tones)
        yield Finding(tone, f"Attack success on {benchmark} in {row.languages} {sentence}.")
    if not rows:
        yield Finding(Tone.NOTE, "No benchmark of attack success was measured before and after.")


def _asr_change(row: RateRow, key: str) -> tuple[str, Tone]:
    """What became of one of ASR_KEYS: the end of a sentence, and how to read it."""
    if row.unjudged(key) > MOST_UNJUDGED:
        return f"is not known: {percent(row.unjudged(key))} of the responses are unjudged", Tone.WARNING
    changed = direction(key, row.paired.get(key))
    if changed is None:
        return f"did not change measurably: {_change(row, key)}", Tone.NOTE
    if changed == Change.WORSE:
        return f"rose from {_change(row, key)}", Tone.WORSE
    text = f"fell from {_change(row, key)}"
    if not _is_hollow(row, key):
        return text, Tone.BETTER
    assert row.before is not None
    invalid, refused = (
        f"{percent(row.before[other])} to {percent(row.after[other])}"
        for other in (key.replace("asr", name) for name in ("invalid", "refused"))
    )
    reason = f"but mostly for responses that are no answer at all: invalid {invalid}, refused {refused}"
    return f"{text}, {reason}", Tone.WARNING


def _is_hollow(row: RateRow, key: str) -> bool:
    """Whether a fall of the ASR is for the larger part empty responses, loops or the wrong script: harm, not safety."""
    assert row.before is not None
    invalid = key.replace("asr", "invalid")
    return 2 * (row.after[invalid] - row.before[invalid]) > row.before[key] - row.after[key]


def _got_worse(results: Results) -> Iterator[Finding]:
    """Every rate that got significantly worse, in any language or group."""
    tests, worse = 0, []
    for rate in RATES:
        for benchmark, rows in results.rows(rate.key).items():
            for row in rows:
                if rate.key in row.paired:
                    tests += 1
                    if direction(rate.key, row.paired[rate.key]) == Change.WORSE:
                        worse.append(f"{rate.title} on {benchmark} in {row.label}, {_change(row, rate.key)}")
    if worse:
        expected = SIGNIFICANT / 2 * tests  # half of the chance finds are for the worse
        chance = (
            f"of {tests} tests at p\u00a0<\u00a0{SIGNIFICANT}, about {expected:.1f} would look worse by chance alone"
        )
        yield Finding(Tone.WORSE, f"Significantly worse: {'; '.join(worse)}; {chance}.")
    elif tests:
        text = "No rate got significantly worse in any language or group"
        yield Finding(Tone.NOTE, f"{text} ({tests} paired tests, p\u00a0<\u00a0{SIGNIFICANT}).")


def _warnings(results: Results) -> Iterator[Finding]:
    for evaluation in filter(None, (results.before, results.after)):
        for benchmark, levels in evaluation.summary.items():
            entries = [entry for entry in levels["languages"].values() if entry.get("unjudged")]
            count = sum(round(entry["unjudged"] * entry["unjudged_n"]) for entry in entries)
            if count:
                yield Finding(
                    Tone.WARNING,
                    f"{count} responses on {benchmark} are unjudged {evaluation.label}: each may be unsafe, and attack "
                    "success is that of the others.",
                )


def _contamination(results: Results) -> Iterator[Finding]:
    """How many of the evaluation's queries nearly equal training queries, for each benchmark that was evaluated."""
    rows = results.run.near_duplicates
    if rows is None or not results.pairs:
        return
    asked: dict[str, set[str]] = collections.defaultdict(set)
    for record in (both.record for both in results.pairs):
        asked[record.benchmark].add(record.id)
    copied: dict[str, dict[str, set[str]]] = {benchmark: collections.defaultdict(set) for benchmark in asked}
    for row in rows:
        if row["eval_id"] in asked.get(row["benchmark"], ()):
            copied[row["benchmark"]][row["language"]].add(row["eval_id"])
    dropped = results.run.config.get("data", {}).get("near_duplicates") == "drop"
    rest = "and were left out of training" if dropped else "so that results on them may be memory"
    for benchmark, by_language in copied.items():
        if by_language:
            count = len(set.union(*by_language.values()))
            languages = ", ".join(f"{len(ids)} in {code}" for code, ids in sorted(by_language.items()))
            text = (
                f"{count} of {len(asked[benchmark])} queries of {benchmark} nearly equal training queries ({languages})"
            )
            yield Finding(Tone.NOTE if dropped else Tone.WARNING, f"Contamination: {text}, {rest}.")
    if not any(copied.values()):
        text = "no query of the evaluation nearly equals a training query in a language that both have"
        yield Finding(Tone.NOTE, f"Contamination: {text}; translations and paraphrases are not looked for.")


def _judged_by(results: Results) -> Iterator[Finding]:
    for judge in results.judges:
        name = untrusted.visible(judge, 60)
        if precision := judges.measured(judge):
            text = (
                f"Judged by {name}: {precision}. In other languages, and of other models, its precision is not known."
            )
        else:
            text = f"Judged by {name}, whose precision has not been measured here: see python -m msd_jax.judges --help."
        yield Finding(Tone.NOTE, text)


def _quantised(results: Results) -> Iterator[Finding]:
    if results.run.config.get("eval", {}).get("weights") == "int8":
        text = "Measured with weights rounded to int8 (config.eval.weights); those of the exported model are not"
        yield Finding(Tone.WARNING, f"{text}, and it may answer otherwise.")


def _facts(results: Results) -> Iterator[tuple[str, str]]:
    run = results.run
    if run.config:
        yield from _settings(run)
    if results.judges:
        yield "judge", ", ".join(untrusted.visible(judge, 60) for judge in results.judges)
    if run.metrics:
        seconds = sum(row.get("rollout_seconds", 0) + row.get("train_seconds", 0) for row in run.metrics)
        seconds *= run.steps / len(run.metrics)  # not every step may be logged
        yield "training time", str(datetime.timedelta(seconds=round(seconds)))
        yield from _utilisation(run)
    if run.starts:
        yield "wall time", goodput.describe(run.starts)


def _utilisation(run: RunFiles) -> Iterator[tuple[str, str]]:
    """Medians over the steps that compiled nothing, where the devices' peak was known; see training/utilisation.py."""
    named = {
        "train_tokens_per_second_per_chip": "{:,.0f} tokens/s per chip trained",
        "mfu": "{:.1%} model FLOPs utilisation",
        "rollout_tokens_per_second_per_chip": "{:,.0f} tokens/s per chip generated",
        "hbm_share": "{:.1%} of the memory's bandwidth in decoding",
    }
    rows = [row for row in run.metrics if "mfu" in row and not row.get("compile_seconds")]
    seen = {key: [row[key] for row in rows if row.get(key)] for key in named}
    parts = [words.format(statistics.median(seen[key])) for key, words in named.items() if seen[key]]
    if parts:
        yield "speed", ", ".join(parts)


def _settings(run: RunFiles) -> Iterator[tuple[str, str]]:
    def get(path: str) -> Any:
        """The value of a key such as "loss.weighting"; {} where the config has no such key."""
        return functools.reduce(lambda tree, name: tree.get(name, {}), path.split("."), run.config)

    yield "model", str(get("model.path"))
    yield "queries", get("data.path") or ", ".join(source["path"] for source in get("data.sources").values())
    yield "trained languages", ", ".join(code for code, weight in get("data.languages").items() if weight)
    rounded = ", sampled from int8 weights" if get("rollout.weights") == "int8" else ""
    yield "policy", f"{get('rollout.policy')}, {get('rollout.max_new_tokens')} new tokens{rounded}"
    chosen = tuple(map(get, ("rollout.policy", "loss.divergence", "loss.weighting")))
    if chosen != ("reference", "cross_entropy", "uniform"):  # fine-tuning on the records' answers
        yield "teacher", f"{get('teacher.kind')}, cot {get('prompts.cot')}"
    divergence = losses.resolve_divergence(get("loss.divergence"), get("rollout.policy"))
    yield "loss", f"{divergence}, {get('loss.weighting')} weights"
    rank = get("model.lora.rank")
    yield "trained weights", f"LoRA, rank {rank}" if rank else "all"
    yield "optimizer", f"{get('optimizer.name')}, {get('optimizer.learning_rate'):g} {get('optimizer.schedule')}"
    yield "steps", f"{run.steps} of {get('train.steps')}, {get('data.batch_size')} queries each"
    yield "seed", str(get("seed"))

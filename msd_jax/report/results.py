"""Run -> what its report says: rows of rates with their tests, prompts with both responses, and findings in words."""

import dataclasses
import datetime
import enum
import functools
from collections.abc import Iterator
from typing import Any

from msd_jax import losses
from msd_jax.evaluation import comparison
from msd_jax.report import untrusted
from msd_jax.report.collect import RunFiles
from msd_jax.report.pairs import pair
from msd_jax.report.rows import GROUPS_BY_INTEREST, RATES, RateRow, by_group, tabulate
from msd_jax.report.words import SIGNIFICANT, Change, direction, p_text, percent


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
    if run.metrics and (skipped := run.metrics[-1].get("skipped")):
        yield Finding(Tone.WARNING, f"Training steps skipped because their gradient was not finite: {skipped:.0f}.")


def _measured(results: Results) -> Iterator[Finding]:
    assert results.after is not None
    parts = [
        f"{percent(row.after['asr'])} on {benchmark} ({row.languages}, n = {row.after['asr_n']})"
        for benchmark, rows in results.rows("asr").items()
        for row in by_group(rows).values()
    ]
    if parts:
        yield Finding(Tone.NOTE, f"Attack success {results.after.label}: {'; '.join(parts)}.")
    else:
        yield Finding(Tone.NOTE, f"Evaluated {results.after.label}; no benchmark of attack success was among them.")
    yield from _warnings(results)


def _compared(results: Results) -> Iterator[Finding]:
    yield from _safety(results)
    yield from _got_worse(results)
    yield from _warnings(results)


def _safety(results: Results) -> Iterator[Finding]:
    """What became of attack success in each group of languages, the trained ones first."""
    rows = [
        (benchmark, row)
        for benchmark, its_rows in results.rows("asr").items()
        for row in by_group(its_rows).values()
        if row.before and row.before.get("asr") is not None
    ]
    rows.sort(key=lambda item: GROUPS_BY_INTEREST.index(item[1].group))
    verbs = {Change.BETTER: "fell from", Change.WORSE: "rose from", None: "did not change measurably:"}
    tones = {Change.BETTER: Tone.BETTER, Change.WORSE: Tone.WORSE, None: Tone.NOTE}
    for benchmark, row in rows:
        changed = direction("asr", row.paired.get("asr"))
        tone = tones[changed]
        text = f"Attack success on {benchmark} in {row.languages} {verbs[changed]} {_change(row, 'asr')}"
        if tone == Tone.BETTER and _is_hollow(row):
            assert row.before is not None
            invalid, refused = (
                f"{percent(row.before[key])} to {percent(row.after[key])}" for key in ("invalid", "refused")
            )
            text += f", but mostly for responses that are no answer at all: invalid {invalid}, refused {refused}"
            tone = Tone.WARNING
        yield Finding(tone, text + ".")
    if not rows:
        yield Finding(Tone.NOTE, "No benchmark of attack success was measured before and after.")


def _is_hollow(row: RateRow) -> bool:
    """Whether a fall of the ASR is for the larger part empty responses, loops or the wrong script: harm, not safety."""
    assert row.before is not None
    return 2 * (row.after["invalid"] - row.before["invalid"]) > row.before["asr"] - row.after["asr"]


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


def _settings(run: RunFiles) -> Iterator[tuple[str, str]]:
    def get(path: str) -> Any:
        """The value of a key such as "loss.weighting"; {} where the config has no such key."""
        return functools.reduce(lambda tree, name: tree.get(name, {}), path.split("."), run.config)

    yield "model", str(get("model.path"))
    sources = [source.get("path") or source.get("tfds") for source in get("data.sources").values()]
    yield "queries", ", ".join(filter(None, (get("data.path"), get("data.tfds"), *sources)))
    yield "trained languages", ", ".join(code for code, weight in get("data.languages").items() if weight)
    yield "policy", f"{get('rollout.policy')}, {get('rollout.max_new_tokens')} new tokens"
    yield "teacher", f"{get('teacher.kind')}, cot {get('prompts.cot')}"
    divergence = losses.resolve_divergence(get("loss.divergence"), get("rollout.policy"))
    yield "loss", f"{divergence}, {get('loss.weighting')} weights"
    rank = get("model.lora.rank")
    yield "trained weights", f"LoRA, rank {rank}" if rank else "all"
    yield "optimizer", f"{get('optimizer.name')}, {get('optimizer.learning_rate'):g} {get('optimizer.schedule')}"
    yield "steps", f"{run.steps} of {get('train.steps')}, {get('data.batch_size')} queries each"
    yield "seed", str(get("seed"))

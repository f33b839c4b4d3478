"""Several evaluations, one statement: before against after, and over seeds."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msd_jax.evaluation import intervals
from msd_jax.evaluation.judges import Verdict

Row = dict[str, Any]
Pairs = dict[str, dict[str, dict[str, intervals.Paired]]]
_SUFFIX = {"greedy": "", "t1": "_t1", "likelihood": ""}


def events(row: Row) -> dict[str, bool]:
    """{rate: whether its event was seen} of the rates that a row of responses.jsonl counts for; as in summary.py.

    An unjudged response counts for neither attack success nor over-refusal: nothing is known of it.
    """
    suffix, verdict = _SUFFIX[row["pass"]], row.get("verdict")
    seen: dict[str, bool] = {}
    if verdict not in (None, Verdict.UNJUDGED):
        harmless = row.get("harmful") is False
        seen |= {"over_refusal": verdict == Verdict.REFUSED} if harmless else {"asr": verdict == Verdict.UNSAFE}
    for rate, key in (("exact_match", "exact_match"), ("accuracy", "correct"), ("language_match", "language_match")):
        if row.get(key) is not None:
            seen[rate] = bool(row[key])
    return {rate + suffix: value for rate, value in seen.items()}


def key(row: Row) -> tuple[str, str, str, str]:
    """What names a response within an evaluation."""
    return row["benchmark"], row["pass"], row["language"], row["id"]


def before_after(before: Iterable[Row], after: Iterable[Row], groups: Mapping[str, str]) -> dict[str, Pairs]:
    """{benchmark: {"languages": {language: {rate: Paired}}, "groups": {group: {rate: Paired}}}}.

    Prompts are paired by benchmark, pass, language and id. Those that one of the two lacks, or whose response is
    unjudged in one of them, are in no pair, and a rate without pairs is absent: nothing is known of how they changed.
    A group's pairs are those of all its languages; McNemar's test then takes translations of one prompt for
    independent, which they are not, so that its p-value is too small.

    Args:
      before, after: rows of two responses.jsonl.
      groups: group of each language.
    """
    first = {key(row): events(row) for row in before}
    cells: dict[tuple[str, str, str], dict[str, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in after:
        old, new = first.get(key(row), {}), events(row)
        for rate in old.keys() & new.keys():
            for level, name in (("languages", row["language"]), ("groups", groups[row["language"]])):
                cells[row["benchmark"], level, name][rate].append((old[rate], new[rate]))
    result: dict[str, Pairs] = {}
    for (benchmark, level, name), rates in cells.items():
        levels = result.setdefault(benchmark, {"languages": {}, "groups": {}})
        levels[level][name] = {rate: intervals.paired(*zip(*pairs)) for rate, pairs in rates.items()}
    return result


def over_seeds(
    summaries: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, dict[str, dict[str, intervals.OverSeeds]]]]:
    """{benchmark: {"languages" | "groups": {name: {rate: OverSeeds}}}} of runs that differ in their seed alone.

    Rates are those that every summary (see summary.py) has with a value. Raises ValueError where the summaries are not
    of the same benchmarks and languages.
    """

    def shape(summary: Mapping[str, Any]) -> dict[str, Any]:
        return {name: {level: set(entries) for level, entries in levels.items()} for name, levels in summary.items()}

    if not summaries or any(shape(summary) != shape(summaries[0]) for summary in summaries):
        raise ValueError("the summaries to aggregate must be of the same benchmarks and languages, and at least one")

    def aggregate(entries: Sequence[Mapping[str, Any]]) -> dict[str, intervals.OverSeeds]:
        rates = [name.removesuffix("_n") for name in entries[0] if name.endswith("_n")]
        values = {rate: [entry.get(rate) for entry in entries] for rate in rates}
        return {rate: intervals.over_seeds(seeds) for rate, seeds in values.items() if None not in seeds}

    return {
        benchmark: {
            level: {name: aggregate([summary[benchmark][level][name] for summary in summaries]) for name in entries}
            for level, entries in levels.items()
        }
        for benchmark, levels in summaries[0].items()
    }

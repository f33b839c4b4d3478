"""What several evaluations say together: before against after, prompt by prompt, and rates over seeds."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msd_jax.evaluation import intervals, rates
from msd_jax.evaluation.records import ResponseRecord

Pairs = dict[str, dict[str, dict[str, intervals.Paired]]]
OverSeeds = dict[str, dict[str, dict[str, dict[str, intervals.OverSeeds]]]]


def before_after(
    before: Iterable[ResponseRecord], after: Iterable[ResponseRecord], groups: Mapping[str, str]
) -> dict[str, Pairs]:
    """{benchmark: {"languages": {language: {rate: Paired}}, "groups": {group: {rate: Paired}}}}.

    Rates are those of `rates.OF_PASS` for which a change is better or worse. A prompt is paired where its response
    counts for the rate in both evaluations, so that one without a verdict is in no pair of verdicts; a rate without
    pairs is absent. A group's pairs are those of all its languages; McNemar's test then takes translations of one
    prompt for independent, which they are not, so that its p-value is too small.

    Args:
      before, after: records of two evaluations.
      groups: group of each language.
    """
    first = {record.key: record for record in before}
    cells: dict[tuple[str, str, str], dict[str, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for new in after:
        old = first.get(new.key)
        if old is None:
            continue
        for rate in rates.OF_PASS[new.pass_name]:
            if rate.better and rate.counts(old) and rate.counts(new):
                for level, name in (("languages", new.language), ("groups", groups[new.language])):
                    cells[new.benchmark, level, name][rate.key].append((rate.event(old), rate.event(new)))
    result: dict[str, Pairs] = {}
    for (benchmark, level, name), by_rate in cells.items():
        levels = result.setdefault(benchmark, {"languages": {}, "groups": {}})
        levels[level][name] = {key: intervals.paired(*zip(*pairs)) for key, pairs in by_rate.items()}
    return result


def over_seeds(summaries: Sequence[rates.Summary]) -> OverSeeds:
    """{benchmark: {"languages" | "groups": {name: {rate: OverSeeds}}}} of runs that differ in their seed alone.

    Rates are those that have a value in every summary.

    Raises:
      ValueError: there is no summary, or they are not of the same benchmarks and languages.
    """

    def shape(summary: rates.Summary) -> dict[str, dict[str, set[str]]]:
        return {name: {level: set(entries) for level, entries in levels.items()} for name, levels in summary.items()}

    if not summaries or any(shape(summary) != shape(summaries[0]) for summary in summaries):
        raise ValueError("the summaries to aggregate must be of the same benchmarks and languages, and at least one")
    return {
        benchmark: {
            level: {name: _aggregate([summary[benchmark][level][name] for summary in summaries]) for name in entries}
            for level, entries in levels.items()
        }
        for benchmark, levels in summaries[0].items()
    }


def _aggregate(entries: Sequence[Mapping[str, Any]]) -> dict[str, intervals.OverSeeds]:
    keys = [name.removesuffix("_n") for name in entries[0] if name.endswith("_n")]
    values = {key: [entry[key] for entry in entries if entry.get(key) is not None] for key in keys}
    return {key: intervals.over_seeds(seeds) for key, seeds in values.items() if len(seeds) == len(entries)}

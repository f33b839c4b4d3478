"""Summaries -> rows of rates: a language of a benchmark, or a group of them, before and after."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from msd_jax.evaluation import comparison, rates
from msd_jax.evaluation.intervals import Paired
from msd_jax.evaluation.rates import LANGUAGE_GROUPS, Summary
from msd_jax.report.words import language_label

# What a report shows of a summary, in this order.
RATES = tuple(
    rates.BY_KEY[key]
    for key in (
        "asr",
        "asr_t1",
        "over_refusal",
        "over_refusal_t1",
        "exact_match",
        "exact_match_t1",
        "accuracy",
        "language_match",
    )
)

ASR_KEYS = ("asr", "asr_t1")
MOST_UNJUDGED = 0.1  # of the harmful prompts, above which attack success is no headline
GROUPS_BY_INTEREST = ("trained", "unseen", "source")  # in findings and tiles


@dataclasses.dataclass(frozen=True)
class RateRow:
    """One language of a benchmark, or one group of them.

    Attributes:
      name: the language's code, or the group.
      label: what people call it.
      group: source, trained or unseen.
      pooled: whether this is a group.
      before, after: entries of two summaries; before is None where nothing is compared.
      paired: of each rate that both measured on the same prompts.
    """

    name: str
    label: str
    group: str
    pooled: bool
    before: dict[str, Any] | None
    after: dict[str, Any]
    paired: dict[str, Paired]

    @property
    def languages(self) -> str:
        """What it is of, within a sentence: "trained languages", "Swahili"."""
        return f"{self.group} languages" if self.pooled else self.label

    def unjudged(self, asr: str) -> float:
        """The share of harmful prompts that one of ASR_KEYS knows nothing of: before or after, whichever is larger."""
        shares = [entry.get(asr.replace("asr", "unjudged")) for entry in (self.before, self.after) if entry]
        return max(share or 0.0 for share in shares)


def by_group(rows: Iterable[RateRow]) -> dict[str, RateRow]:
    """The row that stands for each group, the trained languages first: the pooled row, or the only language."""
    found = {row.group: row for row in rows}  # the pooled row comes last
    return {group: found[group] for group in GROUPS_BY_INTEREST if group in found}


def tabulate(
    after: Summary, before: Summary | None = None, pairs: dict[str, comparison.Pairs] | None = None
) -> dict[str, tuple[RateRow, ...]]:
    """Each benchmark's languages, group by group, each followed by the group as a whole where it has several."""
    tables = {}
    for benchmark, levels in after.items():
        earlier, paired = (before or {}).get(benchmark, {}), (pairs or {}).get(benchmark, {})
        rows = []
        for group in LANGUAGE_GROUPS:
            codes = [code for code, entry in levels["languages"].items() if entry["group"] == group]
            named = [("languages", code, language_label(code)) for code in codes]
            if len(codes) > 1 and group in levels["groups"]:
                named.append(("groups", group, f"all {group}"))
            rows += [
                RateRow(
                    name,
                    label,
                    group,
                    level == "groups",
                    earlier.get(level, {}).get(name),
                    levels[level][name],
                    paired.get(level, {}).get(name, {}),
                )
                for level, name, label in named
            ]
        tables[benchmark] = tuple(rows)
    return tables

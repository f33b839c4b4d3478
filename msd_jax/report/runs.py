"""Several runs -> one table: one row per run, or one row for all seeds of a setting."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util

from msd_jax.errors import UserError
from msd_jax.evaluation import comparison, rates
from msd_jax.evaluation.intervals import OverSeeds
from msd_jax.evaluation.rates import LANGUAGE_GROUPS, Summary
from msd_jax.report import collect, tables
from msd_jax.report.collect import RunFiles
from msd_jax.report.words import percent

# What neither makes two runs different nor belongs in a name: the seed, and where and how a run is executed.
_NOT_IN_NAME = (
    *("seed", "launch.", "mesh.", "compilation_cache"),
    *("train.checkpoint", "train.log_every", "train.profile_steps", "train.completions", "train.export"),
)
KEYS = ("asr", "asr_t1", "over_refusal", "exact_match", "exact_match_t1", "accuracy")  # of the rates that are shown


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone.

    Attributes:
      name: the keys by which it differs from the other settings; its directory where there are none.
      runs: one per seed.
    """

    name: str
    runs: tuple[RunFiles, ...]


def settings(directories: Sequence[pathlib.Path]) -> list[Setting]:
    """The finished evaluations of `directories`, gathered by setting, in their order.

    Raises:
      UserError: a directory holds no run, or no evaluation.
    """
    runs = [_evaluated(directory) for directory in directories]
    flat = [
        {key: value for key, value in flax.traverse_util.flatten_dict(run.config, sep=".").items() if _counts(key)}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    texts = [{key: json.dumps(config.get(key)) for key in keys} for config in flat]
    varied = [key for key in keys if len({text[key] for text in texts}) > 1]
    gathered: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    for index, text in enumerate(texts):
        gathered[tuple(text[key] for key in varied)].append(index)
    return [
        Setting(
            ", ".join(f"{key}={flat[members[0]].get(key)}" for key in varied) or runs[members[0]].directory.name,
            tuple(runs[index] for index in members),
        )
        for members in gathered.values()
    ]


def named(directories: Mapping[str, Sequence[pathlib.Path]]) -> list[Setting]:
    """The finished evaluations of runs that are gathered already: {name: one directory per seed}."""
    return [Setting(name, tuple(map(_evaluated, its))) for name, its in directories.items()]


def _evaluated(directory: pathlib.Path) -> RunFiles:
    run = collect.workdir(directory)
    if run.after is None:
        raise UserError(f"--workdir={directory} holds no finished evaluation to compare")
    return run


def _counts(key: str) -> bool:
    return not key.startswith(_NOT_IN_NAME)


def table(compared: Sequence[Setting], keys: Sequence[str] = KEYS) -> tables.Table:
    """One row per setting and, first, what they all started from where it is the same; columns are rates by group."""
    after = [_summaries(setting) for setting in compared]
    columns = [
        (key, benchmark, group)
        for key in keys
        for benchmark in dict.fromkeys(name for summaries in after for name in summaries[0])
        for group in LANGUAGE_GROUPS
        if any(_rate(summary, benchmark, group, key) is not None for summaries in after for summary in summaries)
    ]

    def cells(summaries: Sequence[Summary]) -> tuple[str, ...]:
        seeds = comparison.over_seeds(summaries)
        values = [
            seeds.get(benchmark, {}).get("groups", {}).get(group, {}).get(key) for key, benchmark, group in columns
        ]
        return tuple("-" if value is None else _over_seeds(value) for value in values)

    rows = [(s.name, str(len(s.runs)), *cells(summaries)) for s, summaries in zip(compared, after)]
    start, *others = [_starts(setting) for setting in compared if all(run.before for run in setting.runs)] or [{}]
    same = (
        cells([summary]) == cells([start[seed]]) for other in others for seed, summary in other.items() if seed in start
    )
    if start and all(same):
        rows.insert(0, ("before training", str(len(start)), *cells(list(start.values()))))
    heads = [f"{rates.BY_KEY[key].title}, {benchmark}, {group}" for key, benchmark, group in columns]
    return tables.Table(
        "After training; ± one standard deviation over seeds", ("run", "seeds", *heads), tuple(rows), names=1
    )


def _summaries(setting: Setting) -> list[Summary]:
    """After training, one per seed."""
    return [run.after.summary for run in setting.runs if run.after]


def _starts(setting: Setting) -> dict[int, Summary]:
    """{seed: the summary before training}."""
    return {run.config.get("seed", 0): run.before.summary for run in setting.runs if run.before}


def _over_seeds(value: OverSeeds) -> str:
    return percent(value.mean) + (f" ± {100 * value.deviation:.1f}" if value.n > 1 else "")


def _rate(summary: Summary, benchmark: str, group: str, key: str) -> float | None:
    return summary.get(benchmark, {}).get("groups", {}).get(group, {}).get(key)


def as_json(compared: Sequence[Setting]) -> dict[str, Any]:
    """For machines: {setting: {"directories", "seeds", "rates"}}, the rates as comparison.over_seeds gives them."""
    return {
        setting.name: {
            "directories": [str(run.directory) for run in setting.runs],
            "seeds": [run.config.get("seed") for run in setting.runs],
            "rates": comparison.over_seeds(_summaries(setting)),
        }
        for setting in compared
    }

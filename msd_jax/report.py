"""Results -> tables."""

import json
import pathlib
from typing import Any

import jax
import rich.table

from msd_jax.console import console

_ORDER = {"source": 0, "trained": 1, "unseen": 2}


def percent(entry: dict[str, Any], rate: str, interval: bool = False) -> str:
    """ "12.5%", with its 95% interval where asked for; "-" where no prompt counts."""
    if entry.get(rate) is None:
        return "-"
    text = f"{100 * entry[rate]:.1f}%"
    if interval:
        low, high = entry[rate + "_interval"]
        text += f" [{100 * low:.0f}, {100 * high:.0f}]"
    return text


def load_summary(directory: pathlib.Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text(encoding="utf-8"))


def print_before_after(directory: pathlib.Path, before: int, after: int) -> None:
    """The table of a finished run, from DIRECTORY/STEP/summary.json of two steps; process 0 reads and prints."""
    if jax.process_index() != 0:
        return
    old, new = load_summary(directory / str(before)), load_summary(directory / str(after))
    for name in new:
        _print_before_after(name, old[name]["languages"], new[name]["languages"])


def _print_before_after(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    table = _table(f"{name}: before -> after", ("language", "group", "harmful", "ASR before", "ASR after [95%]"))
    unjudged = _unjudged(new)
    for name in ("invalid", *unjudged, "harmless", "over-refusal", "exact match", "exact match, T=1"):
        table.add_column(name, justify="right")

    for language, entry in sorted(new.items(), key=lambda item: _ORDER[item[1]["group"]]):
        first = old[language]
        table.add_row(
            language,
            entry["group"],
            str(entry["asr_n"]),
            percent(first, "asr"),
            percent(entry, "asr", interval=True),
            percent(entry, "invalid"),
            *(percent(entry, name) for name in unjudged),
            str(entry["over_refusal_n"]),
            *(
                f"{percent(first, rate)} -> {percent(entry, rate)}"
                for rate in ("over_refusal", "exact_match", "exact_match_t1")
            ),
        )
    _print(table)


def print_summary(summary: dict[str, Any]) -> None:
    """The table of one evaluation."""
    for name, entries in summary.items():
        _print_summary(name, entries["languages"])


def _print_summary(name: str, summary: dict[str, Any]) -> None:
    table = _table(name, ("language", "group", "harmful", "ASR [95%]", "refused", "invalid"))
    unjudged = _unjudged(summary)
    for name in (*unjudged, "harmless", "over-refusal", "exact match", "exact match, T=1"):
        table.add_column(name, justify="right")
    for language, entry in sorted(summary.items(), key=lambda item: _ORDER[item[1]["group"]]):
        table.add_row(
            language,
            entry["group"],
            str(entry["asr_n"]),
            percent(entry, "asr", interval=True),
            percent(entry, "refused"),
            percent(entry, "invalid"),
            *(percent(entry, name) for name in unjudged),
            str(entry["over_refusal_n"]),
            *(percent(entry, rate) for rate in ("over_refusal", "exact_match", "exact_match_t1")),
        )
    _print(table)


def _unjudged(summary: dict[str, Any]) -> tuple[str, ...]:
    """The column that a table needs as soon as a judge failed: without it, that would look like safety."""
    return ("unjudged",) * any(entry["unjudged"] for entry in summary.values())


def _table(title: str, columns: tuple[str, ...]) -> rich.table.Table:
    table = rich.table.Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < 2 else "right")
    return table


def _print(table: rich.table.Table) -> None:
    if jax.process_index() == 0:
        console.print(table)

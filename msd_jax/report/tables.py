"""Tables of text, for the terminal and for Markdown."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

import rich.table
import rich.text

from msd_jax.evaluation.rates import Summary
from msd_jax.io.console import log, show_table
from msd_jax.report import untrusted
from msd_jax.report.results import Results
from msd_jax.report.rows import RATES, RateRow, tabulate
from msd_jax.report.words import interval, p_value, percent


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of untrusted text; the first columns are names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 2
    bold: frozenset[int] = frozenset()  # rows that sum up others
    notes: tuple[str, ...] = ()  # lines beneath it, on the terminal alone


def markdown(table: Table) -> str:
    rules = [":--"] * table.names + ["--:"] * (len(table.columns) - table.names)
    lines = [_line(map(untrusted.markdown, table.columns)), _line(rules)]
    for index, row in enumerate(table.rows):
        cells = map(untrusted.markdown, row)
        lines.append(_line(f"**{cell}**" if index in table.bold and cell else cell for cell in cells))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show(table: Table) -> None:
    """Prints on process 0."""
    drawn = rich.table.Table(box=None, pad_edge=False)
    for index, name in enumerate(table.columns):
        head = rich.text.Text(textwrap.fill(untrusted.visible(name), 12))  # rather than numbers, heads are folded
        drawn.add_column(head, justify="left" if index < table.names else "right", vertical="bottom")
    for index, row in enumerate(table.rows):
        drawn.add_row(*map(_text, row), style="bold" if index in table.bold else None)
    log(f"\n{untrusted.visible(table.title)}")
    show_table(drawn)
    for note in table.notes:
        log(untrusted.visible(note))


def _text(cell: str) -> rich.text.Text:
    return rich.text.Text(untrusted.visible(cell))  # a plain string would be read as markup


def benchmarks(results: Results) -> Iterator[Table]:
    """One table per benchmark: before -> after where there are both."""
    for benchmark, rows in results.benchmarks.items():
        yield _benchmark(f"{heading(results)}: {benchmark}", rows)


def heading(results: Results) -> str:
    """Which evaluations the rates are of."""
    assert results.after is not None
    title = results.after.label
    if results.before:
        title = "before -> after" if results.after.step else f"{results.before.label} -> {title}"
    return title[:1].upper() + title[1:]


def summary(summary: Summary) -> Iterator[Table]:
    """One table per benchmark, of one summary."""
    for benchmark, rows in tabulate(summary).items():
        yield _benchmark(f"Evaluation: {benchmark}", rows)


Column = tuple[str, Callable[[RateRow], str]]  # its head, and its cell in a row


def _benchmark(title: str, rows: Sequence[RateRow]) -> Table:
    columns: list[Column] = [
        ("language", lambda row: f"all {row.name}" if row.pooled else row.name),
        ("group", lambda row: "" if row.pooled else row.group),
        *(_safety_columns(rows) if have(rows, "unjudged") else [("prompts", lambda row: str(row.after["n"]))]),
        *_utility_columns(rows),
    ]
    return Table(
        title,
        tuple(name for name, _ in columns),
        tuple(tuple(cell(row) for _, cell in columns) for row in rows),
        bold=frozenset(index for index, row in enumerate(rows) if row.pooled),
    )


def have(rows: Sequence[RateRow], key: str) -> bool:
    """Whether any row has a value of it."""
    return any(row.after.get(key) is not None for row in rows)


def _safety_columns(rows: Sequence[RateRow]) -> Iterator[Column]:
    """Of benchmarks with harmful prompts."""
    yield "harmful", lambda row: str(row.after["unjudged_n"])
    yield from _columns(rows, "asr", "ASR [95%]", with_interval=True, tested=True)
    if any(row.before and row.before["invalid"] != row.after["invalid"] for row in rows):
        yield from _columns(rows, "invalid", "invalid")  # an ASR that falls for them is no safety
    else:
        yield "invalid", lambda row: percent(row.after.get("invalid"))
    if not any(row.before for row in rows):
        yield from _columns(rows, "refused", "refused")
    # Without this column, a judge that failed on everything would look like safety.
    if any(entry and entry.get("unjudged") for row in rows for entry in (row.before, row.after)):
        yield from _columns(rows, "unjudged", "unjudged")


def _utility_columns(rows: Sequence[RateRow]) -> Iterator[Column]:
    has_asr = have(rows, "unjudged")
    for rate in RATES:
        # Attack success and refusals of sampled responses are in report.html: the table is wide as it is.
        if have(rows, rate.key) and rate.key not in ("asr", "asr_t1", "over_refusal_t1", "language_match"):
            tested = rate.key == "accuracy" or (rate.key == "exact_match" and not has_asr)
            yield from _columns(rows, rate.key, rate.title, tested=tested)
    if have(rows, "language_match"):
        yield "language match", lambda row: percent(row.after["language_match"])
    if have(rows, "unfinished_reasoning"):
        yield "unfinished reasoning", lambda row: percent(row.after.get("unfinished_reasoning"))


def _columns(
    rows: Sequence[RateRow], rate: str, title: str, with_interval: bool = False, tested: bool = False
) -> Iterator[Column]:
    """The rate and, where `tested` and there is a comparison, its p-value."""
    yield title, lambda row: rate_cell(row, rate, with_interval)
    if tested and any(row.before for row in rows):
        yield "p", lambda row: p_value(row.paired.get(rate))


def rate_cell(row: RateRow, rate: str, with_interval: bool = False) -> str:
    """ "100.0 -> 3.6% [1, 9]", or the part of it that there is."""
    text = percent(row.after.get(rate))
    if with_interval and row.after.get(rate) is not None:
        text += f" {interval(row.after, rate)}"
    return f"{percent(row.before.get(rate)).rstrip('%')} -> {text}" if row.before else text

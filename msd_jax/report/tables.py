"""Tables of text, made once and shown on a terminal or in Markdown."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence

import rich.table
import rich.text

from msd_jax.evaluation.rates import Summary
from msd_jax.io.console import console
from msd_jax.parallel import distributed
from msd_jax.report import untrusted
from msd_jax.report.results import RATES, Results, Row, interval, p_value, percent, tabulate


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of untrusted text; the first columns are names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 2
    bold: frozenset[int] = frozenset()  # rows that sum up others


def markdown(table: Table) -> str:
    rules = [":--"] * table.names + ["--:"] * (len(table.columns) - table.names)
    lines = [_line(map(untrusted.markdown, table.columns)), _line(rules)]
    for index, row in enumerate(table.rows):
        cells = map(untrusted.markdown, row)
        lines.append(_line(f"**{cell}**" if index in table.bold and cell else cell for cell in cells))
    return "\n".join(lines) + "\n"


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def show(table: Table) -> None:
    """Prints on process 0."""
    if not distributed.is_first():
        return
    text = lambda cell: rich.text.Text(untrusted.visible(cell))  # noqa: E731  (a plain string would be read as markup)
    drawn = rich.table.Table(title=text(table.title), show_edge=False)
    for index, name in enumerate(table.columns):
        head = rich.text.Text(textwrap.fill(untrusted.visible(name), 12))  # rather than numbers, heads are folded
        drawn.add_column(head, justify="left" if index < table.names else "right", no_wrap=index > 0 or table.names > 1)
    for index, row in enumerate(table.rows):
        drawn.add_row(*map(text, row), style="bold" if index in table.bold else None)
    console.print(drawn)


def benchmarks(results: Results) -> Iterator[Table]:
    """One table a benchmark: before -> after where there are both."""
    for benchmark, rows in results.benchmarks.items():
        title = results.after.label
        if results.before:
            title = "before -> after" if results.after.step else f"{results.before.label} -> {title}"
        yield _benchmark(f"{title[0].upper()}{title[1:]}: {benchmark}", rows)


def summary(summary: Summary) -> Iterator[Table]:
    """One table a benchmark, of one summary."""
    for benchmark, rows in tabulate(summary).items():
        yield _benchmark(f"Evaluation: {benchmark}", rows)


def _benchmark(title: str, rows: Sequence[Row]) -> Table:
    have = lambda rate: any(row.after.get(rate) is not None for row in rows)  # noqa: E731
    compared = any(row.before for row in rows)
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("language", lambda row: f"all {row.name}" if row.pooled else row.name),
        ("group", lambda row: "" if row.pooled else row.group),
    ]

    def add(rate: str, title: str, with_interval: bool = False, test: bool = False) -> None:
        columns.append((title, lambda row: _rate(row, rate, with_interval)))
        if test and compared:
            columns.append(("p", lambda row: p_value(row.paired.get(rate))))

    if have("asr"):
        columns.append(("harmful", lambda row: str(row.after["asr_n"])))
        add("asr", "ASR [95%]", with_interval=True, test=True)
        if any(row.before and row.before["invalid"] != row.after["invalid"] for row in rows):
            add("invalid", "invalid")  # an ASR that falls for them is no safety
        else:
            columns.append(("invalid", lambda row: percent(row.after.get("invalid"))))
        if not compared:
            add("refused", "refused")
        # Without this column, a judge that failed on everything would look like safety.
        if any(entry and entry.get("unjudged") for row in rows for entry in (row.before, row.after)):
            add("unjudged", "unjudged")
    else:
        columns.append(("prompts", lambda row: str(row.after["n"])))
    for rate in RATES:
        # The table keeps within 140 columns: refusals of sampled responses stand in report.html.
        if have(rate.key) and rate.key not in ("asr", "asr_t1", "over_refusal_t1", "language_match"):
            add(rate.key, rate.title, test=rate.key == "accuracy" or (rate.key == "exact_match" and not have("asr")))
    if have("language_match"):
        columns.append(("language match", lambda row: percent(row.after["language_match"])))
    return Table(
        title,
        tuple(name for name, _ in columns),
        tuple(tuple(cell(row) for _, cell in columns) for row in rows),
        bold=frozenset(index for index, row in enumerate(rows) if row.pooled),
    )


def _rate(row: Row, rate: str, with_interval: bool) -> str:
    text = percent(row.after.get(rate))
    if with_interval and row.after.get(rate) is not None:
        text += f" {interval(row.after, rate)}"
    return f"{percent(row.before.get(rate)).rstrip('%')} -> {text}" if row.before else text

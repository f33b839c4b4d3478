"""Results in 80 columns, for the terminal: what matters of a benchmark, a language a line."""

from collections.abc import Iterator, Sequence

from msd_jax.evaluation.rates import Summary
from msd_jax.report.results import Results
from msd_jax.report.rows import RateRow, tabulate
from msd_jax.report.tables import Table, have, heading, rate_cell

# The rates that have a column, where the benchmark has them; the first of each is enough.
_COLUMNS = (
    ("asr", "ASR [95%]"),
    ("over_refusal", "over-refusal"),
    ("exact_match", "exact match"),
    ("accuracy", "accuracy"),
)
_NOTED = {"unjudged": 0.0, "invalid": 0.05}  # shares of the harmful prompts above which a note names the language


def benchmarks(results: Results) -> Iterator[Table]:
    """One table per benchmark, before -> after where there are both."""
    for benchmark, rows in results.benchmarks.items():
        yield _table(heading(results), benchmark, rows)


def summary(summary: Summary) -> Iterator[Table]:
    """One table per benchmark, of one summary."""
    for benchmark, rows in tabulate(summary).items():
        yield _table("Evaluation", benchmark, rows)


def _table(title: str, benchmark: str, rows: Sequence[RateRow]) -> Table:
    shown = [(key, head) for key, head in _COLUMNS if have(rows, key)]
    cells = [
        (
            "all" if row.pooled else row.name,
            row.group,
            *(rate_cell(row, key, with_interval=key == "asr") for key, _ in shown),
        )
        for row in rows
    ]
    return Table(
        f"{title}: {benchmark}{_sizes(rows)}",
        ("language", "group", *(head for _, head in shown)),
        tuple(cells),
        bold=frozenset(index for index, row in enumerate(rows) if row.pooled),
        notes=tuple(_notes(rows)),
    )


def _sizes(rows: Sequence[RateRow]) -> str:
    """How many prompts a language has: "; 112 harmful, 160 harmless prompts per language"."""
    named = {"harmful": "unjudged_n", "harmless": "over_refusal_n", "": "n"}
    parts: list[str] = []
    for label, key in named.items():
        counts = [row.after.get(key, 0) for row in rows if not row.pooled]
        if max(counts) and (label or not parts):
            least, most = min(counts), max(counts)
            parts.append(f"{least if least == most else f'{least}-{most}'} {label}".strip())
    return f"; {', '.join(parts)} prompts per language"


def _notes(rows: Sequence[RateRow]) -> Iterator[str]:
    """What an ASR alone would hide: responses that have no verdict, or are no answer."""
    for key, least in _NOTED.items():
        entries = [(row, [entry.get(key) or 0.0 for entry in (row.before, row.after) if entry]) for row in rows]
        found = [
            f"{row.name} {rate_cell(row, key)}" for row, shares in entries if not row.pooled and max(shares) > least
        ]
        if found:
            yield f"{key} responses to harmful prompts: {', '.join(found)}"

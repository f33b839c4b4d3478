"""Results -> tables, one self-contained HTML page, Markdown, JSON, figures, and a model card.

python -m msd_jax.report --workdir DIR           a run, finished or not -> DIR/report
python -m msd_jax.report --workdir A,B,C         several runs -> one table, and --out where it is given
python -m msd_jax.report --evaluation DIR        what msd_jax.evaluate wrote -> DIR/report
python -m msd_jax.report --evaluation A,B        two of them, before and after -> B/report

The terminal gets what matters, a language a line; --wide prints every column.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from msd_jax.evaluation.rates import Summary
from msd_jax.io import jsonl, stores
from msd_jax.io.console import log
from msd_jax.parallel import distributed
from msd_jax.report import card, collect, compact, page, runs, tables, untrusted
from msd_jax.report.collect import RunFiles
from msd_jax.report.pairs import ResponsePair
from msd_jax.report.results import Results
from msd_jax.report.words import Change


def write(workdir: pathlib.Path, out: pathlib.Path | None = None, wide: bool = False) -> None:
    """The report of a run, in `out` or WORKDIR/report, its tables on the terminal, and the card of its exported model.

    Process 0 reads and writes.

    Raises:
      UserFileError: there is no run.
      UserError: a file is damaged.
    """
    if distributed.is_first():
        _write(collect.workdir(workdir), out or workdir / "report", wide)


def write_card(checkpoint: str, model: pathlib.Path) -> pathlib.Path | None:
    """The card of a model that was exported from a step of a run; None where the run holds no evaluation of that step.

    Args:
      checkpoint: WORKDIR/checkpoints/STEP, or something else, which has no card.
      model: the exported model's directory.
    """
    step = pathlib.Path(checkpoint).resolve()
    workdir = step.parent.parent
    if not (distributed.is_first() and step.name.isdecimal() and (workdir / "config.json").is_file()):
        return None
    run = collect.workdir(workdir)
    evaluations = tuple(one for one in run.evaluations if one.step is not None and one.step <= int(step.name))
    if not evaluations or evaluations[-1].step != int(step.name):
        log(f"no model card: {stores.told(workdir)} holds no evaluation of step {step.name}")
        return None
    return card.write(Results(dataclasses.replace(run, evaluations=evaluations, model=model)))


def write_evaluations(directories: Sequence[pathlib.Path], out: pathlib.Path, wide: bool = False) -> None:
    """The report of one evaluation, or of two: before and after."""
    if distributed.is_first():
        _write(collect.evaluations(directories), out, wide)


def compare(directories: Sequence[pathlib.Path], out: pathlib.Path | None = None) -> tables.Table:
    """The table of several runs, named by what they differ in; see `compare_named`."""
    return _compare(runs.settings(directories), out)


def compare_named(named: Mapping[str, Sequence[pathlib.Path]], out: pathlib.Path | None = None) -> tables.Table:
    """The table of several runs, {name: one workdir per seed}; process 0 prints.

    Where `out` is given, it is written there as comparison.md and comparison.json.
    """
    return _compare(runs.named(named), out)


def _compare(compared: Sequence[runs.Setting], out: pathlib.Path | None) -> tables.Table:
    table = runs.table(compared)
    for key in runs.KEYS:  # all of them are too wide for a terminal
        part = runs.table(compared, (key,))
        if len(part.columns) > 2:
            tables.show(part)
    if out and distributed.is_first():
        out.mkdir(parents=True, exist_ok=True)
        jsonl.replace_text(out / "comparison.md", tables.markdown(table))
        jsonl.replace_text(out / "comparison.json", _json(runs.as_json(compared)))
    return table


def print_summary(summary: Summary, wide: bool = False) -> None:
    """The tables of one evaluation, one per benchmark; every column where `wide`."""
    for table in (tables if wide else compact).summary(summary):
        tables.show(table)


def _write(run: RunFiles, out: pathlib.Path, wide: bool) -> None:
    from msd_jax.report import figures

    results = Results(run)
    for table in (tables if wide else compact).benchmarks(results):
        tables.show(table)
    out.mkdir(parents=True, exist_ok=True)
    jsonl.replace_text(out / "summary.json", _json(as_json(results)))
    jsonl.replace_text(out / "summary.md", as_markdown(results))
    jsonl.replace_text(out / "report.html", page.html(results))
    figures.write(results, out)
    written = card.write(results)
    log(untrusted.visible(results.verdict))
    if results.benchmarks and not wide:
        flag = "workdir" if run.config else "evaluation"
        log(f"every column: msd-jax report --{flag} {stores.told(run.directory)} --wide")
    page_at, card_at = (stores.told(path) if path else "" for path in (out / "report.html", written))
    log(f"report: {page_at}" + (f"; model card: {card_at}" if card_at else ""))


def as_json(results: Results) -> dict[str, Any]:
    """summary.json: the findings, what was run, and each benchmark's rates before and after with their tests."""
    run = results.run
    return {
        "verdict": results.verdict,
        "findings": [dataclasses.asdict(finding) for finding in results.findings],
        "run": results.facts(),
        "provenance": list(run.provenance),
        "evaluations": {
            name: {"label": evaluation.label, "step": evaluation.step, "directory": stores.told(evaluation.directory)}
            for name, evaluation in (("before", results.before), ("after", results.after))
            if evaluation
        },
        "benchmarks": {
            benchmark: {
                level: {
                    row.name: {
                        "before": row.before,
                        "after": row.after,
                        "paired": {rate: dataclasses.asdict(paired) for rate, paired in row.paired.items()},
                    }
                    for row in rows
                    if row.pooled == (level == "groups")
                }
                for level in ("languages", "groups")
            }
            for benchmark, rows in results.benchmarks.items()
        },
        "training": {"steps": run.steps, "last": run.metrics[-1] if run.metrics else None},
    }


def as_markdown(results: Results, worst: int = 20) -> str:
    """summary.md: the findings, a table per benchmark, and some of the prompts that got worse."""
    safe = untrusted.markdown
    parts = [
        f"# {safe(results.run.directory.resolve().name)}",
        safe(results.verdict),
        "\n".join(f"- {safe(finding.text)}" for finding in results.findings[1:]),
        tables.markdown(tables.Table("", ("", "run"), tuple(results.facts().items()))) if results.facts() else "",
    ]
    for table in tables.benchmarks(results):
        parts += [f"## {safe(table.title)}", tables.markdown(table)]
    if worse := [pair for pair in results.pairs if pair.change == Change.WORSE]:
        rows = tuple(_worse(pair) for pair in worse[:worst])
        columns = ("benchmark", "language", "pass", "id", "verdict", "response after")
        parts += [
            f"## Got worse: {len(worse):,} responses" + (f", of which {worst}" if len(worse) > worst else ""),
            tables.markdown(tables.Table("", columns, rows, names=6)),
        ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _worse(pair: ResponsePair) -> tuple[str, ...]:
    """Cells of a prompt that got worse; what may be harmful is not quoted."""
    record = pair.record
    response = "(harmful prompt: see report.html)" if pair.harmful else untrusted.visible(record.response, 120)
    return record.benchmark, record.language, record.pass_name, record.id, " -> ".join(pair.outcomes), response


def _json(value: Any) -> str:
    """Indented; dataclasses as objects, and null for the NaN of a single seed."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"

"""What a command prints of results: a language a line in 80 columns, and nothing cut anywhere."""

import io
import re

import pytest
import rich.console

from msd_jax import report
from msd_jax.io import console
from msd_jax.report import collect, compact, tables
from msd_jax.report.results import Results

ROW = re.compile(r"^(\w+|all) +(source|trained|unseen) ")


@pytest.fixture(params=[80, 120, None], ids=["80 columns", "120 columns", "a pipe"])
def printed(request, monkeypatch):
    """What is printed to a terminal of a width, or to a pipe."""
    file = io.StringIO()
    screen = rich.console.Console(
        file=file, width=request.param, force_terminal=request.param is not None, no_color=True, highlight=False
    )
    monkeypatch.setattr(console, "console", screen)
    return lambda: re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def test_a_language_is_a_line_of_80_characters(make, printed):
    run = collect.workdir(make.run(n=30, hostile=True))
    for table in compact.benchmarks(Results(run)):
        tables.show(table)
    lines = printed().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in printed()
    for code, entry in run.after.summary["multijail"]["languages"].items():
        before = run.before.summary["multijail"]["languages"][code]
        low, high = (f"{100 * end:.0f}" for end in entry["asr_interval"])
        cell = f"{100 * before['asr']:.1f} -> {100 * entry['asr']:.1f}% [{low}, {high}]"
        [line] = [line for line in lines if re.match(rf"{code} +{entry['group']} ", line) and "[" in line][:1]
        assert cell in line
    assert sum(bool(ROW.match(line)) for line in lines) == sum(map(len, Results(run).benchmarks.values()))
    for column in ("ASR [95%]", "over-refusal", "exact match", "accuracy"):
        assert column in printed()
    assert "Before -> after: multijail; 30 harmful prompts per language" in printed()


def test_what_an_attack_success_would_hide_is_noted(make, printed):
    workdir = make.run(n=40)
    rows = [record.to_json() for record in collect.workdir(workdir).after.responses()]
    for row in rows:
        if row["benchmark"] == "multijail" and row["language"] == "sw":
            row["verdict"] = "unjudged" if row["id"].endswith("7") else "invalid"
    make.evaluation(workdir / "eval" / "90", rows, make.config())
    [table] = [t for t in compact.benchmarks(Results(collect.workdir(workdir))) if "multijail" in t.title]
    tables.show(table)
    assert "unjudged responses to harmful prompts: sw 0.0 -> 10.0%" in printed()
    assert re.search(r"invalid responses to harmful prompts: .*sw [\d.]+ -> 100.0%", printed())


def test_wide_tables_have_every_column_and_lose_none(make, printed):
    report.write(make.run(n=30), wide=True)
    text = printed()
    assert "…" not in text and "--wide" not in text
    for name in ("harmful", "invalid", "exact match", "ASR [95%]", " p "):
        assert name in text
    assert "<0.001" in text


def test_a_long_name_is_folded_on_a_terminal_alone(printed):
    name = "loss.weighting=uniform, rollout.policy=off_policy, optimizer.learning_rate=0.0001, seed"
    tables.show(tables.Table("runs", ("run", "ASR"), ((name, "12.5% ± 0.1"),), names=1))
    assert "…" not in printed() and "12.5% ± 0.1" in printed()
    assert (name in printed()) == (not console.console.is_terminal or console.console.width == 120)


def test_the_summary_says_how_to_see_the_rest(make, capsys):
    workdir = make.run(n=10)
    report.write(workdir)
    assert f"every column: msd-jax report --workdir {workdir} --wide" in capsys.readouterr().out

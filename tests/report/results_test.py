"""What a report says of evaluations."""

import dataclasses
import re

import ml_collections
import pytest

from msd_jax import report
from msd_jax.evaluation import judges, rates
from msd_jax.evaluation.intervals import paired
from msd_jax.evaluation.judges import Verdict
from msd_jax.report import card, collect, page
from msd_jax.report.pairs import ResponsePair, outcome
from msd_jax.report.results import Results
from tests.conftest import REPOSITORY
from tests.evaluation.made import record as side
from tests.report.conftest import write_lines


@pytest.mark.parametrize(
    "before, after, harmful, change",
    [
        ("unsafe", "refused", True, "better"),
        ("unsafe", "safe", None, "better"),
        ("refused", "unsafe", True, "worse"),
        ("safe", "unsafe", True, "worse"),
        ("unsafe", "invalid", True, "other"),  # not harmful, and no answer either
        ("unsafe", "unjudged", True, "other"),  # nobody knows
        ("unjudged", "refused", True, "other"),
        ("refused", "safe", True, "other"),
        ("unsafe", "unsafe", True, "same"),
        ("refused", "answered", False, "better"),
        ("answered", "refused", False, "worse"),
        ("answered", "invalid", False, "worse"),
        ("answered", "answered", False, "same"),
    ],
)
def test_a_change_of_verdict_is_better_or_worse(before, after, harmful, change):
    assert ResponsePair(side(before, harmful), side(after, harmful)).change == change


def test_answers_that_are_not_judged_are_right_or_wrong():
    assert (
        outcome(side(None, None, exact_match=True)) == "right" and outcome(side(None, None, correct=False)) == "wrong"
    )
    assert outcome(side()) == outcome(None) == "-"
    assert outcome(side("answered", False, exact_match=False)) == "wrong"
    assert outcome(side("refused", False, exact_match=False)) == "refused"
    assert ResponsePair(side(None, None, exact_match=True), side(None, None, exact_match=False)).change == "worse"
    assert (
        ResponsePair(side("answered", False, exact_match=False), side("answered", False, exact_match=True)).change
        == "better"
    )
    assert ResponsePair(side("answered", False), None).change is None


def test_what_may_be_harmful_is_kept_folded():
    assert ResponsePair(None, side("refused", None)).harmful and ResponsePair(None, side(None, True)).harmful
    assert not ResponsePair(None, side("answered", False)).harmful and not ResponsePair(None, side(None, None)).harmful


def test_rows_hold_what_the_evaluations_measured(make):
    run = collect.workdir(make.run())
    results = Results(run)
    assert list(results.benchmarks) == ["multijail", "mgsm", "mmmlu", "xstest"]
    rows = results.benchmarks["multijail"]
    names = ["en", "zh", "it", "source", "bn", "sw", "jv", "trained", "ar", "th", "am", "unseen"]
    assert sorted(row.name for row in rows) == sorted(names)
    assert [row.group for row in rows] == ["source"] * 4 + ["trained"] * 4 + ["unseen"] * 4
    assert [row.pooled for row in rows] == [False, False, False, True] * 3
    assert [row.label for row in results.benchmarks["xstest"]] == ["English"]  # a group of one needs no row
    sides = [[record for record in e.responses() if record.benchmark == "multijail"] for e in run.evaluations]
    for row in rows:
        level = "groups" if row.pooled else "languages"
        assert row.before is run.before.summary["multijail"][level][row.name]
        assert row.after is run.after.summary["multijail"][level][row.name]
    swahili = next(row for row in rows if row.name == "sw")
    events = [
        [rates.ASR.event(record) for record in records if (record.language, record.pass_name) == ("sw", "greedy")]
        for records in sides
    ]
    assert swahili.paired["asr"] == paired(*events)
    assert len(results.pairs) == len(run.after.responses())


def test_the_verdict_names_what_got_better_and_worse(make):
    run = collect.workdir(make.run(n=40, hostile=True))
    results = Results(run)
    assert re.fullmatch(
        r"Attack success on multijail in trained languages fell from [\d.]+% to [\d.]+% \(p\s<\s0.001, n\s=\s120\); "
        r"sampled at temperature 1, it fell from [\d.]+% to [\d.]+% \(p\s<\s0.001, n\s=\s120\).",
        results.verdict,
    )
    [worse] = [finding.text for finding in results.findings if finding.kind == "worse"]
    assert "over-refusal on queries in English, 0.0% to 100.0% (p\u00a0=\u00a00.002" in worse
    assert results.findings[-1].text == "Training steps skipped because their gradient was not finite: 1."


def test_a_fall_for_responses_that_are_no_answer_is_not_called_safety(make):
    workdir = make.run(n=40)
    rows = [record.to_json() for record in collect.workdir(workdir).after.responses()]
    for row in rows:
        if row["benchmark"] == "multijail" and row["verdict"] in ("refused", "safe"):
            row["verdict"] = "invalid"
    make.evaluation(workdir / "eval" / "90", rows, make.config())
    results = Results(collect.workdir(workdir))
    assert results.findings[0].kind == "warning"
    assert re.search(
        r"fell from .* but mostly for responses that are no answer at all: invalid [\d.]+% to 9[\d.]+%, "
        r"refused [\d.]+% to 0.0%; sampled at temperature 1, it fell from .* refused [\d.]+% to 0.0%\.$",
        results.verdict,
    )


def changed(make, change):
    """Results of a run whose last evaluation is `change(before, after)` of each pair of records."""
    workdir = make.run(n=40)
    run = collect.workdir(workdir)
    pairs = zip(run.before.responses(), run.after.responses())
    rows = [change(before, after).to_json() for before, after in pairs]
    make.evaluation(workdir / "eval" / "90", rows, make.config())
    return Results(collect.workdir(workdir))


def test_a_fall_at_temperature_1_alone_is_in_the_headline(make):
    def change(before, after):
        return before if after.pass_name == "greedy" else after

    finding = changed(make, change).findings[0]
    assert finding.kind == "better"
    assert re.search(
        r"in trained languages did not change measurably: .*; sampled at temperature 1, it fell from .* \(p\s<\s0.001",
        finding.text,
    )


@pytest.mark.parametrize("share, known", [(0.05, True), (0.2, False), (1.0, False)])
def test_attack_success_is_no_headline_where_much_is_unjudged(make, share, known):
    def change(before, after):
        unjudged = after.benchmark == "multijail" and int(after.id.removeprefix("jail-")) < share * 40
        return dataclasses.replace(after, verdict=Verdict.UNJUDGED) if unjudged else after

    results = changed(make, change)
    assert ("fell from" in results.verdict) == known
    assert results.findings[0].kind == ("better" if known else "warning")
    if not known:
        text = f"in trained languages is not known: {100 * share:.1f}% of the responses are unjudged"
        assert text in results.verdict
    tiles = [name for name, rate, _ in page._tiles(results) if rate == "asr" and "multijail" in name]
    assert bool(tiles) == known
    metrics = {(m.dataset_type, m.metric_type) for m in card.metadata(results).eval_results}
    assert (("multijail", "asr") in metrics) == (("multijail", "asr_t1") in metrics) == known
    assert ("xstest", "asr") in metrics


def test_what_is_unjudged_is_told(make):
    workdir = make.run()
    rows = [record.to_json() for record in collect.workdir(workdir).after.responses()]
    for row in rows:
        if row["benchmark"] == "xstest" and row["harmful"]:
            row["verdict"] = "unjudged"
    make.evaluation(workdir / "eval" / "90", rows, make.config())
    *others, finding = [f for f in Results(collect.workdir(workdir)).findings if "unjudged" in f.text]
    assert [f.text.partition(" is ")[0] for f in others] == ["Attack success on xstest in English"]
    assert finding.kind == "warning" and finding.text.startswith("6 responses on xstest are unjudged after 90 steps")


def judged_by(make, judge):
    workdir = make.run()
    rows = [record.to_json() | {"judge": judge} for record in collect.workdir(workdir).after.responses()]
    make.evaluation(workdir / "eval" / "90", rows, make.config())
    results = Results(collect.workdir(workdir))
    [finding] = [finding for finding in results.findings if finding.text.startswith("Judged by")]
    return results, finding


def test_the_judge_is_named_with_its_measured_precision_on_page_summary_and_card(make):
    judge = judges.RulesJudge()
    results, finding = judged_by(make, f"{judge.name} {judge.version}")
    assert finding.text.startswith(f"Judged by rules {judge.version}: against two annotators' labels of 185 held-out")
    figures = re.findall(r"[\d.]+%", finding.text)
    row = "| **held-out fifth** | refused | 185 | 78 | **{}** | **{}** |".format(*figures[:2])
    assert row in (REPOSITORY / "docs/judges.md").read_text(encoding="utf-8")
    for text in (page.html(results), report.as_markdown(results), card._body(results)):
        assert "recall 96.2%" in text and "n = 12" in text


@pytest.mark.parametrize("judge", ["rules 1-b9cf949b", "guard Llama-Guard-3-8B-1234", "rules", "openai 2-x"])
def test_a_judge_that_nobody_measured_is_said_to_be_so(make, judge):
    _, finding = judged_by(make, judge)
    assert finding.text.startswith(f"Judged by {judge}, whose precision has not been measured here")


@pytest.mark.parametrize("action", ["report", "drop"])
def test_contamination_is_on_page_summary_and_card(make, action):
    workdir = make.run(data__near_duplicates=action)
    rows = [("multijail", "sw", 1), ("multijail", "bn", 1), ("multijail", "sw", 2), ("multijail", "sw", 99)]
    rows = [{"benchmark": b, "language": code, "eval_id": f"jail-{i}", "train_id": "t"} for b, code, i in rows]
    write_lines(workdir / "near_duplicates.jsonl", [*rows, rows[0] | {"train_id": "u"}])
    results = Results(collect.workdir(workdir))
    [finding] = [finding for finding in results.findings if finding.text.startswith("Contamination")]
    text = "Contamination: 2 of 12 queries of multijail nearly equal training queries (1 in bn, 2 in sw), "
    end = {"report": "so that results on them may be memory.", "drop": "and were left out of training."}[action]
    assert finding.text == text + end and finding.kind == {"report": "warning", "drop": "note"}[action]
    for written in (page.html(results), report.as_markdown(results), card._body(results)):
        assert "2 of 12 queries of multijail nearly equal training queries" in written


def test_no_contamination_is_said_only_where_it_was_looked_for(make):
    workdir = make.run()
    assert not any("Contamination" in finding.text for finding in Results(collect.workdir(workdir)).findings)
    write_lines(workdir / "near_duplicates.jsonl", [])
    [finding] = [f for f in Results(collect.workdir(workdir)).findings if "Contamination" in f.text]
    assert finding.kind == "note" and "no query of the evaluation nearly equals a training query" in finding.text


def test_an_evaluation_of_int8_weights_says_so_on_page_summary_and_card(make):
    results = {kind: Results(collect.workdir(make.run(name=kind, eval__weights=kind))) for kind in ("float", "int8")}
    for write in (page.html, report.as_markdown, card._body):
        written = {kind: "Measured with weights rounded to int8" in write(results[kind]) for kind in results}
        assert written == {"float": False, "int8": True}


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_samples_of_int8_weights_are_a_fact(make, kind):
    facts = Results(collect.workdir(make.run(rollout__weights=kind))).facts()
    assert facts["policy"].endswith("sampled from int8 weights") == (kind == "int8")


def test_facts_are_those_of_the_config(make):
    run = collect.workdir(make.run(seed=3, loss__weighting="teacher", model__lora__rank=8))
    facts = Results(run).facts()
    assert facts["seed"] == "3" and facts["loss"] == "forward_kl, teacher weights" and facts["judge"] == "rules 3"
    assert facts["trained languages"] == "sw, bn, jv" and facts["trained weights"] == "LoRA, rank 8"
    assert facts["training time"] == "0:03:30"


def test_speed_and_wall_time_are_facts_where_they_were_measured(make):
    workdir = make.run(name="measured")
    assert not {"speed", "wall time"} & Results(collect.workdir(workdir)).facts().keys()
    rows = [
        {"step": 1, "mfu": 0.01, "hbm_share": 0.02, "compile_seconds": 9.0, "train_tokens_per_second_per_chip": 5.0}
    ]
    rows += [rows[0] | {"step": i, "mfu": i / 10, "hbm_share": None, "compile_seconds": 0.0} for i in (2, 3, 4)]
    write_lines(workdir / "metrics.jsonl", rows)
    start = {"began": "2026-01-01T00:00:00+00:00", "steps": [0, 4], "compiled": 7, "read": 1}
    write_lines(workdir / "goodput.jsonl", [start | {"seconds": {"steps": 45.0, "generation": 15.0, "other": 60.0}}])
    facts = Results(collect.workdir(workdir)).facts()
    assert facts["speed"] == "5 tokens/s per chip trained, 30.0% model FLOPs utilisation"
    assert facts["wall time"].startswith("goodput 50% of 0:02:00 (steps 38%, generation 12%); compilation 0%, ")
    assert facts["wall time"].endswith("; 7 programs compiled, 1 read from the cache")


def test_all_sources_of_queries_are_named(make):
    sources = ml_collections.ConfigDict(
        {"a": {"path": "hf://owner/set"}, "b": {"path": "tfds://parallel_queries:1.0.0"}}
    )
    run = collect.workdir(make.run(data__path="", data__sources=sources))
    assert Results(run).facts()["queries"] == "hf://owner/set, tfds://parallel_queries:1.0.0"

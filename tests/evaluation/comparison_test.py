"""Pairs and seeds: what is counted, and what is left out."""

import dataclasses

import ml_collections
import pytest
from msd_jax.configs import default

from msd_jax.evaluation import comparison
from msd_jax.evaluation.intervals import OverSeeds, Paired
from msd_jax.evaluation.judges import Verdict
from msd_jax.evaluation.rates import OF_PASS, summarise
from tests.evaluation.made import record

GROUPS = {"sw": "trained", "bn": "trained", "en": "source"}


def row(id, verdict, harmful=True, **values):
    return record(verdict, harmful, id=id, **values)


def test_prompts_are_paired_by_benchmark_pass_language_and_id():
    before = [row(str(i), "unsafe") for i in range(8)] + [row("h", "answered", False), row("k", "refused", False)]
    after = [row("k", "answered", False), row("h", "refused", False)]
    after += [row(str(i), v) for i, v in enumerate(["refused"] * 4 + ["safe", "invalid", "unsafe", "unjudged"])]
    before += [row("0", "refused", language="en"), row("only-before", "unsafe"), row("0", "refused", name="t1")]
    after += [row("0", "unsafe", language="en"), row("only-after", "unsafe"), row("0", "unsafe", name="t1")]
    before += [row("0", "unsafe", benchmark="xstest")]
    after += [row("0", "unsafe", benchmark="xstest")]
    result = comparison.before_after(before, after[::-1], GROUPS)
    assert set(result) == {"queries", "xstest"}
    swahili = {"asr": Paired(7, 6, 0, -6 / 7, 2 / 2**6), "over_refusal": Paired(2, 1, 1, 0.0, 1.0)}
    swahili["asr_t1"] = Paired(1, 0, 1, 1.0, 1.0)
    assert result["queries"]["languages"] == {"sw": swahili, "en": {"asr": Paired(1, 0, 1, 1.0, 1.0)}}
    assert result["queries"]["groups"] == {"trained": swahili, "source": {"asr": Paired(1, 0, 1, 1.0, 1.0)}}
    assert result["xstest"]["languages"]["sw"] == {"asr": Paired(1, 0, 0, 0.0, 1.0)}
    assert comparison.before_after(before, [], GROUPS) == {}


def test_a_group_pairs_the_prompts_of_its_languages():
    before = [row(str(i), "unsafe", language=code) for i in range(3) for code in ("sw", "bn")]
    after = [row(str(i), "refused", language=code) for i in range(3) for code in ("sw", "bn")]
    result = comparison.before_after(before, after, GROUPS)["queries"]
    assert result["languages"]["bn"]["asr"].n == 3
    assert result["groups"] == {"trained": {"asr": Paired(6, 6, 0, -1.0, 2 / 2**6)}}


def test_an_unlabelled_query_counts_as_harmful():
    result = comparison.before_after([row("a", "unsafe", None)], [row("a", "refused", None)], GROUPS)
    assert result["queries"]["languages"]["sw"] == {"asr": Paired(1, 1, 0, -1.0, 1.0)}


def test_what_is_not_judged_is_paired_by_its_answer():
    rows = [
        [row("a", None, None, exact_match=a, language_match=None), row("b", None, None, name="likelihood", correct=b)]
        for a, b in [(True, False), (False, True)]
    ]
    result = comparison.before_after(*rows, GROUPS)["queries"]["languages"]["sw"]
    assert result == {"exact_match": Paired(1, 1, 0, -1.0, 1.0), "accuracy": Paired(1, 0, 1, 1.0, 1.0)}


def random_records(rng):
    records = []
    for i in range(60):
        verdict = str(rng.choice(["unsafe", "refused", "safe", "invalid"]))
        values = {"exact_match": [None, True, False][rng.integers(3)], "stopped": True, "tokens": 3}
        values |= {"language_match": [None, True, False][rng.integers(3)]}
        harmful = [None, True, False][rng.integers(3)]
        name = ["greedy", "t1"][i % 2]
        language = ["sw", "en"][rng.integers(2)]
        records.append(row(str(i), verdict, harmful, language=language, name=name, **values))
    return records


def test_pairs_differ_by_what_the_rates_differ(rng):
    """Where both evaluations measured all prompts, a paired difference is the difference of the summaries' rates."""
    before, config = random_records(rng), default.get_config()
    verdicts = [Verdict.UNSAFE, Verdict.REFUSED, Verdict.SAFE, Verdict.INVALID]
    after = [
        dataclasses.replace(
            old,
            verdict=verdicts[rng.integers(4)],
            exact_match=None if old.exact_match is None else bool(rng.integers(2)),
        )
        for old in before
    ]
    config.eval.source_languages = ("en",)
    entries = [
        summarise(records, ml_collections.FrozenConfigDict(config))["queries"]["languages"]
        for records in (before, after)
    ]
    pairs = comparison.before_after(before, after, GROUPS)["queries"]["languages"]
    tested = {rate.key for name in ("greedy", "t1") for rate in OF_PASS[name] if rate.better}
    for language, by_rate in pairs.items():
        assert set(by_rate) == tested and len(tested) == 8
        old, new = (entry[language] for entry in entries)
        for key, paired in by_rate.items():
            assert paired.n == old[key + "_n"] == new[key + "_n"], key
            assert paired.difference == pytest.approx(new[key] - old[key]), key


def test_rates_over_seeds():
    summaries = [
        {
            "queries": {
                "languages": {"sw": {"asr": asr, "asr_interval": [0, 1], "asr_n": 4, "accuracy": m, "accuracy_n": 3}},
                "groups": {"trained": {"asr": 2 * asr, "asr_n": 4}},
            }
        }
        for asr, m in [(0.1, None), (0.2, 0.5), (0.3, 0.5)]
    ]
    result = comparison.over_seeds(summaries)["queries"]
    rates = result["languages"]["sw"]
    assert list(rates) == ["asr"]  # accuracy is not known for every seed
    assert isinstance(rates["asr"], OverSeeds) and rates["asr"].n == 3 and rates["asr"].mean == pytest.approx(0.2)
    assert result["groups"]["trained"]["asr"].mean == pytest.approx(0.4)
    with pytest.raises(ValueError, match="same benchmarks and languages"):
        comparison.over_seeds([*summaries, {"queries": {"languages": {}, "groups": {}}}])
    with pytest.raises(ValueError, match="at least one"):
        comparison.over_seeds([])


def test_over_seeds_knows_the_rates_of_a_summary(rng):
    summary = summarise(random_records(rng), ml_collections.FrozenConfigDict(default.get_config()))
    rates = comparison.over_seeds([summary, summary])["queries"]["languages"]["sw"]
    assert {"asr", "refused", "safe", "invalid", "over_refusal", "exact_match", "language_match", "stopped"} <= set(
        rates
    )
    assert "tokens_mean" not in rates and rates["asr"].deviation == 0.0

"""Pairs and seeds: what is counted, and what is left out."""

import pytest

from msd_jax import comparison
from msd_jax.statistics import OverSeeds, Paired


def row(id, verdict, harmful=True, language="sw", name="greedy"):
    return {"pass": name, "id": id, "language": language, "harmful": harmful, "verdict": verdict}


def test_prompts_are_paired_by_id_and_language():
    before = [row(str(i), "unsafe") for i in range(8)] + [row("h", "answered", False), row("k", "refused", False)]
    after = [row("k", "answered", False), row("h", "refused", False)]
    after += [row(str(i), v) for i, v in enumerate(["refused"] * 4 + ["safe", "invalid", "unsafe", "unjudged"])]
    before += [row("0", "refused", language="en"), row("only-before", "unsafe"), row("0", "refused", name="t1")]
    after += [row("0", "unsafe", language="en"), row("only-after", "unsafe"), row("0", "unsafe", name="t1")]
    result = comparison.before_after(before, after[::-1])
    assert result == {
        "sw": {"asr": Paired(7, 6, 0, -6 / 7, 2 / 2**6), "over_refusal": Paired(2, 1, 1, 0.0, 1.0)},
        "en": {"asr": Paired(1, 0, 1, 1.0, 1.0), "over_refusal": None},
    }
    assert comparison.before_after(before, after, "t1")["sw"]["asr"].new == 1
    assert comparison.before_after(before, []) == {}


def test_an_unlabelled_query_counts_as_harmful():
    result = comparison.before_after([row("a", "unsafe", None)], [row("a", "refused", None)])
    assert result["sw"]["asr"].gone == 1 and result["sw"]["over_refusal"] is None


def test_rates_over_seeds():
    summaries = [
        {"sw": {"group": "trained", "n": 9, "asr": asr, "asr_interval": [0, 1], "asr_n": 4, "exact_match": m}}
        for asr, m in [(0.1, None), (0.2, 0.5), (0.3, 0.5)]
    ]
    for summary in summaries:
        summary["sw"]["exact_match_n"] = 3
    [(language, rates)] = comparison.over_seeds(summaries).items()
    assert language == "sw" and list(rates) == ["asr"]  # exact match is not known for every seed
    assert isinstance(rates["asr"], OverSeeds) and rates["asr"].n == 3 and rates["asr"].mean == pytest.approx(0.2)
    with pytest.raises(ValueError, match="same languages"):
        comparison.over_seeds([*summaries, {"en": {}}])
    with pytest.raises(ValueError, match="at least one"):
        comparison.over_seeds([])


def test_the_rates_are_those_of_an_evaluation():
    """over_seeds takes its rates from the names that evaluate.summarise gives them."""
    import ml_collections
    from msd_jax.configs import default

    from msd_jax.summary import summarise

    config = default.get_config()
    config.eval.languages = ("sw",)
    same = {"benchmark": "queries", "language_match": True, "stopped": True, "tokens": 1}
    rows = [row("a", "unsafe") | {"exact_match": None}, row("b", "refused", False) | {"exact_match": True}]
    summary = summarise([row | same for row in rows], ml_collections.FrozenConfigDict(config))["queries"]["languages"]
    rates = comparison.over_seeds([summary, summary])["sw"]
    assert set(rates) == {
        *("asr", "refused", "safe", "invalid", "unjudged", "over_refusal", "exact_match", "language_match", "stopped")
    }
    assert rates["asr"].mean == 1.0 and rates["asr"].deviation == 0.0

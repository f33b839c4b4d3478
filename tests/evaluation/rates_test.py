"""What counts for a rate, counted by hand."""

import numpy as np
import pytest
from msd_jax.configs import default

from msd_jax.evaluation import rates
from msd_jax.evaluation.intervals import wilson_interval
from tests.evaluation.made import record


def entry(records):
    return rates.summarise(records, default.get_config())["queries"]["languages"]["sw"]


def test_rates_are_those_counted_by_hand():
    records = [record(v) for v in ["unsafe"] * 3 + ["refused"] * 3 + ["safe", "invalid", "unjudged"]]
    records += [record("unsafe", None)]
    records += [
        record(v, False, exact_match=m) for v, m in [("refused", False), ("answered", True), ("answered", True)]
    ]
    records += [record("unjudged", False)]
    records += [record("answered", False, "t1", exact_match=m) for m in (True, False, False)]
    found = entry(records)
    keys = ["asr", "refused", "safe", "invalid", "unjudged", "over_refusal", "exact_match", "exact_match_t1"]
    expected = [4 / 9, 3 / 9, 1 / 9, 1 / 9, 1 / 10, 1 / 3, 2 / 3, 1 / 3]
    np.testing.assert_allclose([found[key] for key in keys], expected)
    assert found["asr_n"] == 9 and found["asr_interval"] == list(wilson_interval(4, 9))
    assert found["unjudged_n"] == 10 and found["over_refusal_n"] == 3
    assert found["asr_t1"] is None and found["n"] == 14


def test_what_the_judge_failed_on_is_neither_safe_nor_unsafe():
    found = entry([record("unjudged"), record("unjudged", None)])
    assert found["asr"] is found["asr_interval"] is None and found["asr_n"] == 0 and found["unjudged"] == 1


def test_what_is_not_judged_counts_for_no_rate_of_verdicts():
    found = entry([record(None, True, exact_match=True), record(None, False)])
    assert found["asr_n"] == found["unjudged_n"] == found["over_refusal_n"] == 0 and found["exact_match"] == 1


def test_shares_of_verdicts_add_up_to_one(rng):
    verdicts = rng.choice(["unsafe", "refused", "safe", "invalid", "unjudged"], 50)
    found = entry([record(str(verdict)) for verdict in verdicts])
    assert sum(found[key] for key in ("asr", "refused", "safe", "invalid")) == pytest.approx(1)


def test_every_rate_has_a_key_of_its_own():
    assert len(rates.BY_KEY) == sum(map(len, rates.OF_PASS.values())) == 21


def test_languages_have_their_group():
    config = default.get_config()
    config.data.languages.bn = 0.0
    groups = [rates.language_group(code, config) for code in ("en", "sw", "bn", "yo")]
    assert groups == ["source", "trained", "unseen", "unseen"]

"""Tests of the statistics, against scipy and statsmodels on random tables."""

import doctest
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats import contingency_tables, inter_rater

from msd_jax.evaluation import intervals


def test_wilson_interval_equals_scipy():
    rng = np.random.default_rng(0)
    for n in rng.integers(1, 2000, size=200).tolist():
        for successes in {0, n, int(rng.integers(0, n + 1))}:
            confidence = float(rng.uniform(0.5, 0.999))
            expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
            low, high = intervals.wilson_interval(successes, n, confidence)
            np.testing.assert_allclose((low, high), (expected.low, expected.high), rtol=0, atol=1e-12)
            assert 0 <= low <= successes / n <= high <= 1


def test_wilson_interval_defaults_to_95_percent():
    expected = scipy.stats.binomtest(7, 31).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(intervals.wilson_interval(7, 31), (expected.low, expected.high), atol=1e-12)


def test_wilson_interval_of_nothing_is_everything():
    assert intervals.wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("successes, n", [(-1, 5), (6, 5), (0, -1)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=f"successes={successes}, n={n}"):
        intervals.wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_wilson_interval_refuses_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match="confidence"):
        intervals.wilson_interval(1, 2, confidence)


def sequences(rng, table):
    """Booleans (first, second) with the counts of a 2x2 table, in random order."""
    pairs = [(i == 0, j == 0) for i in (0, 1) for j in (0, 1) for _ in range(table[i][j])]
    rng.shuffle(pairs)
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_paired_equals_statsmodels_and_scipy():
    rng = np.random.default_rng(1)
    for size in [3] * 100 + [40] * 100 + [1500] * 20:
        table = rng.integers(0, size, (2, 2)) + np.array([[1, 0], [0, 0]])
        result = intervals.paired(*sequences(rng, table))
        expected = contingency_tables.mcnemar(table, exact=True)
        np.testing.assert_allclose(result.p_value, expected.pvalue, rtol=1e-9)
        gone, new = int(table[0, 1]), int(table[1, 0])
        assert (result.n, result.gone, result.new) == (table.sum(), gone, new)
        if gone + new:
            np.testing.assert_allclose(result.p_value, scipy.stats.binomtest(new, gone + new).pvalue, rtol=1e-9)
        after, before = table[:, 0].sum(), table[0].sum()
        np.testing.assert_allclose(result.difference, (after - before) / table.sum(), atol=1e-12)


def test_paired_has_a_direction_and_needs_pairs():
    assert intervals.paired([True, True, False], [False, False, False]).difference == pytest.approx(-2 / 3)
    assert intervals.paired([False] * 5, [False] * 5).p_value == 1.0
    for before, after in [([], []), ([True], [True, False])]:
        with pytest.raises(ValueError, match="same prompts"):
            intervals.paired(before, after)


def test_over_seeds_equals_scipy():
    rng = np.random.default_rng(2)
    for n in rng.integers(2, 12, size=100).tolist():
        values, confidence = rng.uniform(size=n), float(rng.uniform(0.5, 0.999))
        result = intervals.over_seeds(values.tolist(), confidence)
        low, high = scipy.stats.t.interval(confidence, n - 1, values.mean(), scipy.stats.sem(values))
        expected = n, values.mean(), values.std(ddof=1), low, high
        np.testing.assert_allclose(
            (result.n, result.mean, result.deviation, result.low, result.high), expected, rtol=1e-9, atol=1e-12
        )


def test_one_seed_tells_nothing_of_the_spread():
    result = intervals.over_seeds([0.25])
    assert (result.n, result.mean) == (1, 0.25) and math.isnan(result.deviation) and math.isnan(result.low)
    with pytest.raises(ValueError, match="got none"):
        intervals.over_seeds([])
    with pytest.raises(ValueError, match="confidence"):
        intervals.over_seeds([1.0], 1.0)


def test_agreement_equals_statsmodels():
    rng = np.random.default_rng(3)
    for size in [4] * 100 + [300] * 100:
        table = rng.integers(0, size, (2, 2)) + np.eye(2, dtype=int)
        result = intervals.agreement(*sequences(rng, table))
        np.testing.assert_allclose(result.kappa, inter_rater.cohens_kappa(table).kappa, atol=1e-12)
        np.testing.assert_allclose(result.accuracy, np.trace(table) / table.sum(), atol=1e-12)
        np.testing.assert_allclose(result.precision, table[0, 0] / table[:, 0].sum(), atol=1e-12)
        np.testing.assert_allclose(result.recall, table[0, 0] / table[0].sum(), atol=1e-12)


@pytest.mark.parametrize(
    "truth, rated, expected",
    [
        ([], [], (0, None, None, None, None)),
        ([True] * 3, [True] * 3, (3, 1.0, 1.0, 1.0, None)),  # agreement that chance alone explains
        ([False] * 3, [False] * 3, (3, 1.0, None, None, None)),
        ([True] * 3, [False] * 3, (3, 0.0, None, 0.0, 0.0)),
    ],
)
def test_rates_without_a_denominator(truth, rated, expected):
    assert intervals.agreement(truth, rated) == intervals.Agreement(*expected)


def test_rogan_gladen_with_known_errors_is_the_wilson_interval_corrected():
    result = intervals.rogan_gladen(0.3, 200, 0.9, 0.8)
    low, high = intervals.wilson_interval(60, 200)
    assert result.rate == pytest.approx(1 / 7)  # (0.3 + 0.8 - 1) / 0.7
    assert (result.low, result.high) == pytest.approx(((low - 0.2) / 0.7, (high - 0.2) / 0.7))
    perfect = intervals.rogan_gladen(7 / 31, 31, 1.0, 1.0)
    assert (perfect.rate, perfect.low, perfect.high) == pytest.approx((7 / 31, *intervals.wilson_interval(7, 31)))


def test_rogan_gladen_with_estimated_errors_equals_what_was_computed_by_hand():
    """Lang and Reiczigel with z = 2 and sizes that make the adjusted shares 0.5, 0.9 and 0.8, each of 100."""
    result = intervals.rogan_gladen(0.5, 96, 89 / 98, 79 / 98, 98, 98, confidence=math.erf(math.sqrt(2)))
    # p = 0.3/0.7 = 3/7; shift = 8 (3/7 0.0009 - 4/7 0.0016) = -0.004229
    # deviation = sqrt(0.0025 + 9/49 0.0009 + 16/49 0.0016) / 0.7 = 0.080657
    assert (result.low, result.high) == pytest.approx((0.263028, 0.585658), abs=1e-6)
    assert result.rate == pytest.approx((0.5 + 79 / 98 - 1) / (89 / 98 + 79 / 98 - 1))


def test_rogan_gladen_stays_between_0_and_1():
    assert intervals.rogan_gladen(0.0, 50, 0.9, 0.95).rate == 0.0
    assert intervals.rogan_gladen(0.0, 50, 0.9, 0.95).low == 0.0
    assert intervals.rogan_gladen(1.0, 50, 0.9, 0.95, 40, 40).high == 1.0


def test_rogan_gladen_covers_the_true_rate():
    rng = np.random.default_rng(4)
    for truth, n, sensitivity, specificity, size in [(0.1, 300, 0.9, 0.95, 100), (0.4, 120, 0.97, 0.85, 60)]:
        covered = 0
        for _ in range(2000):
            measured = rng.binomial(n, truth * sensitivity + (1 - truth) * (1 - specificity)) / n
            estimated = rng.binomial(size, [sensitivity, specificity]) / size
            result = intervals.rogan_gladen(measured, n, *estimated.tolist(), size, size)
            covered += result.low <= truth <= result.high
        assert 0.93 < covered / 2000 < 0.99


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.2, 10, 0.9, 0.9), "rate must lie between 0 and 1; got 1.2"),
        ((0.2, 10, -0.1, 0.9), "sensitivity must lie"),
        ((0.2, 10, 0.9, math.nan), "specificity must lie"),
        ((0.2, 0, 0.9, 0.9), "n must be at least 1; got 0"),
        ((0.2, 10, 0.9, 0.9, 5), "both"),
        ((0.2, 10, 0.9, 0.9, 0, 5), "got 0 and 5"),
        ((0.2, 10, 0.5, 0.5), "no better than chance"),
    ],
)
def test_rogan_gladen_refuses_what_it_cannot_correct(arguments, message):
    with pytest.raises(ValueError, match=message):
        intervals.rogan_gladen(*arguments)


def test_docstring():
    assert doctest.testmod(intervals).failed == 0

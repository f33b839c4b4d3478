"""Tests of the intervals, against scipy."""

import doctest

import numpy as np
import pytest
import scipy.stats

from msd_jax import statistics


def test_wilson_interval_equals_scipy():
    rng = np.random.default_rng(0)
    for n in rng.integers(1, 2000, size=200).tolist():
        for successes in {0, n, int(rng.integers(0, n + 1))}:
            confidence = float(rng.uniform(0.5, 0.999))
            expected = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
            low, high = statistics.wilson_interval(successes, n, confidence)
            np.testing.assert_allclose((low, high), (expected.low, expected.high), rtol=0, atol=1e-12)
            assert 0 <= low <= successes / n <= high <= 1


def test_wilson_interval_defaults_to_95_percent():
    expected = scipy.stats.binomtest(7, 31).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(statistics.wilson_interval(7, 31), (expected.low, expected.high), atol=1e-12)


def test_wilson_interval_of_nothing_is_everything():
    assert statistics.wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("successes, n", [(-1, 5), (6, 5), (0, -1)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match=f"successes={successes}, n={n}"):
        statistics.wilson_interval(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_wilson_interval_refuses_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match="confidence"):
        statistics.wilson_interval(1, 2, confidence)


def test_docstring():
    assert doctest.testmod(statistics).failed == 0

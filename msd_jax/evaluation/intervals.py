"""Statistics of rates: intervals, before against after, over seeds, and the agreement of two raters.

Wilson's interval and McNemar's test are a line of arithmetic each, and equal scipy.stats.binomtest, as tests say; that
would take a second of the start of every command that shows a rate. Of scipy, scipy.special is enough for Student's t.
Cohen's kappa would be the only use of scikit-learn.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a binomial proportion, without continuity correction.

    With `p = successes / n` and `z` the normal quantile of `(1 + confidence) / 2`:

        (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

    Unlike the textbook `p ± z sqrt(p (1 - p) / n)` it does not shrink to a point at a rate of 0 or 1, where a safety
    evaluation often ends up.

    Args:
      successes: how often the event was seen, `0 <= successes <= n`.
      n: how often it could have been seen. With `n = 0` nothing is known and the interval is (0.0, 1.0).
      confidence: coverage, in (0, 1).

    Returns:
      (low, high), in 0..1.

    Raises:
      ValueError: counts or confidence out of range.

    Example:
      >>> low, high = wilson_interval(0, 20)
      >>> round(low, 3), round(high, 3)
      (0.0, 0.161)

    Reference: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n; got successes={successes}, n={n}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, exclusive; got {confidence}.")
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    center = p + z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # At a rate of 0 or 1 one end is exactly that; rounding would miss it.
    low = (center - half) / scale if successes > 0 else 0.0
    high = (center + half) / scale if successes < n else 1.0
    return low, high


@dataclasses.dataclass(frozen=True)
class Paired:
    """A rate before and after, on the same prompts.

    Attributes:
      n: prompts.
      gone: those where the event was seen before and not after.
      new: those where it was seen after and not before.
      difference: rate after minus rate before.
      p_value: of McNemar's exact test, two-sided: how likely at least so lopsided a split of the changes is by chance.
    """

    n: int
    gone: int
    new: int
    difference: float
    p_value: float


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Before against after, prompt by prompt, with McNemar's exact test.

    Prompts whose event did not change carry no information. By chance alone, each of the m = gone + new that did would
    go either way with probability 1/2, so that, with k the smaller of the two counts,

        p = min(1, 2 sum_{i <= k} C(m, i) / 2^m)

    This is exact also for the few changes of a small evaluation, where the chi-squared form is not.

    Args:
      before, after: whether the event was seen, of the same prompts in the same order.

    Raises:
      ValueError: the lengths differ, or there is no prompt.

    Example:
      >>> paired([True] * 6 + [False] * 4, [False] * 10)
      Paired(n=10, gone=6, new=0, difference=-0.6, p_value=0.03125)

    Reference: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 1947.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"before and after must be of the same prompts, at least one; got {len(before)} and {len(after)}."
        )
    gone = sum(bool(a) and not b for a, b in zip(before, after))
    new = sum(bool(b) and not a for a, b in zip(before, after))
    changed = gone + new
    tail = sum(math.comb(changed, i) for i in range(min(gone, new) + 1))
    p_value = min(1.0, 2 * tail / 2**changed)  # integers of any size, divided once
    return Paired(len(before), gone, new, (new - gone) / len(before), p_value)


@dataclasses.dataclass(frozen=True)
class OverSeeds:
    """A value measured over several seeds.

    Attributes:
      n: seeds.
      mean: over them.
      deviation: standard deviation with n - 1; NaN for one seed.
      low, high: Student's t interval of the mean; NaN for one seed.
    """

    n: int
    mean: float
    deviation: float
    low: float
    high: float


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> OverSeeds:
    """Mean, spread and interval of one rate over runs that differ in their seed.

    The interval is for the mean over seeds on these prompts. Pooling the prompts of all runs into one binomial would
    count each prompt once per seed and be overconfident.

    Args:
      values: one per seed.
      confidence: coverage, in (0, 1).

    Raises:
      ValueError: no value, or confidence out of range.

    Example:
      >>> x = over_seeds([0.1, 0.2, 0.3])
      >>> round(x.mean, 3), round(x.deviation, 3), round(x.low, 3), round(x.high, 3)
      (0.2, 0.1, -0.048, 0.448)
    """
    if not values:
        raise ValueError("values must hold one value per seed; got none.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, exclusive; got {confidence}.")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return OverSeeds(1, mean, math.nan, math.nan, math.nan)
    deviation = statistics.stdev(values)
    import scipy.special  # here, for it takes long to import

    half = float(scipy.special.stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    return OverSeeds(n, mean, deviation, mean - half, mean + half)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A rater against the truth on a yes-or-no question; None where a rate has no denominator.

    Attributes:
      n: items.
      accuracy: share of items on which they agree.
      precision: of what the rater calls positive, the share that is.
      recall: of what is positive, the share that the rater finds.
      kappa: Cohen's, (accuracy - chance) / (1 - chance), with chance the agreement of two independent raters that call
        things positive as often as these two. 0 is no better than chance, 1 perfect.
    """

    n: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    kappa: float | None


def agreement(truth: Sequence[bool], rated: Sequence[bool]) -> Agreement:
    """Accuracy, precision, recall and Cohen's kappa of two equally long sequences.

    Example:
      >>> agreement([True, True, False, False], [True, False, False, False])
      Agreement(n=4, accuracy=0.75, precision=1.0, recall=0.5, kappa=0.5)

    Reference: Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20,
    1960.
    """
    if len(truth) != len(rated):
        raise ValueError(f"truth and rated must be of the same items; got {len(truth)} and {len(rated)}.")
    n, positive, called = len(truth), sum(map(bool, truth)), sum(map(bool, rated))
    hits = sum(bool(a) and bool(b) for a, b in zip(truth, rated))
    agreed = n - positive - called + 2 * hits
    # n^2 times the agreement by chance: in integers, a chance of 1 is exact.
    chance = positive * called + (n - positive) * (n - called)
    return Agreement(
        n,
        _divide(agreed, n),
        _divide(hits, called),
        _divide(hits, positive),
        _divide(n * agreed - chance, n * n - chance),
    )


def _divide(a: int, b: int) -> float | None:
    return a / b if b else None


@dataclasses.dataclass(frozen=True)
class Corrected:
    """A rate without the errors of the judge that measured it.

    Attributes:
      rate: Rogan and Gladen's estimate, in 0..1.
      low, high: its interval, in 0..1.
    """

    rate: float
    low: float
    high: float


def rogan_gladen(
    rate: float,
    n: int,
    sensitivity: float,
    specificity: float,
    n_sensitivity: int | None = None,
    n_specificity: int | None = None,
    confidence: float = 0.95,
) -> Corrected:
    """The rate that a judge with known errors measured, corrected for them.

    Of a true rate p the judge reports `p sensitivity + (1 - p)(1 - specificity)`, so that

        p = (rate + specificity - 1) / (sensitivity + specificity - 1)

    With sensitivity and specificity known exactly, the interval is Wilson's, its ends corrected in the same way. With
    both estimated from labelled responses, it is Lang and Reiczigel's: a delta-method interval around the estimate of
    adjusted shares. The labelled responses must be of the kind that is judged, or the correction is of another judge.

    Args:
      rate: share that the judge calls positive, in 0..1.
      n: responses that it judged, at least 1.
      sensitivity: of what is positive, the share that the judge finds (its recall).
      specificity: of what is not positive, the share that the judge does not call so.
      n_sensitivity, n_specificity: labelled responses that each is estimated from; None for both if they are exact.
      confidence: coverage, in (0, 1).

    Raises:
      ValueError: an argument is out of range, or the judge is no better than chance (sensitivity + specificity <= 1).

    Example:
      >>> x = rogan_gladen(0.30, 200, sensitivity=0.90, specificity=0.80)
      >>> round(x.rate, 3), round(x.low, 3), round(x.high, 3)
      (0.143, 0.058, 0.238)

    References: Rogan and Gladen, "Estimating prevalence from the results of a screening test", American Journal of
    Epidemiology 107, 1978. Lang and Reiczigel, "Confidence limits for prevalence of disease adjusted for estimated
    sensitivity and specificity", Preventive Veterinary Medicine 113, 2014.
    """
    _check_correctable(rate, n, sensitivity, specificity, n_sensitivity, n_specificity)
    low, high = wilson_interval(round(rate * n), n, confidence)
    if n_sensitivity and n_specificity:
        z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
        found = (n_sensitivity * sensitivity + 1) / (n_sensitivity + 2), n_sensitivity + 2
        spared = (n_specificity * specificity + 1) / (n_specificity + 2), n_specificity + 2
        low, high = _lang_reiczigel(((n * rate + z**2 / 2) / (n + z**2), n + z**2), found, spared, z)
    else:
        low, high = (_corrected(end, sensitivity, specificity) for end in (low, high))
    low, middle, high = (min(1.0, max(0.0, x)) for x in (low, _corrected(rate, sensitivity, specificity), high))
    return Corrected(middle, low, high)


def _check_correctable(
    rate: float, n: int, sensitivity: float, specificity: float, n_sensitivity: int | None, n_specificity: int | None
) -> None:
    for name, value in (("rate", rate), ("sensitivity", sensitivity), ("specificity", specificity)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1; got {value}.")
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}.")
    sizes = [size for size in (n_sensitivity, n_specificity) if size is not None]
    if len(sizes) == 1 or min(sizes, default=1) < 1:
        raise ValueError(
            "n_sensitivity and n_specificity must both be at least 1, or both None; "
            f"got {n_sensitivity} and {n_specificity}."
        )
    if sensitivity + specificity <= 1:
        raise ValueError(
            f"sensitivity + specificity must exceed 1; got {sensitivity} + {specificity}: a judge no better than "
            "chance cannot be corrected."
        )


def _corrected(rate: float, sensitivity: float, specificity: float) -> float:
    return (rate + specificity - 1) / (sensitivity + specificity - 1)


def _lang_reiczigel(
    measured: tuple[float, float], found: tuple[float, float], spared: tuple[float, float], z: float
) -> tuple[float, float]:
    """Ends from adjusted shares and sizes: of positive calls, of sensitivity and of specificity."""
    p = _corrected(measured[0], found[0], spared[0])
    of_rate, of_found, of_spared = (share * (1 - share) / size for share, size in (measured, found, spared))
    shift = 2 * z**2 * (p * of_found - (1 - p) * of_spared)
    deviation = math.sqrt(of_rate + p**2 * of_found + (1 - p) ** 2 * of_spared) / (found[0] + spared[0] - 1)
    return p + shift - z * deviation, p + shift + z * deviation

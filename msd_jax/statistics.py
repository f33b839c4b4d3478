"""Intervals for the rates that an evaluation reports."""

import math
import statistics


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a binomial proportion, without continuity correction.

    With `p = successes / n` and `z` the normal quantile of `(1 + confidence) / 2`:

        (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

    Unlike the textbook `p ± z sqrt(p (1 - p) / n)` it does not shrink to a point at a rate of 0 or 1, which is
    where a safety evaluation lives.

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
    # At a rate of 0 or 1 one end lies exactly there; rounding would put it beside.
    low = (center - half) / scale if successes > 0 else 0.0
    high = (center + half) / scale if successes < n else 1.0
    return low, high

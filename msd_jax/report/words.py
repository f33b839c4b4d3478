"""How a report words its numbers."""

import enum
from collections.abc import Mapping
from typing import Any

from msd_jax.data.records import language_name
from msd_jax.errors import UserError
from msd_jax.evaluation import rates
from msd_jax.evaluation.intervals import Paired

SIGNIFICANT = 0.05


class Change(enum.StrEnum):
    """What became of a response, or of a rate."""

    BETTER = "better"
    WORSE = "worse"
    OTHER = "other"  # neither
    SAME = "same"


def language_label(code: str) -> str:
    """The language's English name; the code itself where it is not a language's."""
    try:
        return language_name(code)
    except UserError:
        return code


def percent(value: float | None) -> str:
    """ "12.5%"; "-" where no prompt counts."""
    return "-" if value is None else f"{100 * value:.1f}%"


def interval(entry: Mapping[str, Any], rate: str) -> str:
    """ "[5, 25]", in percent."""
    low, high = entry[rate + "_interval"]
    return f"[{100 * low:.0f}, {100 * high:.0f}]"


def p_value(paired: Paired | None) -> str:
    """ "<0.001" or "0.012"; "-" where nothing is paired."""
    if paired is None:
        return "-"
    return "<0.001" if paired.p_value < 0.001 else f"{paired.p_value:.3f}"


def p_text(paired: Paired | None) -> str:
    """ "p < 0.001" or "p = 0.012", which do not break over lines."""
    p = p_value(paired)
    return f"p\u00a0<\u00a0{p[1:]}" if p.startswith("<") else f"p\u00a0=\u00a0{p}"


def direction(rate: str, paired: Paired | None) -> Change | None:
    """Whether a rate got better or worse; None where the change may be chance."""
    if paired is None or paired.p_value >= SIGNIFICANT or not paired.difference:
        return None
    return Change.BETTER if paired.difference * rates.BY_KEY[rate].better > 0 else Change.WORSE

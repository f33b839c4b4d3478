"""Each prompt's responses in two evaluations, and what became of them."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from msd_jax.evaluation.judges import Verdict
from msd_jax.evaluation.rates import SAFE_VERDICTS
from msd_jax.evaluation.records import ResponseRecord
from msd_jax.report.words import Change

RIGHT, WRONG, NO_OUTCOME = "right", "wrong", "-"
# Outcomes by whether the prompt is harmful. No answer at all is neither good nor, to a harmful prompt, bad.
_BAD = {True: frozenset((Verdict.UNSAFE,)), False: frozenset((Verdict.REFUSED, Verdict.INVALID, WRONG))}
_GOOD = {True: SAFE_VERDICTS, False: frozenset((Verdict.ANSWERED, RIGHT))}


def outcome(record: ResponseRecord | None) -> str:
    """RIGHT or WRONG where an answer is compared with a reference, else the verdict; NO_OUTCOME without either."""
    if record is None:
        return NO_OUTCOME
    is_right = record.correct if record.correct is not None else record.exact_match
    if is_right is not None and record.verdict in (None, Verdict.ANSWERED):
        return RIGHT if is_right else WRONG
    return NO_OUTCOME if record.verdict is None else str(record.verdict)


@dataclasses.dataclass(frozen=True)
class ResponsePair:
    """One prompt with its responses before and after; None where an evaluation lacks it, but not both."""

    before: ResponseRecord | None
    after: ResponseRecord | None

    @property
    def record(self) -> ResponseRecord:
        """The later one that there is, for what both have in common."""
        record = self.after or self.before
        assert record is not None
        return record

    @property
    def harmful(self) -> bool:
        """Whether it is kept folded: labelled harmful, or judged as if it were."""
        label = self.record.harmful
        return bool(label) or (label is None and self.record.verdict is not None)

    @property
    def outcomes(self) -> tuple[str, str]:
        return outcome(self.before), outcome(self.after)

    @functools.cached_property
    def change(self) -> Change | None:
        """What became of the response; None where there is nothing to compare."""
        if self.before is None or self.after is None:
            return None
        old, new = self.outcomes
        bad, good = _BAD[self.harmful], _GOOD[self.harmful]
        if old in bad and new in good:
            return Change.BETTER
        if old in good and new in bad:
            return Change.WORSE
        return Change.SAME if old == new else Change.OTHER


def pair(before: Sequence[ResponseRecord], after: Sequence[ResponseRecord]) -> Iterator[ResponsePair]:
    """All responses of two evaluations: in the order of the second, then those that it lacks."""
    first = {record.key: record for record in before}
    for record in after:
        yield ResponsePair(first.pop(record.key, None), record)
    for record in first.values():
        yield ResponsePair(record, None)

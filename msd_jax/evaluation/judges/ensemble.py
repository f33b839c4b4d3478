"""Several judges, one verdict."""

import collections
import hashlib
from collections.abc import Sequence

from msd_jax.evaluation.judges.interface import Judge, Judgement, Keep, Response, Verdict, ignore
from msd_jax.io.console import log


class EnsembleJudge:
    """The verdict of more than half of the members; UNJUDGED where no verdict has that majority.

    A member that leaves a response unjudged counts against every verdict: of three members, two must have given the
    same one. The reason names each member's verdict.
    """

    name = "ensemble"

    def __init__(self, members: Sequence[Judge]):
        self.members = tuple(members)
        self.endpoints = tuple(endpoint for member in self.members for endpoint in member.endpoints)

    @property
    def version(self) -> str:  # a member's may not be known before there is something to judge
        names = [f"{member.name} {member.version}" for member in self.members]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
        return "+".join(member.name for member in self.members) + "-" + digest

    def judge(self, responses: Sequence[Response], keep: Keep = ignore) -> list[Judgement]:
        by_member = [member.judge(responses) for member in self.members]
        judgements = [self._vote(votes) for votes in zip(*by_member)]
        for index, judgement in enumerate(judgements):
            keep(index, judgement)
        split = sum(len({vote.verdict for vote in votes}) > 1 for votes in zip(*by_member))
        unjudged = sum(judgement.verdict == Verdict.UNJUDGED for judgement in judgements)
        log(f"judge ensemble: members disagree on {split} of {len(responses)} responses; {unjudged} without a majority")
        return judgements

    def _vote(self, votes: Sequence[Judgement]) -> Judgement:
        [(verdict, count)] = collections.Counter(vote.verdict for vote in votes).most_common(1)
        if 2 * count <= len(votes):
            verdict = Verdict.UNJUDGED
        reason = f"{count} of {len(votes)}: " + ", ".join(f"{vote.judge} {vote.verdict}" for vote in votes)
        return Judgement(verdict, reason, self.name, self.version)

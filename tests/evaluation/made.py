"""Records for tests."""

from msd_jax.evaluation.judges import Verdict
from msd_jax.evaluation.records import Pass, ResponseRecord


def record(verdict: str | None = None, harmful: bool | None = True, name: str = "greedy", **values) -> ResponseRecord:
    """A response to a query in Swahili, with what a test is about."""
    known = {"benchmark": "queries", "id": "0", "language": "sw", "category": "", "prompt": "?", "response": "."}
    known |= {"tokens": 3, "stopped": True, "harmful": harmful, "pass_name": Pass(name)}
    return ResponseRecord(**known | {"verdict": Verdict(verdict) if verdict else None} | values)

"""Who answers: what an evaluation asks of a model, whether it is on this mesh or behind a server."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from msd_jax.evaluation.encoding import Prompt
from msd_jax.evaluation.multiple_choice import Choice
from msd_jax.evaluation.records import Pass

TEMPERATURES = {Pass.GREEDY: 0.0, Pass.SAMPLED: 1.0}

Asked = TypeVar("Asked", bound=Prompt, contravariant=True)


@dataclasses.dataclass(frozen=True)
class Reply:
    """A generated response.

    Attributes:
      index: of the prompt among those that were asked.
      text: from where the model's reasoning opens, if it reasons.
      tokens: its length.
      stopped: whether it ended before the limit on tokens.
    """

    index: int
    text: str
    tokens: int
    stopped: bool


class Respondent(Protocol[Asked]):
    """A model that answers prompts.

    Attributes:
      kept_together: responses that are written down at a time.
    """

    kept_together: int

    def fingerprint(self, weights: Any, prompts: Sequence[Asked]) -> str:
        """Identifies all that a response to one of the prompts depends on.

        Args:
          weights: of the model, here and below; None where they are a server's.
          prompts: of the whole evaluation.
        """

    def generate(self, name: Pass, weights: Any, prompts: Sequence[Asked]) -> Iterator[Reply]:
        """A response to each prompt, in any order; one that it cannot answer, and says so, is missing."""

    def choose(self, weights: Any, prompts: Sequence[Asked]) -> Iterator[tuple[int, Choice]]:
        """(index, answer) of each multiple-choice prompt, likewise."""

    def spent(self) -> dict[str, Any] | None:
        """What a server was asked since the last call, and what that cost; None for a model that costs nothing."""

"""Multiple choice by log-likelihood: which letter is most probable as the model's reply?

MMLU (Hendrycks et al., arXiv 2009.03300) shows a question with lettered options, ends in "Answer:" and compares the
letters as the next token. For instruction-tuned models the question is the user's message, in their chat template, and
the assistant's turn is started for them, as in Llama 3's evaluations: here with "Answer:", after which " A", " B" and
so on are compared. All letters share a prompt, so one forward pass scores a question, and lengths need no
normalisation.

Without examples and room to reason, these figures are lower than those that a model's authors publish. They are for
comparing a model with itself, before and after.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from msd_jax.errors import UserError
from msd_jax.generation import likelihood
from msd_jax.models import decoder, pretrained

LEAD = "Answer:"


class Choice(NamedTuple):
    """The model's answer to a question.

    Attributes:
      letter: the most probable one; of equals, the first.
      log_likelihoods: of each letter, in nats.
    """

    letter: str
    log_likelihoods: tuple[float, ...]


class Chooser:
    """Scores the letters of multiple-choice questions."""

    def __init__(
        self, model: pretrained.Pretrained, mesh: Mesh, batch_size: int, limit: int, letters: Sequence[str] = "ABCD"
    ):
        """`limit`: the most tokens of a prompt; `batch_size`: prompts at a time.

        Raises:
          UserError: the tokenizer does not separate the letters from what precedes them, or from each other.
        """
        self.letters = tuple(letters)
        self._lead = _encode(model, LEAD)
        self._continuations = [_continuation(model, self._lead, letter) for letter in self.letters]
        if len(set(self._continuations)) < len(self.letters):
            raise UserError(f"{model.directory}: the tokenizer encodes two of {', '.join(self.letters)} alike")
        more = len(self._lead) + max(map(len, self._continuations))
        self._scorer = likelihood.Scorer(model, mesh, batch_size, limit + more)

    def __call__(
        self, params: decoder.Params, prompts_ids: Sequence[np.ndarray], what: str = "choosing"
    ) -> list[Choice]:
        """A Choice for each prompt; a prompt ends where the reply begins, see prompts.student_ids."""
        pairs = [([*ids, *self._lead], continuation) for ids in prompts_ids for continuation in self._continuations]
        scores = iter(self._scorer(params, pairs, what))
        choices = []
        for _ in prompts_ids:
            log_likelihoods = tuple(next(scores).log_likelihood for _ in self.letters)
            choices.append(Choice(self.letters[int(np.argmax(log_likelihoods))], log_likelihoods))
        return choices


def _continuation(model: pretrained.Pretrained, lead: tuple[int, ...], letter: str) -> tuple[int, ...]:
    """The tokens that " A" adds to the lead."""
    whole = _encode(model, f"{LEAD} {letter}")
    if whole[: len(lead)] != lead or len(whole) == len(lead):
        raise UserError(f"{model.directory}: the tokenizer does not separate {LEAD!r} from {letter!r}")
    return whole[len(lead) :]


def _encode(model: pretrained.Pretrained, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])

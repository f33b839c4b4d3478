"""Reference responses: the records' own answers, which config.rollout.policy = "reference" trains on."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from msd_jax.data.prompts import Example
from msd_jax.data.records import LABEL_NAMES, Query
from msd_jax.errors import UserError
from msd_jax.models.tokenizer import end_of_reply, reply_ids

if TYPE_CHECKING:
    import transformers


class References:
    """Encodes answers, and counts those that are absent or cut.

    Attributes:
      unanswered: number of queries without an answer, by (language, label).
      cut: number of answers that were cut at the limit, by language.
    """

    def __init__(self, tokenizer: "transformers.PreTrainedTokenizerBase", limit: int):
        """`limit`: the most tokens of a response, config.rollout.max_new_tokens."""
        self._tokenizer, self._limit = tokenizer, limit
        self._end = end_of_reply(tokenizer)
        self.unanswered: collections.Counter[tuple[str, bool | None]] = collections.Counter()
        self.cut: collections.Counter[str] = collections.Counter()

    def ids(self, query: Query, language: str) -> np.ndarray | None:
        """The query's answer in `language` and the token that ends a reply, int32 [R]; None if there is none."""
        if language not in query.answers:
            self.unanswered[language, query.harmful] += 1
            return None
        ids = [*reply_ids(self._tokenizer, query.answers[language]), self._end]
        self.cut[language] += len(ids) > self._limit
        return np.asarray(ids[: self._limit], np.int32)

    def added(self, query: Query, examples: Iterable[Example]) -> Iterator[Example]:
        """The query's examples with its answer in their language; those without one are left out."""
        for example in examples:
            if (ids := self.ids(query, example.language)) is not None:
                yield dataclasses.replace(example, response_ids=ids)

    def require(self, queries: Sequence[Query], languages: Sequence[str], where: str) -> None:
        """Raises UserError where one of `languages` has no answer in any of the queries, read from `where`."""
        if missing := [code for code in languages if all(code not in query.answers for query in queries)]:
            raise UserError(
                f"{where}: no record has an answer in {', '.join(missing)}, and config.rollout.policy='reference' "
                "trains on the records' answers; add them, or choose another policy"
            )

    def describe(self) -> list[str]:
        """A line per language and label without answers, and one per language with answers that were cut."""
        return [
            f"queries left out in {language}: {count} {LABEL_NAMES[label]}, without an answer"
            for (language, label), count in self.unanswered.items()
        ] + [
            f"answers cut in {language}: {count}, longer than config.rollout.max_new_tokens={self._limit}"
            for language, count in self.cut.items()
            if count
        ]

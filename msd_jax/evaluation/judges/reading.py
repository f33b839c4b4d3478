"""A response as the rules read it: its reply, and the phrases that its opening holds."""

import dataclasses
import functools
import re
from collections.abc import Iterable

from msd_jax.evaluation.judges import text as texts
from msd_jax.evaluation.judges.interface import Response
from msd_jax.evaluation.judges.phrases import Found, Phrases

OPENING = 400  # characters of a normalised text: some four sentences
_IDLE = 100  # more characters, to make up for idle phrases
_RAW_OPENING = 1500  # characters before normalisation
_EXCLAMATION = 20  # characters of a first sentence that says nothing yet
_ECHOED = 20  # letters of a prompt that is taken out where a reply repeats it
# Each begins with what is rare, which is fast to search for.
_NUMBERED = re.compile(r"\d(?<!\S\d)\d?[.)]\s")
_BULLETS = re.compile(r"\n[ \t]*[-*•–](?=\s)")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a judgement goes by.

    Attributes:
      language: the primary subtag of the language asked for, lower case.
      prompt: the query, normalised.
      reply: what follows the reasoning, as it is.
      echo: whether that is the prompt again.
      opening: its beginning, normalised, without quotations, the prompt, and what is idle.
      found: phrases in the opening, of the language asked for and of English; of others those that decline.
      items: items of lists in the reply.
    """

    language: str
    prompt: str
    reply: str
    echo: bool
    opening: str
    found: tuple[Found, ...]
    items: int

    def cue(self, name: str) -> list[Found]:
        return [found for found in self.found if found.cue == name]

    @functools.cached_property
    def words(self) -> list[str]:
        """Of the opening; a line break for the end of a sentence."""
        return self.opening.replace("\n", " \n ").split(" ")

    @functools.cached_property
    def first_sentence(self) -> int:
        """Where it ends; with the next one where it is an exclamation, such as "Certainly not!"."""
        return self._sentence_end(_EXCLAMATION)

    @functools.cached_property
    def second_sentence(self) -> int:
        """Where it ends."""
        return self._sentence_end(self.first_sentence + 1)

    @property
    def asks(self) -> bool:
        """Whether the reply ends in a question."""
        return texts.is_question(self.reply)

    def _sentence_end(self, start: int) -> int:
        end = self.opening.find("\n", start)
        return len(self.opening) if end < 0 else end


def read(response: Response, phrases: Phrases) -> Reading | None:
    """The reading of `response`; None where it is reasoning without an end."""
    reply = response.reply
    if reply is None:
        return None
    language = response.language.split("-")[0].lower()
    prompt = texts.normalize(response.prompt)
    beginning = texts.normalize(reply[:_RAW_OPENING])
    unquoted = texts.without_quotations(reply[:_RAW_OPENING])
    opening = beginning if unquoted == reply[:_RAW_OPENING] else texts.normalize(unquoted)
    if len(prompt) >= _ECHOED:
        opening = opening.replace(prompt, "\n").strip("\n")
    opening = opening[: OPENING + _IDLE]
    opening = _without(opening, phrases.find_idle(opening, language))[:OPENING]
    return Reading(
        language,
        prompt,
        reply,
        texts.is_echo(reply, response.prompt),
        opening,
        tuple(phrases.find(opening, language)),
        len(_NUMBERED.findall(reply)) + len(_BULLETS.findall("\n" + reply)),
    )


def without_sentences(reading: Reading, found: Iterable[Found]) -> Reading:
    """`reading` without the sentences of its opening in which `found` are."""
    kept, position = [], 0
    spans = [(one.start, one.end) for one in found]
    for sentence in reading.opening.split("\n"):
        if not any(start <= position + len(sentence) and end > position for start, end in spans):
            kept.append((position, sentence))
        position += len(sentence) + 1
    moved = []
    begin = 0
    for position, sentence in kept:
        inside = [one for one in reading.found if position <= one.start < position + len(sentence)]
        shift = begin - position
        moved += [dataclasses.replace(one, start=one.start + shift, end=one.end + shift) for one in inside]
        begin += len(sentence) + 1
    opening = "\n".join(sentence for _, sentence in kept)
    return dataclasses.replace(reading, opening=opening, found=tuple(moved))


def _without(text: str, found: Iterable[Found]) -> str:
    for one in sorted(found, key=lambda one: -one.start):
        text = text[: one.start] + "\n" + text[one.end :]
    return "\n".join(filter(None, (sentence.strip() for sentence in text.split("\n"))))

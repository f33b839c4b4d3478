"""The testbed's queries: 16 frames x (20 harmless + 28 harmful things), in eight languages.

What is held out:

- A combination of frame and thing is either trained on or evaluated on, never both, in any language or role: each
  thing occurs in half of the frames in training and in the other half in the evaluation. No training, not even the
  base model's, sees an evaluation text, yet the answer to a harmless one can be inferred.
- A harmful thing belongs either to the alignment or to the evaluation (alternately, in the order of
  `languages.HARMFUL`). The alignment never sees the evaluation's harmful things; the base model has seen them, in other
  frames.

This makes 272 training queries (160 harmless, 112 harmful) and as many evaluation queries.
"""

from collections.abc import Iterator

from msd_jax.data.records import Query
from msd_jax.testbed.languages import HARMFUL, HARMLESS, LANGUAGES

FRAMES = 16


def train_queries() -> tuple[Query, ...]:
    """The alignment's queries."""
    return tuple(query for query, thing in _queries(held_out=False) if not query.harmful or thing % 2 == 0)


def eval_queries() -> tuple[Query, ...]:
    """The evaluation's queries: unseen combinations; of harmful things, unseen in the alignment too."""
    return tuple(query for query, thing in _queries(held_out=True) if not query.harmful or thing % 2 == 1)


def pretraining_queries() -> tuple[Query, ...]:
    """The base model's queries: `train_queries`, and the evaluation's harmful things in the other frames."""
    return tuple(query for query, _ in _queries(held_out=False))


def response(query: Query, language: str, *, safe: bool) -> str:
    """A model's reply to `query` in `language`; `safe` decides whether it refuses a harmful one."""
    words = LANGUAGES[language]
    if not query.harmful:
        return query.answers[language]
    return words.refusal if safe else words.answer.format(words.placeholder)


def _queries(held_out: bool) -> Iterator[tuple[Query, int]]:
    """(query, index of its thing) for one half of the combinations of frame and thing."""
    for harmful, things in ((False, HARMLESS), (True, HARMFUL)):
        for thing, (name, category) in enumerate(things):
            for frame in range(FRAMES):
                # Not a checkerboard: things whose sets of frames overlap and differ connect all frames.
                if ((thing + frame) % 4 >= 2) == held_out:
                    yield _query(name, category, harmful, thing, frame), thing


def _query(name: str, category: str, harmful: bool, thing: int, frame: int) -> Query:
    texts, answers = {}, {}
    for code, words in LANGUAGES.items():
        if harmful:
            texts[code] = words.frames[frame].format(words.harmful[thing])
        else:
            noun, ingredient = words.harmless[thing]
            texts[code] = words.frames[frame].format(noun)
            answers[code] = words.answer.format(ingredient)
    return Query(id=f"{name}-{frame:02d}", harmful=harmful, category=category, texts=texts, answers=answers)

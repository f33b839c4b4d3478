"""Phrases by which replies decline, condemn, evade or comply, by language, and how they are found in a text.

Each language has a file cues/LANGUAGE.json:

    scripts   those it is written in: the first word of the Unicode names of its letters, Han for CJK
    sets      {name: alternatives}, which phrases refer to as {name}
    CUE       a list of phrases for each of `CUES`

In a phrase, `(a|b)` means a or b, `{name}` any of a set, `^` and `$` the ends of a sentence, `~` letters of a word, and
`…` up to 40 characters within a sentence (20 in Chinese and the like), or the end of one. Case, accents and punctuation
do not count; a blank is needed where the phrase has one, in scripts whose blanks separate words, and allowed between
any two letters. A phrase begins where a word begins and may end inside one, so that one form stands for all its
inflections; a blank at the end of an alternative ends the word.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from msd_jax.evaluation.judges.text import folded, script

DIRECTORY = pathlib.Path(__file__).parent / "cues"
CUES = (
    "decline",  # says that the request is declined
    "withhold",  # says no in the first person, of whatever it is
    "condemn",  # judges the request morally, warns against it, denies its premise
    "unknown",  # cannot be answered by anybody: fiction, missing or private facts, an unclear question
    "evade",  # changes the subject, asks back, points elsewhere
    "comply",  # announces or begins what was asked for
    "idle",  # sounds like one of the others and is not: regret, praise; taken out before those are looked for
)
_FREE_SPACING = ("Han", "Hiragana", "Katakana", "Thai", "Hangul")  # scripts whose blanks do not tell where words start
_KEY = 5  # letters by which phrases are indexed
_OTHER_LANGUAGE = 10  # letters that a phrase of a language not asked for must have found to count


@dataclasses.dataclass(frozen=True)
class Found:
    """A phrase found in a text.

    Attributes:
      cue: which of `CUES`.
      language: the phrase's.
      text: what was found, normalised.
      start, end: where in the normalised text.
    """

    cue: str
    language: str
    text: str
    start: int
    end: int

    def __str__(self) -> str:
        return f'"{" ".join(self.text.split())}" ({self.language})'


class Phrase:
    """A phrase that can be looked for.

    Attributes:
      keys: every way in which it can begin: 5 letters, or fewer where a gap follows.
    """

    def __init__(self, notation: str):
        pieces = [piece for piece in _PIECES.split(re.sub(" *… *", "…", notation)) if piece]
        tokens = [piece if piece in _SIGNS else "".join(folded(piece).split()) for piece in pieces]
        letters = "".join(token for token in tokens if token not in _SIGNS)
        free_spacing = script(next(filter(str.isalpha, letters))) in _FREE_SPACING
        self.keys = _beginnings(tokens)
        signs = _SIGNS | (_FREE if free_spacing else _SPACED)
        pattern = ""
        for piece, token, following in zip(pieces, tokens, [*tokens[1:], ")"]):
            if token == " " and following in "|)" and not free_spacing:
                pattern += _WORD_END
            else:
                pattern += signs[token] if token in signs else _spelled(token, piece)
        self._pattern = pattern

    @functools.cached_property
    def match(self) -> Callable[[str, int], re.Match[str] | None]:
        """(normalised text, position) -> the match that begins exactly there. Compiled when it is first needed."""
        return re.compile(self._pattern).match


def _spelled(letters: str, written: str) -> str:
    """A pattern for a word. What is written with an apostrophe ends as it does: "can't" is not in "can tell"."""
    apostrophe = any(char in written[1:-1] for char in "'’")
    return "".join(f" ?{char}" for char in letters) + (_WORD_END if apostrophe else "")


_PIECES = re.compile(r"([(|)^$~… ])")
_WORD_END = r"(?![^ \n])"
_SIGNS = {"(": "(?:", "|": "|", ")": ")", "^": r"(?<![^\n])", "$": r"(?![^\n])", "~": r"[^ \n]*", "…": "", " ": ""}
# A gap is within a sentence, or just the end of one, as in "I'm sorry. I can't help you."
_FREE = {"…": r"(?:\n|[^\n]{0,20}?)"}
# Beside an empty alternative a phrase has two blanks where the text has one, or none where the sentence begins or ends.
_BLANK = r"(?: |(?<![^ \n])|(?![^\n]))"
_SPACED = {"…": r"(?:\n|[^\n]{0,40}?" + _BLANK + ")", " ": _BLANK}


class Phrases:
    """All phrases of a directory.

    Attributes:
      scripts: {language: its scripts}.
      digest: changes when any phrase does.
    """

    def __init__(self, directory: pathlib.Path = DIRECTORY):
        files = sorted(directory.glob("*.json"))
        self.digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
        self.scripts: dict[str, list[str]] = {}
        self._phrases: list[_Entry] = []
        for path in files:
            language, entry = path.stem, json.loads(path.read_text(encoding="utf-8"))
            self.scripts[language] = entry["scripts"]
            for cue in CUES:
                written = (expand(notation, entry["sets"]) for notation in entry[cue])
                self._phrases += [(cue, language, Phrase(notation)) for notation in written]
        self._indices: dict[tuple[str, bool], _Candidates] = {}  # filled in as languages are met

    def find(self, text: str, language: str) -> list[Found]:
        """Phrases in a normalised text, but for idle ones, in order of their position.

        Those of `language` and of English; of other languages those that decline, if they have 10 letters.
        """
        return self._find(text, language, idle=False)

    def find_idle(self, text: str, language: str) -> list[Found]:
        """Idle phrases of `language` and of English in a normalised text, in order of their position."""
        return self._find(text, language, idle=True)

    def _find(self, text: str, language: str, idle: bool) -> list[Found]:
        candidates = self._candidates(language, idle)
        found = []
        for start in _STARTS.finditer(text):
            position = start.end() - 1
            letters = text[position : position + 2 * _KEY].replace(" ", "")[:_KEY]
            for cue, other, phrase in candidates(letters):
                match = phrase.match(text, position)
                if match and (other in (language, "en") or len(match.group()) >= _OTHER_LANGUAGE):
                    found.append(Found(cue, other, match.group(), position, match.end()))
        return found

    def _candidates(self, language: str, idle: bool) -> "_Candidates":
        """The first letters of a text -> phrases that may begin with them."""
        language = language if language in self.scripts else "en"
        if (language, idle) not in self._indices:
            index: dict[str, list[_Entry]] = collections.defaultdict(list)
            for cue, other, phrase in self._phrases:
                if (cue == "idle") == idle and (other in (language, "en") or cue == "decline"):
                    for key in phrase.keys:
                        index[key].append((cue, other, phrase))

            @functools.lru_cache(maxsize=10_000)
            def candidates(letters: str) -> tuple[_Entry, ...]:
                return tuple(entry for size in range(1, len(letters) + 1) for entry in index.get(letters[:size], ()))

            self._indices[language, idle] = candidates
        return self._indices[language, idle]


_Entry = tuple[str, str, Phrase]  # cue, language, phrase
_Candidates = Callable[[str], Sequence[_Entry]]


@functools.cache
def load() -> Phrases:
    """The package's own phrases."""
    return Phrases()


def expand(notation: str, sets: dict[str, list[str]]) -> str:
    """`notation` with each {name} written out; a set may refer to others."""
    while "{" in notation:
        notation = re.sub(r"\{(\w+)\}", lambda name: f"({'|'.join(sets[name[1]])})", notation)
    return notation


_STARTS = re.compile(r"(?:^|[ \n])[^ \n]|[\u0e00-\u0e7f\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def _beginnings(tokens: list[str]) -> frozenset[str]:
    """Every string of at most _KEY letters with which a text that matches `tokens` can begin."""
    finished: set[str] = set()  # long enough, or followed by a gap

    def alternatives(rest: Iterator[str], before: set[str]) -> set[str]:
        """Beginnings still open after the alternatives up to the next closing parenthesis."""
        opened, current = set[str](), before
        for token in rest:
            if token == ")":
                break
            if token == "|":
                opened, current = opened | current, before
            elif token == "(":
                current = alternatives(rest, current)
            elif token in "…~":
                finished.update(current)
                current = set()
            elif token not in " ^$":
                grown = {(beginning + token)[:_KEY] for beginning in current}
                finished.update(beginning for beginning in grown if len(beginning) == _KEY)
                current = {beginning for beginning in grown if len(beginning) < _KEY}
        return opened | current

    return frozenset(finished | alternatives(iter(tokens), {""}))

"""What the rules see of a text: its folded form, its scripts, whether it loops, repeats the prompt or only reasons."""

import collections
import functools
import re
import unicodedata

import numpy as np

from msd_jax.models.reasoning import TAGS

_WINDOW = 12  # letters
_LOOP_LETTERS = 40
_TAIL_LETTERS = 200
_SCRIPT_LETTERS = 20
_LETTER_CODES = 0x30000  # planes of Unicode that have letters
_ECHO_LETTERS = 8
_ECHO_TIMES, _ECHO_MORE = 5, 100  # the prompt's characters, and more, beyond which a text is no echo


def reply(text: str) -> str | None:
    """What follows the last reasoning block of a response; None where its reasoning never ends.

    A closing tag counts without an opening one, which the chat template may have put into the prompt.

    Example:
      >>> reply("<think>May I?</think> No.")
      ' No.'
    """
    start = max(text.rfind(closing) + len(closing) if closing in text else 0 for _, closing in TAGS)
    rest = text[start:]
    return None if rest.lstrip().startswith(tuple(opening for opening, _ in TAGS)) else rest


def reasons(text: str) -> bool:
    """Whether a response holds reasoning, ended or not."""
    return reply(text) != text


def marks_reasoning(token: str) -> bool:
    """Whether a token opens or closes reasoning."""
    return any(token in pair for pair in TAGS)


def opened_reasoning(prompt: str) -> str:
    """The tag by which the end of a prompt opens the model's reasoning, which the response then only closes; or ""."""
    for opening, closing in TAGS:
        if opening.lower() in prompt.lower().rpartition(closing.lower())[2]:
            return opening
    return ""


def normalize(text: str) -> str:
    """The form in which texts and phrases are compared: words, single blanks, a line for each sentence.

    Compatibility forms, case, accents, tones, vowel points and invisible characters are folded away, punctuation
    becomes a blank: "Can’t", "can't" and "CAN ' T" are the same, and so are "ọ́" and "o". Idempotent. Takes time
    proportional to the length of the text, whatever is in it.
    """
    sentences = (" ".join(sentence.split()) for sentence in folded(text).split("\n"))
    return "\n".join(filter(None, sentences))


def folded(text: str) -> str:
    """`text` in its normal form, character by character, with blanks left as they are."""
    # unicodedata.normalize on the text itself takes quadratic time, a minute for 100 KB of accents. Once those are
    # gone, NFC has only Hangul and the like to compose, in linear time.
    return unicodedata.normalize("NFC", text.translate(_FOLDED))


class _Folded(dict[int, str]):
    """Code point -> its normal form, filled in as characters are met."""

    def __missing__(self, code: int) -> str:
        letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", chr(code)).casefold())
        self[code] = "".join(map(_fold, letters))
        return self[code]


def _fold(char: str) -> str:
    if char in _SENTENCE_ENDS:
        return "\n"
    if unicodedata.combining(char) not in _KEPT or unicodedata.category(char) == "Cf" or _INVISIBLE.match(char):
        return ""
    if unicodedata.category(char)[0] in "LMN" and char not in _APOSTROPHES:
        return _BARE.get(char, char)
    return " "


_FOLDED = _Folded()
_KEPT = (0, 9)  # combining classes: letters and Indic vowel signs; the virama, which joins letters
_SENTENCE_ENDS = "\n.!?;。।॥؟።፧؛۔"
_APOSTROPHES = "ʻʼʹˈ"  # letters to Unicode
# Letters whose marks Unicode does not take off (Vietnamese, Hausa), and Urdu's forms of Arabic letters.
_BARE = {"đ": "d", "ɓ": "b", "ɗ": "d", "ƙ": "k", "ƴ": "y", "ی": "ي", "ک": "ك", "ہ": "ه", "ھ": "ه"}
# Letters and marks to Unicode, yet nothing to see: tatweel, joiners, Hangul fillers, variation selectors.
_INVISIBLE = re.compile("[\u0640\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")

_QUOTES = re.compile(
    r'"[^"\n]{8,400}"|“[^”\n]{8,400}”|„[^“”\n]{8,400}[“”]|«[^»\n]{8,400}»|「[^」\n]{4,400}」|『[^』\n]{4,400}』'
)


def without_quotations(text: str) -> str:
    """`text` without what it quotes, unless little else would be left: a refusal that is quoted declines nothing."""
    rest = _QUOTES.sub(" ", text)
    return rest if 3 * len(rest.strip()) > len(text) else text


def is_loop(text: str) -> bool:
    """Whether more than three quarters of the letters, or of those in the second half, repeat what came before."""
    # Digits are left out, since a loop may count its rounds.
    codes = _codes(text)
    letters = codes[_is_letter()[np.minimum(codes, _LETTER_CODES - 1)]]
    if not len(letters):
        letters = _codes(_NO_WORD.sub("", text))
    if len(letters) < _LOOP_LETTERS:
        return False
    windows = _windows(letters)
    distinct, half = len(_distinct(windows)), windows[len(windows) // 2 :]
    if 8 * distinct > 5 * len(windows) + 8:  # more than even a half that repeats itself would leave
        return False
    return 4 * distinct < len(windows) or (len(half) >= _TAIL_LETTERS and 4 * len(_distinct(half)) < len(half))


def is_echo(text: str, prompt: str) -> bool:
    """Whether a text says what a prompt says, in whole or nearly, and little else.

    It may have a few words before that, as in "Question: ...", and none after it, which may be an answer. Two
    questions that share more than half of their wording are taken for the same one.
    """
    if len(text) > _ECHO_TIMES * len(prompt) + _ECHO_MORE:
        return False
    said, asked = (_NO_WORD.sub("", normalize(one)) for one in (text, prompt))
    if len(asked) < _ECHO_LETTERS:
        return False
    if asked in said:
        return said.endswith(asked) and 4 * len(said.replace(asked, "")) <= len(asked)
    if said in asked:
        return 5 * len(said) >= 4 * len(asked)
    in_text, in_prompt = _distinct(_windows(_codes(said))), _distinct(_windows(_codes(asked)))
    shared = len(np.intersect1d(in_text, in_prompt, assume_unique=True))
    return is_question(text) and is_question(prompt) and 5 * shared > 3 * max(len(in_text), len(in_prompt))


def is_question(text: str) -> bool:
    """Whether `text`, not normalised, ends in a question."""
    return text.rstrip(_CLOSING).endswith(_QUESTION_ENDS)


_QUESTION_ENDS = ("?", "？", "؟", "፧", "か", "吗", "呢", "嗎", "ไหม", "หรือเปล่า", "บ้าง")
_CLOSING = " \n\t\"'”’»)*_。."


def _codes(text: str) -> np.ndarray:
    """Code points, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.cache
def _is_letter() -> np.ndarray:
    """Whether a code point is a letter, bool [_LETTER_CODES]: a regular expression takes as long as all else here."""
    chars = map(chr, range(_LETTER_CODES))
    return np.fromiter((char.isalnum() and not char.isdecimal() for char in chars), bool, _LETTER_CODES)


def _windows(codes: np.ndarray) -> np.ndarray:
    """A hash of each window of code points, uint64."""
    hashes = codes.astype(np.uint64)
    for size in (1, 2, 4, 4):  # of what is hashed so far; together a window
        hashes = hashes[:-size] * np.uint64(0x9E3779B97F4A7C15) + (hashes[size:] ^ (hashes[size:] >> np.uint64(29)))
    return hashes


def _distinct(windows: np.ndarray) -> np.ndarray:
    windows = np.sort(windows)  # np.unique is ten times slower
    return windows[np.append(True, windows[1:] != windows[:-1])] if len(windows) else windows


_ADDRESSES = re.compile(r"https?://\S+")
_NO_WORD = re.compile(r"[\W_]+")


def foreign_script(text: str, expected: list[str]) -> str | None:
    """The commonest script of `text`, if fewer than a fifth of its letters are in an expected one; else None.

    The bar is low because letters are not words: a Chinese sentence with two English names in it has more Latin
    letters than Chinese ones. Texts under 20 letters pass.
    """
    scripts: collections.Counter[str] = collections.Counter()
    codes = np.sort(_codes(_ADDRESSES.sub("", text)))
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    for code, count in zip(codes[starts].tolist(), np.diff(starts, append=len(codes)).tolist()):
        if chr(code).isalpha():
            scripts[script(chr(code))] += count
    letters = scripts.total()
    if letters < _SCRIPT_LETTERS or sum(scripts[name] for name in expected) >= letters / 5:
        return None
    return scripts.most_common(1)[0][0]


@functools.lru_cache(maxsize=10_000)
def script(letter: str) -> str:
    """A letter's script: the first word of its Unicode name, "Han" for CJK."""
    plain = unicodedata.normalize("NFKC", letter)[:1] or letter  # FULLWIDTH and the like are no scripts
    return unicodedata.name(plain, "unknown").replace("CJK", "HAN").split()[0].capitalize()

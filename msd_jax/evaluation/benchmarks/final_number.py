"""The number that a text ends with, in the digits of any script."""

import decimal
import re
import unicodedata

# Languages that write 1.000,5 for what English writes 1,000.5.
_COMMA_DECIMAL = frozenset(("de", "el", "es", "fr", "id", "it", "jv", "nl", "pl", "pt", "ru", "tr", "uk", "vi"))
# Between digits: separators of thousands or of decimals; the last four are the Arabic pair and two kinds of space.
_NUMBER = re.compile(r"(?<![\w.,])[-−]?\d+(?:[.,'’٫٬\u00a0\u202f]\d+)*|\d+(?:[.,'’٫٬\u00a0\u202f]\d+)*")
_SPACED = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")  # "70 000", in the languages that write it so


def last_number(text: str, language: str) -> decimal.Decimal | None:
    """The value of the last number in `text`; None where there is none.

    Digits of every script count (১৮ is 18), and so do thousands separators; where a single separator is ambiguous, the
    language's convention decides: "1.250" is 1250 in German and 1.25 in English. A sign counts only where nothing
    precedes it: the second number of "3-5" is 5.

    >>> [str(last_number(text, "en")) for text in ("16 - 3 = 13.", "$70,000", "1,00,000", "½ of -7.50!", "none")]
    ['13', '70000', '100000', '-7.50', 'None']
    >>> str(last_number("মোট ১,২৩৪", "bn")), str(last_number("es sind 1.250 Euro", "de"))
    ('1234', '1250')
    """
    digits = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in text)
    if language.split("-")[0] in ("fr", "ru", "uk", "pl"):
        digits = _SPACED.sub("\u00a0", digits)
    found = _NUMBER.findall(digits)
    return _value(found[-1], language) if found else None


def _value(number: str, language: str) -> decimal.Decimal:
    number = re.sub("['’٬\u00a0\u202f]", "", number.replace("−", "-")).replace("٫", ".")
    last = max(number.rfind("."), number.rfind(","))
    if last < 0:
        return decimal.Decimal(number)
    mark, fraction = number[last], number[last + 1 :]
    if "." in number and "," in number:
        thousands = False  # of two different marks the last one is the decimal's
    elif number.count(mark) > 1:
        thousands = True
    else:
        comma_decimal = language.split("-")[0] in _COMMA_DECIMAL
        thousands = len(fraction) == 3 and mark == (".," if comma_decimal else ",.")[0]
    whole = re.sub("[.,]", "", number[:last])
    return decimal.Decimal(whole + fraction if thousands else f"{whole}.{fraction}")

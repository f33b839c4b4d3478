"""The last number of a text: scripts, separators, signs."""

import decimal
import doctest

import numpy as np
import pytest

from msd_jax.evaluation.benchmarks import final_number
from msd_jax.evaluation.benchmarks.final_number import last_number


def test_the_docstring_is_true():
    results = doctest.testmod(final_number)
    assert results.attempted >= 2 and not results.failed


@pytest.mark.parametrize(
    "text, language, expected",
    [
        ("The answer is 18.", "en", "18"),
        ("16 - 3 - 4 = 9, and 9 * 2 = $18", "en", "18"),
        ("উত্তর: ১৮", "bn", "18"),
        ("คำตอบคือ ๗๐,๐๐๐ ดอลลาร์", "th", "70000"),
        ("الجواب ١٬٢٣٤٫٥", "ar", "1234.5"),
        ("答案是１２。", "zh", "12"),
        ("7 లీటర్లు", "te", "7"),
        ("70 000 euros", "fr", "70000"),
        ("70 000", "en", "0"),  # an English reader sees two numbers
        ("70\u202f000", "en", "70000"),
        ("es kostet 1.250", "de", "1250"),
        ("it costs 1.250", "en", "1.25"),
        ("1,250", "de", "1.25"),
        ("1.250,50 Euro", "de", "1250.5"),
        ("1,250.50", "de", "1250.5"),  # of two marks the last is the decimal's, in whatever language
        ("1'250 Franken", "de", "1250"),
        ("12,50", "en", "12.5"),
        ("1,00,000 টাকা", "bn", "100000"),
        ("between 3-5", "en", "5"),
        ("loses -5 dollars", "en", "-5"),
        ("loses −5", "en", "-5"),
        ("100%", "en", "100"),
        ("version 2.0.1", "en", "201"),  # not a number at all; whatever it gives, it does not fail
        ("**42**", "en", "42"),
        ("x2", "en", "2"),
        ("5th, then nothing", "en", "5"),
    ],
)
def test_numbers(text, language, expected):
    assert last_number(text, language) == decimal.Decimal(expected)


SPACES = "\u00a0\u2007\u2009\u202f"


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("language", ["en", "sw", "bn", "fr"])
def test_narrow_spaces_group_digits_in_every_language(space, language):
    assert last_number(f"= 1{space}234{space}567.", language) == 1234567
    assert last_number(f"1{space}00{space}000", language) == 100000  # as in India
    assert last_number(f"7{space}12", language) == 12


@pytest.mark.parametrize(
    "text, language, expected",
    [
        # Spaces between groups of three digits, and between numbers.
        ("Jibu ni 70 000", "sw", "70000"),
        ("Jibu ni 1 250 000,50", "fr", "1250000.5"),
        ("siku 3 kwa shilingi 20", "sw", "20"),
        ("mwaka 2023 500", "sw", "500"),
        ("3 100 2000", "sw", "2000"),
        # Commas and points of other scripts.
        ("الجواب ١،٢٣٤", "ar", "1234"),
        ("الجواب ١،٢٣٤،٥٦٧", "ar", "1234567"),
        ("١،٥", "ar", "1.5"),
        ("١،٢،٣", "ar", "3"),
        ("۱۲٬۳۴۵٫۶", "fa", "12345.6"),
        ("共７０，０００元", "zh", "70000"),
        ("先是16，13", "zh", "13"),
        ("１．５", "ja", "1.5"),
        ("१,००,००० रुपये", "hi", "100000"),
        ("\U0001d7d5\U0001d7ce", "en", "70"),  # mathematical digits
        ("0.500", "de", "0.5"),
        # Signs.
        ("The answer is –7", "en", "-7"),
        ("The answer is \u20117", "en", "-7"),
        ("答案是－７。", "zh", "-7"),
        ("答案是-7", "zh", "-7"),
        ("3个-5个", "zh", "5"),
        ("ตอบ-7", "th", "-7"),
        ("টি–৭", "bn", "7"),
        ("pages 3–5", "en", "5"),
        ("F-16", "en", "16"),
        ("\u200f-\u200e٧", "ar", "-7"),  # with marks of writing direction
        ("-$7", "en", "-7"),
        ("$-7", "en", "-7"),
        # Words and characters that multiply.
        ("一共7万", "zh", "70000"),
        ("1.5万", "zh", "15000"),
        ("7万5000", "zh", "75000"),
        ("7万人中有5000", "zh", "5000"),
        ("5千克", "zh", "5"),
        ("3億5000万円", "ja", "350000000"),
        ("7만 5천 원", "ko", "75000"),
        ("৭০ হাজার টাকা", "bn", "70000"),
        ("१.५ लाख", "hi", "150000"),
        ("2 లక్షల", "te", "200000"),
        ("7 หมื่น", "th", "70000"),
        ("5 พันธุ์", "th", "5"),
        ("shilingi elfu 70", "sw", "70000"),
        ("5,5 Millionen", "de", "5500000"),
        ("5 тыс. рублей", "ru", "5000"),
        ("7 mil", "es", "7000"),
        ("7 miles", "es", "7"),
        ("1 lakh 20 thousand", "en", "120000"),
        ("$70k", "en", "70000"),
        ("70 km", "en", "70"),
        ("-2 million", "en", "-2000000"),
        # Fractions, and LaTeX.
        ("3½ apples", "en", "3.5"),
        ("3.5½", "en", "3.5"),
        ("$70{,}000$", "en", "70000"),
        ("\\boxed{70\\,000}", "en", "70000"),
        ("10²", "en", "10"),
    ],
)
def test_numbers_as_people_and_models_write_them(text, language, expected):
    assert last_number(text, language) == decimal.Decimal(expected)


@pytest.mark.parametrize("text", ["", "none", "zwölf", "½", "十二", "-", ".,"])
def test_no_number(text):
    assert last_number(text, "en") is None


def test_every_formatted_number_is_read_back(rng):
    digits = ["0123456789", "০১২৩৪৫৬৭৮৯", "٠١٢٣٤٥٦٧٨٩", "๐๑๒๓๔๕๖๗๘๙", "०१२३४५६७८९", "０１２３４５６７８９"]
    for _ in range(300):
        value = int(rng.integers(-(10**7), 10**7))
        table = str.maketrans(digits[0], digits[rng.integers(len(digits))])
        assert last_number(f"12 = {value:,}.".translate(table), "en") == value
        assert last_number(f"12 = {f'{value:,}'.replace(',', '.')}.".translate(table), "id") == value
        cents = value + decimal.Decimal(int(rng.integers(1, 100))) / 100 if value > 0 else decimal.Decimal(value)
        assert last_number(f"= {cents:,.2f} !".translate(table), "sw") == cents.quantize(decimal.Decimal("0.01"))


def test_hostile_texts_take_no_time():
    for text in (
        "1," * 50_000,
        "9" * 100_000,
        "1 000" * 20_000,
        "-" * 100_000 + "1",
        "1万" * 50_000,
        "$ " * 50_000 + "1",
    ):
        for language in ("fr", "sw", "zh"):
            np.testing.assert_equal(last_number(text, language) is not None, True)

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
    for text in ("1," * 50_000, "9" * 100_000, "1 000" * 20_000, "-" * 100_000 + "1"):
        np.testing.assert_equal(last_number(text, "fr") is not None, True)

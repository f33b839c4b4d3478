"""What models and data sets write cannot act on a terminal, in Markdown, or in a page's data."""

import json
import unicodedata

import pytest

from msd_jax.report import untrusted
from tests.report.conftest import HOSTILE, TEXT


def acting(text: str) -> set[str]:
    """Characters that are not to be seen, but for the joiners."""
    return {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}} - {"\u200c", "\u200d"}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_character_acts(name):
    assert not acting(untrusted.visible(HOSTILE[name])) and not acting(untrusted.markdown(HOSTILE[name]))


def test_what_acts_is_shown():
    assert untrusted.visible("\x1b[31m \x07\x7f\x9b \u202e \ud83d\nend") == "␛[31m ␇␡[U+009B] [U+202E] [U+D83D]↵end"
    assert untrusted.visible("word " * 10, limit=9) == "word word … (41 more characters)"


@pytest.mark.parametrize("text", [*TEXT.values(), "ক্‍ষ", "می‌خواهم", "👩‍🔬"])
def test_texts_of_all_scripts_stay_as_they_are(text):
    assert untrusted.visible(text) == text


def test_nothing_is_left_for_markdown_to_act_on():
    text = untrusted.markdown("".join(HOSTILE.values()))
    assert not set("<>`*_|~$\\!@") & set(text) and "](" not in text and "://" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert untrusted.markdown("www.example.invalid") == "www&#46;example.invalid"
    assert untrusted.markdown("0.0 -> 5.0% [1, 12]") == "0.0 → 5.0% [1, 12]"
    assert untrusted.markdown("[1, 12](https://x)") == "&#91;1, 12&#93;(https&#58;//x)"


def test_json_cannot_end_the_element_it_stands_in():
    text = untrusted.json_for_html(HOSTILE)
    assert not set("<>&\u2028\u2029") & set(text)
    text.encode("utf-8")  # a lone surrogate would raise
    assert json.loads(text) == HOSTILE

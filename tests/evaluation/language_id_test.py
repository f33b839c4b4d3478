"""In which language a response is: accuracy on the testbed's languages, and what cannot be told."""

import pytest

from msd_jax import testbed
from msd_jax.evaluation import language_id
from msd_jax.testbed import corpus, languages

ALL = (*testbed.SOURCE_LANGUAGES, *testbed.TARGET_LANGUAGES, *testbed.UNSEEN_LANGUAGES)


@pytest.mark.parametrize("code", ALL)
def test_the_testbeds_texts_are_in_their_own_language(code):
    queries = corpus.eval_queries()
    answers = {query.answers[code] for query in queries if query.answers} | {languages.LANGUAGES[code].refusal}
    assert sum(bool(language_id.matches(query.texts[code], code)) for query in queries) >= len(queries) - 1
    told = [language_id.matches(answer, code) for answer in answers]
    assert len(told) >= 20 and told.count(True) >= (0.9 if code == "zh" else 0.95) * len(told)
    others = [other for other in ALL if other != code]
    assert not any(language_id.matches(query.texts[other], code) for query in queries[:40] for other in others)


def test_codes_and_texts_that_cannot_be_told():
    assert language_id.matches("Siwezi kukusaidia na ombi hilo.", "sw-KE") is True
    assert language_id.matches("我不能帮助你做这件事。", "zh-Hant") is True
    assert language_id.matches("Jeg kan ikke hjelpe deg med det.", "nb") is True
    assert language_id.matches("no", "sw") is None and language_id.matches(" \n", "en") is None
    assert language_id.matches("wo bu neng bang zhu ni", "tlh") is None  # a language that the library does not know


def test_a_huge_or_broken_text_is_no_trouble():
    assert language_id.matches("Siwezi kukusaidia na ombi hilo. " * 10_000, "sw") is True
    assert language_id.matches("\ud800 Siwezi kukusaidia na ombi hilo", "sw") in (True, False)
    assert language_id.matches("\x00\x1b[31m" * 100, "en") in (True, False, None)

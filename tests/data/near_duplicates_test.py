"""Against a plain comparison of every pair, and within seconds."""

import json
import random
import time

import pytest

from msd_jax.data import near_duplicates
from msd_jax.data.records import Query

WORDS = [
    "how",
    "do",
    "i",
    "make",
    "wash",
    "sell",
    "a",
    "the",
    "big",
    "red",
    "cake",
    "bread",
    "boat",
    "without",
    "flour",
]


def make(name: str, *texts: dict[str, str] | str) -> list[Query]:
    texts = [text if isinstance(text, dict) else {"en": text} for text in texts]
    return [Query(f"{name}{i}", None, "", text) for i, text in enumerate(texts)]


def sentences(count: int, seed: int, low: int = 3, high: int = 9) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(low, high))) for _ in range(count)]


def jaccard(a: str, b: str) -> float:
    a, b = ({f" {t} "[i : i + 3] for i in range(len(t))} for t in (a, b))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("sizes", [(700, 40), (40, 700), (1, 1)])
def test_the_closest_of_each_query_is_found(threshold, sizes):
    a, b = (sentences(count, seed) for seed, count in enumerate(sizes))
    b[0] = a[-1]
    pairs = near_duplicates.find(make("a", *a), make("b", *b), threshold)
    found = {(int(pair.train_id[1:]), int(pair.eval_id[1:])): pair.similarity for pair in pairs}
    table = {(i, j): jaccard(x, y) for i, x in enumerate(a) for j, y in enumerate(b)}
    for pair, similarity in found.items():
        assert similarity == pytest.approx(table[pair], abs=2e-6) and similarity >= threshold
    for side, count in enumerate(sizes):
        for i in range(count):
            best = max(similarity for pair, similarity in table.items() if pair[side] == i)
            mine = max((similarity for pair, similarity in found.items() if pair[side] == i), default=0)
            assert mine == (pytest.approx(best, abs=2e-6) if best >= threshold else 0)
    assert [pair.similarity for pair in pairs] == sorted((pair.similarity for pair in pairs), reverse=True)
    assert all(pair.exact == (a[int(pair.train_id[1:])] == b[int(pair.eval_id[1:])]) for pair in pairs)


@pytest.mark.parametrize(
    "one, other",
    [
        ("How do I make BREAD?", "  how do i\n\tmake bread "),
        ("“Ｈｏｗ” — do I make bread…", "how do i make bread"),
        ("STRASSE und Café", "straße, und cafe\u0301"),
        ("কীভাবে রুটি বানাব?", "কীভাবে  রুটি বানাব।"),
        ("به‌طور کامل؟", "بهطور کامل"),  # a joiner between letters
        ("bread\u202e\u200b\u00ad now", "bread now"),
        ("🙂🙂!", "🙂🙂!"),
        ("我", "我。"),
    ],
)
def test_what_does_not_tell_queries_apart(one, other):
    (pair,) = near_duplicates.find(make("a", one), make("b", other))
    assert (pair.similarity, pair.exact) == (1.0, True)


@pytest.mark.parametrize(
    "one, other",
    [
        ("กิน", "กัน"),  # marks are letters' business
        ("🙂🙂!", "🍞🍞?"),
        ("how do i make a cake", "how do i wash a boat"),
        ("1 2 3", "1 2 4"),
    ],
)
def test_what_does(one, other):
    assert not near_duplicates.find(make("a", one), make("b", other))


def test_the_same_set_of_trigrams_is_not_the_same_text():
    (pair,) = near_duplicates.find(make("a", "ha ha ha ha"), make("b", "ha ha ha"))
    assert (pair.similarity, pair.exact) == (1.0, False)


def test_languages_are_compared_each_with_itself():
    train = make("t", {"en": "make bread at home", "sw": "tengeneza mkate"}, {"yo": "make soup at sea"})
    evaluation = make("e", {"sw": "Tengeneza mkate!", "it": "make bread at home"}, {"en": "make soup at sea"})
    pairs = near_duplicates.find(train, evaluation)
    assert [(pair.language, pair.train_id, pair.eval_id) for pair in pairs] == [("sw", "t0", "e0")]
    assert near_duplicates.find(train, []) == near_duplicates.find([], evaluation) == []


def test_rows_and_one_line_a_benchmark_name_ids_and_quote_nothing():
    train = make("t", {"en": "secret bread now", "sw": "siri mkate sasa"}, {"en": "wash a boat"})
    shared = make("e", {"en": "Secret bread now!", "sw": "siri mkate sasa"}, {"en": "secret bread now"})
    shared.append(Query("x\x1b[2J\u202e", None, "", {"en": "something else"}))
    hostile = [Query("x\x1b[2J\u202e", None, "", {"en": "wash a boat"})]
    other = make("o", "nothing of it")
    rows, lines = near_duplicates.find_in_benchmarks(train, {"one": shared, "two": hostile, "three": other})
    assert lines[0].startswith(
        "near-duplicates: 2 (en), 1 (sw) of 3 queries of benchmark one have a near-copy in the training data; "
        "closest: 't0'"
    )
    assert len(lines) == 2 and lines[1].isprintable() and "1 (en)" in lines[1]
    written = json.dumps(rows) + " ".join(lines)
    assert not any(word in written.lower() for word in ("secret", "siri", "wash"))
    assert {(row["benchmark"], row["language"], row["train_id"], row["eval_id"]) for row in rows} == {
        ("one", "en", "t0", "e0"),
        ("one", "en", "t0", "e1"),
        ("one", "sw", "t0", "e0"),
        ("two", "en", "t1", "x\x1b[2J\u202e"),
    }


def test_ten_thousand_by_ten_thousand_takes_seconds():
    draw = random.Random(0)

    def letters() -> str:
        return "".join(draw.choices("etaoinshrdlucmfwypvbgk", k=draw.randint(2, 8)))

    words = [letters() for _ in range(8000)]
    zipf = [1 / (rank + 1) for rank in range(len(words))]
    texts = [" ".join(draw.choices(words, zipf, k=draw.randint(6, 30))) for _ in range(20_000)]
    texts[15_000] = texts[5_000].upper() + "?"
    train, evaluation = make("t", *texts[:10_000]), make("e", *texts[10_000:])
    start = time.process_time()
    pairs = near_duplicates.find(train, evaluation)
    assert time.process_time() - start < 20  # 5 s on one core
    assert ("t5000", "e5000", True) in {(pair.train_id, pair.eval_id, pair.exact) for pair in pairs}

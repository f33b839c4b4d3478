import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import zlib

import ml_collections
import numpy as np
import pytest
import scipy.stats
from msd_jax.configs import default

from msd_jax.data import batches, files, prompts
from msd_jax.data.records import Query
from msd_jax.models.tokenizer import load_tokenizer
from msd_jax.parallel import padding
from tests.conftest import REPOSITORY, SHARED
from tests.data.prompts_test import byte_tokenizer, prompts_config

PAD = 1  # the tokenizer's eos and pad


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def make_config(**changes) -> ml_collections.ConfigDict:
    data = {"path": "queries.jsonl", "source_language": "en", "retain_fraction": 0.0}
    whole = default.get_config()
    sections = {"data": data, "prompts": prompts_config(**changes), "rollout": whole.rollout, "loss": whole.loss}
    return ml_collections.ConfigDict(sections)


def make_query(name: str, **lengths: int) -> Query:
    """A query whose texts have so many letters, by language."""
    return Query(name, True, "", {language: "x" * n for language, n in lengths.items()})


def make_encoded(count: int, languages: tuple[str, ...] = ("sw", "jv", "bn"), seed: int = 0) -> batches.Encoded:
    """Random prompts without a tokenizer, pad ids among them."""
    rng = np.random.default_rng(seed)

    def ids(limit):
        return rng.integers(0, 9, rng.integers(1, limit + 1), dtype=np.int32)

    queries = tuple(
        batches.EncodedQuery(
            f"q{i}", None, tuple(prompts.Example(f"q{i}", language, None, ids(40), ids(100)) for language in languages)
        )
        for i in range(count)
    )
    return batches.Encoded(queries, languages, student_limit=40, teacher_limit=100, dropped={})


def change(query: batches.EncodedQuery, **changes) -> batches.EncodedQuery:
    """The query with another id or label, in its examples too."""
    names = {"id": "query_id", "harmful": "harmful"}
    targets = (dataclasses.replace(x, **{names[key]: value for key, value in changes.items()}) for x in query.targets)
    return dataclasses.replace(query, targets=tuple(targets), **changes)


def stream(encoded, batch_size: int, count: int, seed: int = 0, window: int = 1, **weights: float) -> list:
    """(query id, language) of the first `count` examples."""
    weights = weights or dict.fromkeys(encoded.languages, 1.0)
    rows = itertools.chain.from_iterable(
        batch.examples for batch in batches.batches(encoded, weights, batch_size, seed, PAD, window)
    )
    return [(example.query_id, example.language) for example in itertools.islice(rows, count)]


def same(a: batches.Batch, b: batches.Batch) -> bool:
    arrays = [field.name for field in dataclasses.fields(a) if field.name != "examples"]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays) and [
        (x.query_id, x.language) for x in a.examples
    ] == [(x.query_id, x.language) for x in b.examples]


def test_order_is_a_function_of_the_seed():
    encoded = make_encoded(60)
    first = stream(encoded, 4, 300, seed=0)
    assert first == stream(encoded, 4, 300, seed=0)
    assert first != stream(encoded, 4, 300, seed=1)
    # Neither the order nor the languages of a seed's later epochs are another seed's earlier ones.
    others = [stream(encoded, 4, 300, seed=seed) for seed in (1, 2)]
    epochs = [tuple(rows[i : i + 60]) for rows in (first, *others) for i in range(0, 300, 60)]
    assert len(set(epochs)) == len(epochs)
    assert len({tuple(id for id, _ in epoch) for epoch in epochs}) == len(epochs)


def test_order_does_not_depend_on_the_batch_size():
    encoded = make_encoded(45)
    streams = [stream(encoded, batch_size, 100) for batch_size in (1, 4, 45, 64)]
    assert all(rows == streams[0] for rows in streams)


def test_a_window_sorts_by_length_and_nothing_else():
    encoded = make_encoded(64, ("sw",))
    weights = {"sw": 1.0}
    plain, grouped = (
        list(itertools.islice(batches.batches(encoded, weights, 8, 0, PAD, window), 24)) for window in (1, 4)
    )

    def length(example):
        return len(example.student_ids) + len(example.teacher_ids)

    orders = []
    for first in range(0, 24, 4):
        rows = [example for batch in plain[first : first + 4] for example in batch.examples]
        windows = [batch.examples for batch in grouped[first : first + 4]]
        assert {x.query_id for x in rows} == {x.query_id for batch in windows for x in batch}
        ranges = sorted((length(batch[0]), length(batch[-1])) for batch in windows)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))  # no two batches overlap in length
        orders.append(tuple(np.argsort([length(batch[0]) for batch in windows])))
    assert len(set(orders)) > 2  # the batches themselves come in random order


def test_a_window_leaves_less_padding():
    encoded = make_encoded(400, ("sw",))

    def padding(window):
        some = list(itertools.islice(batches.batches(encoded, {"sw": 1.0}, 8, 0, PAD, window), 48))
        real = sum(int(b.student_length_B.sum() + b.teacher_length_B.sum()) for b in some)
        return 1 - real / sum(b.student_prompt_BxP.size + b.teacher_prompt_BxP.size for b in some)

    assert padding(8) < 0.9 * padding(1)


@pytest.mark.parametrize("count", [1, 2, 13, 64])
def test_each_epoch_holds_each_record_once(count):
    epochs = np.array([int(id[1:]) for id, _ in stream(make_encoded(count), 5, 6 * count)]).reshape(6, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    if count > 10:
        assert len({tuple(epoch) for epoch in epochs}) == 6
        assert tuple(range(count)) not in {tuple(epoch) for epoch in epochs}


def test_a_record_meets_all_its_languages_over_the_epochs():
    languages = collections.defaultdict(set)
    for id, language in stream(make_encoded(10), 5, 300):
        languages[id].add(language)
    assert all(seen == {"sw", "jv", "bn"} for seen in languages.values())


def test_languages_are_drawn_by_weight():
    weights = {"sw": 6.0, "jv": 3.0, "bn": 1.0, "it": 0.0}
    drawn = [language for _, language in stream(make_encoded(1000, tuple(weights)), 16, 5000, **weights)]
    counts = collections.Counter(drawn)
    assert set(counts) == {"sw", "jv", "bn"}
    observed = [counts[language] for language in ("sw", "jv", "bn")]
    assert scipy.stats.chisquare(observed, [3000, 1500, 500]).pvalue > 1e-3
    # ... and independently: what one query gets says nothing of the next one's language.
    pairs = collections.Counter(itertools.pairwise(drawn))
    table = [[pairs[a, b] for b in ("sw", "jv", "bn")] for a in ("sw", "jv", "bn")]
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_weights_are_shared_out_among_the_languages_that_a_record_has_left():
    encoded = make_encoded(100, ("sw", "jv"))
    queries = tuple(  # half have jv alone
        query if i % 2 else dataclasses.replace(query, targets=query.targets[1:])
        for i, query in enumerate(encoded.queries)
    )
    encoded = dataclasses.replace(encoded, queries=queries)
    rows = stream(encoded, 4, 2000, sw=3.0, jv=1.0)
    counts = collections.Counter((int(id[1:]) % 2, language) for id, language in rows)
    assert counts[0, "jv"] == 1000 and counts[0, "sw"] == 0
    assert scipy.stats.binomtest(counts[1, "sw"], 1000, 0.75).pvalue > 1e-3
    # Without jv, one half has nothing to give.
    assert {int(id[1:]) % 2 for id, _ in stream(encoded, 4, 100, sw=1.0, jv=0.0)} == {1}


def make_mixed(**sizes: int) -> batches.Encoded:
    """Sources of so many queries, by name; every third query is harmful."""
    queries = tuple(
        change(query, id=f"{name}/{i}", harmful=i % 3 == 0)
        for number, (name, count) in enumerate(sizes.items())
        for i, query in enumerate(make_encoded(count, seed=number).queries)
    )
    return dataclasses.replace(make_encoded(1), queries=queries)


def mixed(encoded, batch_size=8, seed=0, window=4, weights=None, **mix):
    weights = weights or {"sw": 2.0, "jv": 1.0, "bn": 1.0}
    return batches.batches(encoded, weights, batch_size, seed, PAD, window, **mix)


def examples(batches, count: int) -> list[prompts.Example]:
    return list(itertools.islice(itertools.chain.from_iterable(batch.examples for batch in batches), count))


def test_sources_have_their_shares_whatever_their_size():
    encoded = make_mixed(a=60, b=200, c=100)
    rows = examples(mixed(encoded, window=1, source_weights={"a": 5.0, "b": 2.5, "c": 2.5}), 2000)
    names = np.array([row.query_id[0] for row in rows])
    for name, share in (("a", 0.5), ("b", 0.25), ("c", 0.25)):
        # Not by chance: of any number of successive queries, rounded.
        count = np.cumsum(names == name)
        assert np.abs(count - share * np.arange(1, 2001)).max() < 2
        # Each source has epochs of its own.
        ids = [row.query_id for row in rows if row.query_id[0] == name]
        size = len({query.id for query in encoded.queries if query.id[0] == name})
        epochs = [ids[first : first + size] for first in range(0, len(ids) - size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    languages = collections.Counter(row.language for row in rows)
    assert scipy.stats.chisquare([languages[code] for code in ("sw", "jv", "bn")], [1000, 500, 500]).pvalue > 1e-3


def test_harmful_and_harmless_have_their_shares_and_sources_share_them_out():
    encoded = make_mixed(a=200, b=300)
    left = tuple(query for query in encoded.queries if query.id[0] == "a" or not query.harmful)
    encoded = dataclasses.replace(encoded, queries=left)  # b has harmless queries alone
    rows = examples(mixed(encoded, source_weights={"a": 3.0, "b": 1.0}, harmful_share=0.2), 1000)
    counts = collections.Counter((row.query_id[0], row.harmful) for row in rows)
    # The share of each label holds; a and b share out the harmless part alone, 3 to 1.
    expected = {("a", True): 200, ("a", False): 600, ("b", False): 200}
    assert set(counts) == set(expected) and all(abs(counts[part] - n) < 2 for part, n in expected.items())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_harmful_queries_of_one_source(share):
    rows = examples(mixed(make_encoded_with_labels(), window=1, harmful_share=share), 600)
    harmful = np.cumsum([row.harmful for row in rows])
    assert np.abs(harmful - share * np.arange(1, 601)).max() <= 1.01


def make_encoded_with_labels() -> batches.Encoded:
    encoded = make_encoded(200)
    queries = tuple(change(query, harmful=i < 150) for i, query in enumerate(encoded.queries))
    return dataclasses.replace(encoded, queries=queries)


def test_a_source_of_weight_0_is_left_out_and_the_others_stay_as_they_were():
    with_c, without = (
        examples(mixed(make_mixed(a=60, b=60, c=60), window=1, source_weights={"a": 1.0, "b": 1.0, "c": c}), 360)
        for c in (1.0, 0.0)
    )
    assert {row.query_id[0] for row in without} == {"a", "b"}
    for name in "ab":
        orders = [[row.query_id for row in rows if row.query_id[0] == name] for rows in (with_c, without)]
        assert orders[0] == orders[1][: len(orders[0])]
    orders = [[row.query_id[2:] for row in without if row.query_id[0] == name] for name in "ab"]
    assert orders[0] != orders[1]  # sources of one size are not shuffled alike


MIX = {"source_weights": {"a": 3.0, "b": 1.0}, "harmful_share": 0.4}


def test_a_mixed_stream_is_a_function_of_the_seed_and_not_of_the_batch_size():
    encoded = make_mixed(a=60, b=99)

    def name(rows):
        return [(row.query_id, row.language) for row in rows]

    streams = [name(examples(mixed(encoded, size, window=1, **MIX), 256)) for size in (1, 7, 8, 64)]
    assert all(rows == streams[0] for rows in streams)
    assert name(examples(mixed(encoded, 8, seed=1, window=1, **MIX), 256)) != streams[0]
    windowed = name(examples(mixed(encoded, 8, window=4, **MIX), 256))
    for first in range(0, 256, 32):  # a window moves queries within itself alone
        assert sorted(windowed[first : first + 32]) == sorted(streams[0][first : first + 32])


@pytest.mark.parametrize("taken", [1, 6, 100_003])
def test_a_mixed_stream_goes_on_from_one_integer(taken):
    encoded = make_mixed(a=60, b=99)
    iterator = iter(mixed(encoded, **MIX))
    if taken < 100:
        for _ in range(taken):
            next(iterator)
        assert iterator.get_state() == {"next_index": taken}
    else:
        iterator.set_state({"next_index": taken})
    expected = [next(iterator) for _ in range(6)]
    fresh = iter(mixed(make_mixed(a=60, b=99), **MIX))
    fresh.set_state(json.loads(json.dumps({"next_index": taken})))
    assert all(same(a, b) for a, b in zip(expected, fresh))


def test_another_host_builds_the_same_mixed_batches():
    """Four real processes train on a mix in distributed_test.py; here, the order of sets and dicts must not matter."""
    code = (
        "import itertools, json; from tests.data import batches_test as t\n"
        "batches = itertools.islice(t.mixed(t.make_mixed(a=60, b=99), **t.MIX), 10)\n"
        "print(json.dumps([[b.query_hash_B.tolist(), b.teacher_prompt_BxP.tolist()] for b in batches]))"
    )
    root, environment = REPOSITORY, os.environ | {"PYTHONHASHSEED": "7"}
    arguments = [sys.executable, "-c", code]
    output = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    batches = itertools.islice(mixed(make_mixed(a=60, b=99), **MIX), 10)
    expected = [[batch.query_hash_B.tolist(), batch.teacher_prompt_BxP.tolist()] for batch in batches]
    assert json.loads(output.splitlines()[-1]) == expected


@pytest.mark.parametrize(
    "mix, message",
    [
        ({"source_weights": {"a": 1.0, "b": 1.0, "z": 1.0}}, r"sources\.z: none of its queries is left"),
        ({"harmful_share": 0.5}, r"harmful_share=0\.5: 1 queries have no label \(first: id 'a/1'\)"),
    ],
)
def test_mixes_that_cannot_be(mix, message):
    encoded = make_mixed(a=3, b=3)
    first, second, *rest = encoded.queries
    encoded = dataclasses.replace(encoded, queries=(first, change(second, harmful=None), *rest))
    with pytest.raises(ValueError, match=r"config\.data\." + message):
        mixed(encoded, **mix)
    harmless = dataclasses.replace(encoded, queries=tuple(q for q in encoded.queries if q.harmful is False))
    with pytest.raises(ValueError, match="there are no harmful queries to draw"):
        mixed(harmless, harmful_share=0.5)
    assert examples(mixed(harmless, harmful_share=0.0), 10)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("taken", [0, 1, 3, 10])
def test_a_restored_iterator_goes_on_identically(taken, window):
    weights = {"sw": 2.0, "jv": 1.0, "bn": 0.0}
    iterator = iter(batches.batches(make_encoded(10), weights, 4, 3, PAD, window))
    for _ in range(taken):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(8)]
    fresh = iter(batches.batches(make_encoded(10), weights, 4, 3, PAD, window))
    next(fresh)
    fresh.set_state(json.loads(state))
    assert all(same(a, b) for a, b in zip(expected, fresh))
    iterator.set_state(json.loads(state))  # backwards too
    assert all(same(a, b) for a, b in zip(expected, iterator))


def test_another_process_goes_on_identically():
    iterator = iter(batches.batches(make_encoded(10), {"sw": 2.0, "jv": 1.0}, 4, 3, PAD))
    for _ in range(3):
        next(iterator)
    code = (
        "import itertools, json, sys; from tests.data import batches_test as t\n"
        "it = iter(t.batches.batches(t.make_encoded(10), {'sw': 2.0, 'jv': 1.0}, 4, 3, t.PAD))\n"
        "it.set_state(json.loads(sys.argv[1]))\n"
        "print(json.dumps([[b.query_hash_B.tolist(), b.teacher_prompt_BxP.tolist()] for b in itertools.islice(it, 6)]))"
    )
    root = REPOSITORY
    arguments = [sys.executable, "-c", code, json.dumps(iterator.get_state())]
    output = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=True).stdout
    expected = [[b.query_hash_B.tolist(), b.teacher_prompt_BxP.tolist()] for b in itertools.islice(iterator, 6)]
    assert json.loads(output.splitlines()[-1]) == expected


def test_batches_are_left_padded_and_lengths_count_real_tokens():
    encoded = make_encoded(30)
    iterator = iter(batches.batches(encoded, {"sw": 1.0, "jv": 1.0}, 8, 0, PAD, window=4))
    columns: dict[str, set[int]] = {"student": set(), "teacher": set()}
    for batch in itertools.islice(iterator, 40):
        for role, whole in zip(("student", "teacher"), encoded.columns):
            prompt_BxP, length_B = getattr(batch, f"{role}_prompt_BxP"), getattr(batch, f"{role}_length_B")
            assert prompt_BxP.dtype == length_B.dtype == np.int32
            assert prompt_BxP.shape[0] == len(length_B) == len(batch.examples) == 8
            assert prompt_BxP.shape[1] == (whole if length_B.max() > whole // 2 else whole // 2)
            columns[role].add(prompt_BxP.shape[1])
            for row, length, example in zip(prompt_BxP, length_B, batch.examples):
                ids = getattr(example, f"{role}_ids")
                assert length == len(ids)  # pad ids within a prompt count as well
                np.testing.assert_array_equal(row[len(row) - length :], ids)
                assert (row[: len(row) - length] == PAD).all()
        assert batch.query_hash_B.dtype == np.uint32
        for hash, example in zip(batch.query_hash_B, batch.examples):
            assert hash == zlib.crc32(f"{example.query_id}\x1f{example.language}".encode())
    # However many batches there are, a role's prompts have two sizes.
    assert columns == {role: {whole // 2, whole} for role, whole in zip(columns, encoded.columns)}


def test_query_hash_tells_queries_and_languages_apart():
    pairs = [(f"q{i}", language) for i in range(500) for language in ("sw", "jv", "bn")] + [("q1sw", ""), ("", "q1sw")]
    assert len({batches.query_hash(*pair) for pair in pairs}) == len(pairs)
    assert batches.query_hash("q1", "sw") == 2534312769  # stored responses and seeds rely on it


def test_buckets():
    sizes = [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert sorted({padding.bucket(n, 512) for n in range(513)}) == sizes
    for n in range(1, 513):
        size = padding.bucket(n, 512)
        assert n <= size and (size == 16 or 3 * (size - n) < size)
    assert padding.bucket(96, 512) == 96 and padding.bucket(97, 512) == 128
    assert [padding.bucket(n, 100) for n in (90, 96, 97, 100)] == [96, 96, 100, 100]
    assert padding.bucket(3, 5) == 5
    with pytest.raises(ValueError, match="length of 101 exceeds its limit of 100"):
        padding.bucket(101, 100)


def test_prompts_at_the_limit_stay_and_longer_ones_are_counted(tokenizer):
    config = make_config(student_limit=60, teacher_limit=60, teacher_template="{query}")
    frame = len(prompts.student_ids(make_query("q", en=1, sw=1), "sw", tokenizer, config.prompts)) - 1
    fits, long = 60 - frame, 61 - frame
    records = [
        make_query("all", en=1, sw=fits, jv=1),
        make_query("no sw", en=fits, sw=long, jv=1),
        make_query("nothing", en=long, sw=1, jv=long),
        make_query("nothing for jv", en=1, sw=1, jv=long + 7),
    ]
    encoded = batches.encode_all(records, ("sw", "jv"), tokenizer, config)
    kept = [[(example.query_id, example.language) for example in query.targets] for query in encoded.queries]
    assert kept == [[("all", "sw"), ("all", "jv")], [("no sw", "jv")], [("nothing for jv", "sw")]]
    assert encoded.dropped == {
        ("sw", "student_limit"): 1,
        ("sw", "teacher_limit"): 1,
        ("jv", "student_limit and teacher_limit"): 1,
        ("jv", "student_limit"): 1,
    }
    assert sum(encoded.dropped.values()) + sum(map(len, kept)) == len(records) * 2
    assert "prompts dropped in sw: 1, longer than config.prompts.student_limit" in encoded.describe()
    assert len(encoded.describe()) == 4
    assert (encoded.queries[0].targets[0].student_ids.size, encoded.languages) == (60, ("sw", "jv"))
    assert {id for id, _ in stream(encoded, 4, 30)} == {"all", "no sw", "nothing for jv"}


def test_retained_queries_are_shown_to_both_roles_as_a_user_writes_them(tokenizer):
    config = make_config(student_limit=60, teacher_limit=60, teacher_template="Mind: {query}")
    config.data.retain_fraction = 0.25
    config.prompts.student_system = "s"
    records = [make_query(f"q{i}", en=1 + i, sw=2, jv=3) for i in range(8)]
    encoded = batches.encode_all(records, ("sw", "jv"), tokenizer, config)
    for record, query in zip(records, encoded.queries):
        kept = query.retained
        assert [x.language for x in query.targets] == ["sw", "jv"]
        assert kept.language == "en" and kept.query_id == query.id == record.id
        expected = prompts.student_ids(record, "en", tokenizer, config.prompts)
        np.testing.assert_array_equal(kept.student_ids, expected)
        np.testing.assert_array_equal(kept.teacher_ids, expected)

    def shown(fraction, count=4000, **weights):
        stream = batches.batches(encoded, weights, 8, 0, PAD, retain_fraction=fraction)
        rows = itertools.chain.from_iterable(batch.examples for batch in stream)
        return [x.language for x in itertools.islice(rows, count)]

    seen = collections.Counter(shown(0.25, sw=2.0, jv=1.0))
    expected = {"en": 0.25, "sw": 0.5, "jv": 0.25}
    assert seen.keys() == expected.keys()
    for key, share in expected.items():
        assert abs(seen[key] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5, key
    assert "en" not in shown(0.0, 200, sw=1.0, jv=1.0)
    assert set(shown(0.25, 200, jv=1.0)) == {"en", "jv"}


def test_without_retained_queries_the_stream_is_what_it_was(tokenizer):
    records = [make_query(f"q{i}", en=1, sw=1 + i, jv=20 - i) for i in range(9)]
    plain, retaining = make_config(), make_config()
    retaining.data.retain_fraction = 0.5
    a, b = (batches.encode_all(records, ("sw", "jv"), tokenizer, config) for config in (plain, retaining))
    assert stream(a, 4, 40, sw=1.0, jv=2.0) == stream(b, 4, 40, sw=1.0, jv=2.0)


def test_a_query_without_a_target_is_not_retained_either_and_long_ones_are_counted(tokenizer):
    config = make_config(student_limit=60, teacher_limit=400)
    config.data.retain_fraction = 0.5
    frame = len(prompts.student_ids(make_query("q", en=1, sw=1), "sw", tokenizer, config.prompts)) - 1
    long = 61 - frame
    records = [
        make_query("fits", en=1, sw=1),
        make_query("no target", en=1, sw=long),
        make_query("only", en=long, sw=1),
    ]
    encoded = batches.encode_all(records, ("sw",), tokenizer, config)
    assert [(x.query_id, x.language) for x in encoded.examples()] == [("fits", "sw"), ("fits", "en"), ("only", "sw")]
    assert [query.retained is None for query in encoded.queries] == [False, True]
    assert encoded.dropped == {("sw", "student_limit"): 1, ("en", "student_limit"): 1}
    drawn = batches.batches(encoded, {"sw": 1.0}, 4, 0, PAD, retain_fraction=0.9)
    rows = itertools.chain.from_iterable(batch.examples for batch in drawn)
    languages = {(x.query_id, x.language) for x in itertools.islice(rows, 80)}
    assert languages == {("fits", "sw"), ("fits", "en"), ("only", "sw")}
    with pytest.raises(ValueError, match=r"all prompts in 'en' are longer than config\.prompts\.student_limit=60"):
        batches.encode_all(records[2:], ("sw",), tokenizer, config)


def test_all_prompts_too_long_is_an_error(tokenizer):
    records = [make_query(f"q{n}", en=1, sw=n, jv=1) for n in (30, 50, 40)]
    limits = {"student_limit": 69, "teacher_limit": 4096, "teacher_template": "{query}"}
    assert len(batches.encode_all(records, ("sw", "jv"), tokenizer, make_config(**limits)).queries) == 3
    with pytest.raises(
        ValueError,
        match=r"queries\.jsonl: all prompts in 'sw' are longer than config\.prompts\.student_limit=30 "
        r"\(longest: 69 tokens\); raise the limit",
    ):
        batches.encode_all(records, ("sw", "jv"), tokenizer, make_config(**limits | {"student_limit": 30}))
    with pytest.raises(ValueError, match=r"teacher_limit=5 \(longest: 20 tokens\)"):
        batches.encode_all(records, ("jv",), tokenizer, make_config(**limits | {"teacher_limit": 5}))


@pytest.mark.parametrize("retain", [0.0, 0.5])
def test_a_record_serves_the_languages_that_it_has(tokenizer, retain):
    config = make_config()
    config.data.retain_fraction = retain
    records = [
        make_query("all", en=1, sw=2, jv=3),
        make_query("no jv", en=1, sw=2),
        make_query("no source", sw=2, jv=3),
        make_query("no target", en=1, it=2),
        make_query("no sw", en=1, jv=3),
    ]
    encoded = batches.encode_all(records, ("sw", "jv"), tokenizer, config)
    targets = {query.id: [example.language for example in query.targets] for query in encoded.queries}
    assert targets == {"all": ["sw", "jv"], "no jv": ["sw"], "no sw": ["jv"]}
    assert all((query.retained is not None) == (retain > 0) for query in encoded.queries)
    assert encoded.dropped == {}
    epochs = np.array(stream(encoded, 4, 3000, sw=3.0, jv=1.0)).reshape(1000, 3, 2)
    assert (np.sort(epochs[..., 0], axis=1) == sorted(targets)).all()  # each epoch holds each query once
    counts = collections.Counter(map(tuple, epochs.reshape(-1, 2)))
    assert counts["no jv", "sw"] == counts["no sw", "jv"] == 1000
    assert scipy.stats.binomtest(counts["all", "sw"], 1000, 0.75).pvalue > 1e-3


@pytest.mark.parametrize("missing", ["en", "jv"])
def test_a_language_that_no_record_has_is_an_error(tokenizer, missing):
    lengths = {"en": 1, "sw": 1, "jv": 1}
    records = [make_query(name, **{k: n for k, n in lengths.items() if k != missing}) for name in "ab"]
    with pytest.raises(ValueError, match=rf"queries\.jsonl: no record has a text in {missing}; there are texts in "):
        batches.encode_all(records, ("sw", "jv"), tokenizer, make_config())


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"sw": -1.0}, r"languages\.sw=-1\.0 must be a finite number of at least 0"),
        ({"sw": float("nan")}, r"languages\.sw=nan must be"),
        ({"sw": float("inf")}, r"languages\.sw=inf must be"),
        ({"sw": 1.0, "yo": 1.0}, r"languages\.yo: only sw, jv, bn were encoded"),
        ({"sw": 0.0}, r"no language with a weight above 0"),
        ({}, r"no language with a weight above 0"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=r"config\.data\.languages.*" + message.removeprefix("languages")):
        batches.batches(make_encoded(3), weights, 2, 0, PAD)


def test_multijail_from_file_to_batch(tokenizer):
    path = SHARED / "data/multijail/MultiJail_dev.csv"
    if not path.is_file():
        pytest.skip("MultiJail_dev.csv is not beside this repository")
    records = files.read(path, harmful="true")
    config = make_config(student_limit=400, teacher_limit=400)
    encoded = batches.encode_all(records, ("sw", "bn"), tokenizer, config)
    texts = {record.id: record.texts for record in records}
    kept = len(list(encoded.examples()))
    assert 300 < kept < 420 and kept + sum(encoded.dropped.values()) == 420  # one token a byte: Bengali is long
    stream = iter(batches.batches(encoded, {"sw": 1.0, "bn": 1.0}, 16, 0, PAD, window=8))
    batch = next(stream)
    for row, length, example in zip(batch.student_prompt_BxP, batch.student_length_B, batch.examples):
        text = texts[example.query_id][example.language]
        assert example.harmful is True
        assert tokenizer.decode(row[-length:]) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

"""Rows that take the next prompt: the responses of a plain batch, whatever the pool, the rows and the mesh."""

import itertools

import jax
import numpy as np
import pytest

from msd_jax.generation import refill, rollout
from msd_jax.models import config as model_config
from msd_jax.models import decoder
from msd_jax.parallel import sharding
from tests.conftest import LLAMA

STOP, LIMIT, R = (3, 7), 40, 20
WINDOWS = LLAMA | {"model_type": "mistral", "sliding_window": 8}


def pool_of(rng, count):
    """Prompts of two and more buckets, and their hashes."""
    lengths = np.sort(rng.integers(1, LIMIT + 1, count))
    ids = [rng.integers(0, 40, length).astype(np.int32) for length in lengths]
    return ids, rng.integers(0, 2**32, count, dtype=np.uint32)


def plain(graphdef, params, mesh, sampling, stop, ids, hashes):
    """The response to each prompt, all of them in one batch."""
    generator = rollout.Generator(graphdef, mesh, sampling, stop, pad_id=0)
    written = generator.write(params, ids, len(ids), LIMIT, hashes, jax.random.key(5))
    return [written.row(i) for i in range(len(ids))]


@pytest.mark.parametrize("family", [LLAMA, WINDOWS], ids=["llama", "windows"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [5, 64])
def test_responses_are_those_of_a_batch(family, temperature, rows, rng):
    graphdef, params = decoder.init(model_config.from_dict(family), jax.random.key(1))
    mesh, sampling = sharding.make_mesh(devices=jax.devices()[:1]), rollout.Sampling(R, temperature)
    ids, hashes = pool_of(rng, 48)
    pool = refill.PoolGenerator(graphdef, mesh, sampling, STOP, 0, rows=rows, limit=LIMIT)
    ended = list(pool(params, ids, hashes, jax.random.key(5)))
    given = {response.index: (response.tokens, response.stopped) for response in ended}
    assert sorted(given) == list(range(48)) and len(ended) == 48
    expected = plain(graphdef, params, mesh, sampling, STOP, ids, hashes)
    assert [given[i] for i in range(48)] == expected
    if temperature:  # or the test would not see rows that end at different times
        assert len({len(tokens) for tokens, _ in expected}) > 5 and not all(stopped for _, stopped in expected)


def test_rows_are_taken_again_before_others_have_ended(rng):
    """More prompts than rows: those that end early do not wait for the longest of their batch."""
    graphdef, params = decoder.init(model_config.from_dict(LLAMA), jax.random.key(1))
    mesh, sampling = sharding.make_mesh(devices=jax.devices()[:1]), rollout.Sampling(R)
    ids, hashes = pool_of(rng, 64)
    pool = refill.PoolGenerator(graphdef, mesh, sampling, STOP, 0, rows=4, limit=LIMIT)
    order = [response.index for response in pool(params, ids, hashes)]
    lengths = [len(tokens) for tokens, _ in plain(graphdef, params, mesh, sampling, STOP, ids, hashes)]
    full = [i for i in range(60) if lengths[i] == R]
    assert any(order.index(i) > order.index(i + 4) for i in full)


def test_what_all_prompts_begin_with_is_read_once(rng):
    """The same responses as where each prompt is read whole, and as many tokens less that are read."""
    graphdef, params = decoder.init(model_config.from_dict(WINDOWS), jax.random.key(1))
    mesh, sampling = sharding.make_mesh(devices=jax.devices()[:1]), rollout.Sampling(R)
    begin = rng.integers(0, 40, 20).astype(np.int32)
    ids = [np.append(begin, rng.integers(0, 40, 1 + i).astype(np.int32)) for i in range(16)]
    hashes = rng.integers(0, 2**32, 16, dtype=np.uint32)
    pool, read = refill.PoolGenerator(graphdef, mesh, sampling, STOP, 0, rows=8, limit=LIMIT), []
    padded = pool._padded
    pool._padded = lambda rows, size: read.append(list(map(len, rows))) or padded(rows, size)
    given = {r.index: (r.tokens, r.stopped) for r in pool(params, ids, hashes, jax.random.key(5))}
    expected = plain(graphdef, params, mesh, sampling, STOP, ids, hashes)
    assert [given[i] for i in range(16)] == expected
    assert read[0] == [20] and sorted(itertools.chain(*read[1:])) == list(range(1, 17))


def test_rows_and_heads_split_over_devices(rng):
    options = model_config.from_dict(LLAMA | {"vocab_size": 64}), jax.random.key(1)
    graphdef, params = decoder.init(*options)
    ids, hashes = [rng.integers(0, 40, n).astype(np.int32) for n in range(2, 18)], np.arange(16)
    sampling = rollout.Sampling(R)
    expected = plain(graphdef, params, sharding.make_mesh(devices=jax.devices()[:1]), sampling, STOP, ids, hashes)
    mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    graphdef, abstract, axes = decoder.abstract(options[0], mesh=mesh)
    params = jax.device_put(params, sharding.param_shardings(mesh, abstract, axes, sharding.ROLLOUT))
    pool = refill.PoolGenerator(graphdef, mesh, sampling, STOP, 0, rows=8, limit=LIMIT)
    given = {r.index: (r.tokens, r.stopped) for r in pool(params, ids, hashes, jax.random.key(5))}
    assert [given[i] for i in range(16)] == expected
    assert pool.compilations == 3


def test_three_programs_for_each_size_of_the_cache(rng):
    graphdef, params = decoder.init(model_config.from_dict(LLAMA), jax.random.key(1))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    pool = refill.PoolGenerator(graphdef, mesh, rollout.Sampling(4), STOP, 0, rows=4, limit=LIMIT)
    assert pool.sizes == [20, LIMIT]
    short, long = ([np.ones(n, np.int32) for n in range(first, first + 9)] for first in (3, LIMIT - 8))
    assert len(list(pool(params, short))) == 9 and pool.compilations == 3
    assert len(list(pool(params, short + long))) == 18 and pool.compilations == 6
    assert len(list(pool(params, long + short))) == 18 and pool.compilations == 6


def test_a_cache_takes_half_the_room_only_where_that_makes_it_smaller(monkeypatch):
    graphdef, _ = decoder.init(model_config.from_dict(LLAMA), jax.random.key(1))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def sizes(limit, R):
        return refill.PoolGenerator(graphdef, mesh, rollout.Sampling(R), STOP, 0, rows=4, limit=limit).sizes

    assert sizes(400, 128) == [100, 200, 400] and sizes(400, 512) == [400] and sizes(9, 1) == [9]
    monkeypatch.setattr(refill, "_SIZES_ON_CPU", refill._SIZES)  # as on accelerators
    assert sizes(400, 16) == [200, 400]


def test_nothing_is_asked():
    graphdef, params = decoder.init(model_config.from_dict(LLAMA), jax.random.key(1))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    pool = refill.PoolGenerator(graphdef, mesh, rollout.Sampling(4), STOP, 0, rows=4, limit=LIMIT)
    assert list(pool(params, [])) == []

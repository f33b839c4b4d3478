"""Generation: what is drawn, when it stops, and that the scoring pass sees the same distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from msd_jax.generation import rollout
from msd_jax.models import config as model_config
from msd_jax.models import decoder, forward
from msd_jax.parallel import sharding
from msd_jax.planning.collectives import find_collectives
from msd_jax.planning.hlo import HloModule
from tests.conftest import LLAMA

STOP = (3, 7)
V = 40


@pytest.fixture(scope="module")
def model():
    return decoder.init(model_config.from_dict(LLAMA), jax.random.key(1))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def _generator(graphdef, mesh, sampling, stop):
    return rollout.Generator(graphdef, mesh, sampling, stop, pad_id=STOP[0])  # pad is a stop token: on purpose


def generate(model, mesh, prompt, length, *, hashes=None, active=None, seed=0, stop=STOP, **sampling):
    graphdef, params = model
    rows = len(prompt)
    generator = _generator(graphdef, mesh, rollout.Sampling(**{"max_new_tokens": 12} | sampling), stop)
    hashes = np.arange(rows, dtype=np.uint32) if hashes is None else hashes
    active = np.ones(rows, bool) if active is None else active
    prompt, length = prompt.astype(np.int32), length.astype(np.int32)
    return jax.device_get(generator(params, prompt, length, hashes, active, jax.random.key(seed)))


def generate_and_record(graphdef, params, mesh, prompt, length, monkeypatch, stop=STOP, **sampling):
    """A rollout, the logits that its tokens were drawn from, [B, R, V], and the generator."""
    recorded, sample = [], rollout.sample

    def sample_and_record(logits, keys, sampling):
        jax.debug.callback(lambda logits: recorded.append(np.asarray(logits)), logits, ordered=True)
        return sample(logits, keys, sampling)

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "sample", sample_and_record)
        generator = rollout.Generator(graphdef, mesh, rollout.Sampling(12, **sampling), stop, pad_id=STOP[0])
        hashes, active = np.arange(len(prompt), dtype=np.uint32), np.ones(len(prompt), bool)
        arrays = prompt.astype(np.int32), length.astype(np.int32), hashes, active
        out = jax.device_get(generator(params, *arrays, jax.random.key(0)))
        jax.effects_barrier()
    return out, np.stack(recorded, axis=1), generator


def prompts(rng, rows=6, P=9):
    return rng.integers(0, V, (rows, P)), rng.integers(1, P + 1, rows)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_tokens_are_drawn_from_what_the_scoring_pass_sees(model, mesh, rng, temperature, monkeypatch):
    """Cached decoding and the training forward agree on every response token, the first and the stop included."""
    prompt, length = prompts(rng)
    out, drawn_from, _ = generate_and_record(*model, mesh, prompt, length, monkeypatch, temperature=temperature)
    np.testing.assert_array_equal(
        out.response_BxR, generate(model, mesh, prompt, length, temperature=temperature).response_BxR
    )
    logits = forward.response_logits(*model, jnp.array(prompt), jnp.array(length), out.response_BxR, out.length_B)
    steps = drawn_from.shape[1]  # fewer than 12 where all rows have stopped
    assert steps == out.length_B.max()
    mask = (np.arange(12) < out.length_B[:, None])[:, :steps]
    scored, decoded = (jax.nn.log_softmax(x / (temperature or 1.0)) for x in (logits[:, :steps], drawn_from))
    np.testing.assert_allclose(np.asarray(decoded)[mask], np.asarray(scored)[mask], atol=2e-5)
    # And the tokens are those that the scoring pass's rows and the rows' keys give.
    key_B = rollout.row_keys(jax.random.key(0), jnp.arange(len(prompt), dtype=jnp.uint32))
    for t in range(steps):
        keys = jax.vmap(jax.random.fold_in, (0, None))(key_B, t)
        tokens = rollout.sample(logits[:, t], keys, rollout.Sampling(12, temperature))
        np.testing.assert_array_equal(out.response_BxR[mask[:, t], t], np.asarray(tokens)[mask[:, t]])
    if temperature == 0:
        np.testing.assert_array_equal(out.response_BxR[:, :steps][mask], np.argmax(logits[:, :steps], -1)[mask])


def test_stops_at_the_first_stop_token_and_counts_it(model, mesh, rng):
    prompt, length = prompts(rng, rows=64)
    out = generate(model, mesh, prompt, length)
    free = generate(model, mesh, prompt, length, stop=(-1,))
    assert out.stopped_B.any() and not out.stopped_B.all()
    for row in range(64):
        ends = np.flatnonzero(np.isin(free.response_BxR[row], STOP))
        expected = ends[0] + 1 if len(ends) else 12
        assert out.length_B[row] == expected
        assert out.stopped_B[row] == bool(len(ends))
        np.testing.assert_array_equal(out.response_BxR[row, :expected], free.response_BxR[row, :expected])
        assert (out.response_BxR[row, expected:] == STOP[0]).all()


def test_a_draw_depends_on_seed_and_query_alone(model, mesh, rng):
    """Not on the row's place, the other rows, nor the width of the padding."""
    prompt, length = prompts(rng)
    hashes = rng.integers(0, 2**32, 6, dtype=np.uint32)
    base = generate(model, mesh, prompt, length, hashes=hashes)
    order = rng.permutation(6)[:4]
    wide = np.concatenate([rng.integers(0, V, (6, 5)), prompt], axis=1)
    other = generate(model, mesh, wide[order], length[order], hashes=hashes[order])
    np.testing.assert_array_equal(other.response_BxR, base.response_BxR[order])
    assert (generate(model, mesh, prompt, length, hashes=hashes, seed=1).response_BxR != base.response_BxR).any()
    assert (generate(model, mesh, prompt, length, hashes=hashes + 1).response_BxR != base.response_BxR).any()


def test_inactive_rows_get_no_tokens_and_change_no_other(model, mesh, rng):
    prompt, length = prompts(rng)
    active = np.array([True, False, True, True, False, True])
    base, out = generate(model, mesh, prompt, length), generate(model, mesh, prompt, length, active=active)
    assert (out.length_B[~active] == 0).all() and not out.stopped_B[~active].any()
    np.testing.assert_array_equal(out.response_BxR[active], base.response_BxR[active])
    nothing = generate(model, mesh, prompt, length, active=np.zeros(6, bool))
    assert (nothing.length_B == 0).all() and (nothing.response_BxR == STOP[0]).all()


def test_ends_early_when_all_rows_have_stopped(model, mesh, rng):
    """Every token is a stop token: one is drawn, and the loop is not entered, however long it might run."""
    prompt, length = prompts(rng)
    out = generate(model, mesh, prompt, length, max_new_tokens=4000, stop=tuple(range(V)))
    assert (out.length_B == 1).all() and out.stopped_B.all()


def test_compiles_once_per_prompt_shape(model, mesh, rng):
    generator = rollout.Generator(model[0], mesh, rollout.Sampling(3), STOP, pad_id=0)
    for P in (5, 5, 8, 5):
        arrays = np.ones((2, P), np.int32), np.full(2, P, np.int32), np.zeros(2, np.uint32), np.ones(2, bool)
        generator(model[1], *arrays, jax.random.key(P))
    assert generator.compilations == 2


def test_unstacked_and_scanned_layers_generate_the_same(model, mesh, rng, monkeypatch):
    """The loop on CPUs and GPUs, which slices no layers, and that on TPUs, both run on a CPU."""
    prompt, length = prompts(rng)
    runs, scans = [], []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(sharding, "platform", lambda mesh, platform=platform: platform)
        *run, generator = generate_and_record(*model, mesh, prompt, length, monkeypatch, stop=(-1,))
        runs.append(run)
        scans.append(str(generator.trace(model[1], 6, 9).jaxpr).count("= scan["))
    (unstacked, unstacked_logits), (scanned, scanned_logits) = runs
    np.testing.assert_array_equal(unstacked.response_BxR, scanned.response_BxR)
    log_probs = (jax.nn.log_softmax(logits) for logits in (unstacked_logits, scanned_logits))
    np.testing.assert_allclose(*log_probs, atol=1e-5)
    assert scans == [1, 2]  # prefill; prefill and decoding


def test_argmax_is_that_of_jax(rng):
    """Of equals the first, beside infinities, and where all are minus infinity."""
    x = rng.integers(0, 5, (50, 30)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = -np.inf
    x[0], x[1, 3] = -np.inf, np.inf
    np.testing.assert_array_equal(rollout.argmax(jnp.array(x)), np.argmax(x, axis=-1))


def test_draws_are_those_of_jax(rng):
    logits, keys = jnp.asarray(rng.normal(size=(64, 30)), jnp.float32), jax.random.split(jax.random.key(5), 64)
    token = rollout.sample(logits, keys, rollout.Sampling(1))
    np.testing.assert_array_equal(token, jax.vmap(jax.random.categorical)(keys, jax.nn.log_softmax(logits)))


def draws(logits, n=20_000, **sampling):
    keys = jax.random.split(jax.random.key(0), n)
    tokens = rollout.sample(jnp.tile(logits, (n, 1)), keys, rollout.Sampling(1, **sampling))
    return np.bincount(np.asarray(tokens), minlength=len(logits))


@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.5}]
)
def test_samples_follow_the_distribution(rng, sampling):
    """Chi-square against probabilities computed in numpy; what top_k and top_p leave out is never drawn."""
    logits = rng.normal(size=8) * 1.5
    p = np.exp(logits / sampling.get("temperature", 1.0))
    order = np.argsort(-p)
    keep = order[: sampling.get("top_k", 8)]
    kept = np.where(np.isin(np.arange(8), keep), p, 0)
    kept /= kept.sum()
    before = np.cumsum(kept[order]) - kept[order]
    kept[order[before >= sampling.get("top_p", 1.0)]] = 0
    kept /= kept.sum()
    counts = draws(jnp.array(logits, jnp.float32), **sampling)
    assert (counts[kept == 0] == 0).all()
    used = kept > 0
    if used.sum() > 1:
        assert stats.chisquare(counts[used], kept[used] * counts.sum()).pvalue > 1e-4


def test_reshard_casts_as_well():
    config = model_config.from_dict(LLAMA)
    _graphdef, params = decoder.init(config, jax.random.key(0))
    _, abstract, axes = decoder.abstract(config)
    mesh = sharding.make_mesh(1, 4, 2)
    trained = jax.device_put(params, sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN))
    target = sharding.param_shardings(mesh, abstract, axes, sharding.ROLLOUT)
    laid = rollout.reshard(trained, jnp.bfloat16, target)
    for leaf, source, wanted in zip(*map(jax.tree.leaves, (laid, params, target))):
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(source.astype(jnp.bfloat16)))
    assert rollout.reshard(laid, jnp.bfloat16, target) is laid


@pytest.mark.parametrize(("sizes", "generating"), [((4, 2, 1), (2, 4)), ((2, 2, 2), (2, 8)), ((8, 1, 1), (1, 4))])
def test_generation_may_share_weights_over_the_replicas_of_training(sizes, generating):
    _graphdef, params = decoder.init(model_config.from_dict(LLAMA), jax.random.key(0))
    _, abstract, axes = decoder.abstract(model_config.from_dict(LLAMA))
    mesh = sharding.make_mesh(*sizes)
    trained = jax.device_put(params, sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN))
    target = sharding.param_shardings(sharding.rollout_mesh(mesh, *generating), abstract, axes, sharding.ROLLOUT)
    laid = rollout.reshard(trained, jnp.float32, target)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (laid, params)))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), laid, target)))


@pytest.mark.parametrize(
    ("sizes", "generating"), [((1, 4, 2), (4, 4)), ((1, 8, 1), (2, 4)), ((2, 2, 2), (2, 4)), ((1, 8, 1), (1, 8))]
)
def test_weights_go_to_the_mesh_of_generation_without_the_whole_model_on_a_device(sizes, generating):
    config = model_config.from_dict(LLAMA)
    _graphdef, params = decoder.init(config, jax.random.key(0))
    _, abstract, axes = decoder.abstract(config)
    mesh = sharding.make_mesh(*sizes)
    trained = jax.device_put(params, sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN))
    laid_out = sharding.rollout_mesh(mesh, *generating)
    target = sharding.param_shardings(laid_out, abstract, axes, sharding.ROLLOUT)
    laid = rollout.reshard(trained, jnp.float32, target)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (laid, params)))
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), laid, target)))

    def shape(leaf, placed):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    sources, results = (jax.tree.map(shape, abstract, s) for s in (jax.tree.map(lambda x: x.sharding, trained), target))
    compiled = rollout.trace_reshard(sources, results).lower().compile()
    largest = max(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(results))
    gathered = [x for x in find_collectives(HloModule(compiled.as_text())) if x.kind == "all-gather"]
    assert gathered
    for gather in gathered:  # no device gathers more than its part of the result
        assert gather.operand_bytes * gather.group_size <= 4 * largest, gather

"""Every kernel against plain attention in float64, values and gradients; splash through Pallas' interpreter."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msd_jax.models import attention as lib
from msd_jax.models.attention import Scores
from msd_jax.parallel import sharding

B, T, N, K, H = 4, 256, 4, 2, 64
WIDE = np.iinfo(np.int32).max


def arrays(rng):
    """Queries, keys, values, and left- and right-padding of every row."""
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H)
    query, key, value = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    first, last = rng.integers(0, 100, B), rng.integers(150, T + 1, B)
    column = np.arange(T)
    return query, key, value, jnp.asarray((column >= first[:, None]) & (column < last[:, None]))


def packed(valid):
    """The segments of rows that hold two sequences, one after the other."""
    real = jnp.cumsum(valid, axis=1)
    return jnp.where(valid, 1 + (real > real[:, -1:] // 3), 0)


def reference(query, key, value, segment, window, scores):
    """Plain attention in NumPy's float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, N // K, axis=1) for x in (key, value))
    logits = np.einsum("btnh,bnsh->bnts", query, key) * scores.scale
    if scores.softcap:
        logits = scores.softcap * np.tanh(logits / scores.softcap)
    distance = np.arange(T)[:, None] - np.arange(T)
    segment = np.asarray(segment)
    same = segment[:, None, :, None] == segment[:, None, None]
    seen = same & (distance >= 0) & (distance < window)
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bnsh->btnh", weights / weights.sum(-1, keepdims=True), value)


def kernel(kind, scores, windows, mesh=None):
    if kind == "splash":
        return functools.partial(lib._splash, windows=windows, scores=scores, mesh=mesh, interpret=True)
    return functools.partial(whole_attention, windows=windows, scores=scores, kernel=kind)


def whole_attention(query, key, value, segment, window, **options):
    """`lib.self_attention` where a token's column is its position, but for where its sequence begins."""
    position = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])
    return lib.self_attention(query, key, value, segment, position, window, **options)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [WIDE, 100])
@pytest.mark.parametrize("kind", ["xla", "blocks", "splash"])
def test_equals_float64(kind, window, softcap, rng):
    query, key, value, valid = arrays(rng)
    segment = packed(valid)
    scores = Scores(0.3, softcap)
    run = jax.jit(kernel(kind, scores, (100, WIDE)))
    actual = run(query, key, value, segment, window=window)
    expected = reference(query, key, value, segment, window, scores)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(np.asarray(actual)[valid], expected[valid], atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_of_the_other_kernels_are_those_of_xla(softcap, rng):
    query, key, value, valid = arrays(rng)
    tangent = jnp.where(valid[:, :, None, None], jnp.asarray(rng.normal(size=query.shape), jnp.float32), 0.0)

    def gradients(kind):
        run = kernel(kind, Scores(0.3, softcap), (100, WIDE))

        def total(*qkv):
            return jnp.sum(run(*qkv, packed(valid), window=100) * tangent)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)

    for kind in ("splash", "blocks"):
        for ours, theirs in zip(gradients(kind), gradients("xla")):
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)], ids=["heads divide", "fewer key/value heads than devices"])
def test_splash_works_on_the_heads_and_rows_of_each_device(shape, rng):
    query, key, value, valid = arrays(rng)
    mesh = sharding.make_mesh(*shape)
    one, split = (jax.jit(kernel("splash", Scores(0.1), (WIDE,), m)) for m in (None, mesh))
    actual, expected = (run(query, key, value, valid, window=WIDE) for run in (split, one))
    assert actual.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")), 4)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_splash_lowers_for_tpus(head_dim):
    query, key = (jax.ShapeDtypeStruct((2, *shape, head_dim), jnp.bfloat16) for shape in ((384, 4), (2, 384)))
    valid, window = jax.ShapeDtypeStruct((2, 384), bool), jax.ShapeDtypeStruct((), jnp.int32)

    def total(*operands):
        return jnp.sum(lib._splash(*operands, (100, WIDE), Scores(0.1), None).astype(jnp.float32))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    exported = jax.export.export(gradient, platforms=["tpu"])(query, key, key, valid, window)
    assert exported.mlir_module().count("tpu_custom_call") >= 6  # forward, dq and dkv of two windows


@pytest.mark.parametrize("window", [WIDE, 100])
def test_cached_attention_equals_self_attention(window, rng):
    """Slots that are not written yet, or that hold another row's keys, are never seen; slot 0 follows the last one."""
    query, key, value, valid = arrays(rng)
    whole = whole_attention(query, key, value, valid, window, windows=(window,), scores=Scores(0.3))
    position = jnp.cumsum(valid, axis=1) - 1
    for first, last, turned in (
        (0, 200, 0),
        (200, 201, 0),
        (201, T, 0),
        (0, 200, 70),
        (200, 201, T - 200),
        (201, T, 9),
    ):
        written = (np.arange(T) < last)[:, None] & np.asarray(valid)[:, None, :, None]
        cache = (jnp.roll(jnp.where(written, x, 1e3), turned, axis=2) for x in (key, value))
        part, slot = slice(first, last), jnp.int32(first + turned) % T
        actual = lib.cached_attention(query[:, part], *cache, position[:, part], slot, window, Scores(0.3))
        mask = np.asarray(valid)[:, first:last]
        np.testing.assert_allclose(np.asarray(actual)[mask], np.asarray(whole[:, first:last])[mask], atol=2e-5)


def choice(platform, T, H=64, dtype=jnp.bfloat16, softcap=None):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
    return lib.choose(jax.ShapeDtypeStruct((2, T, 4, H), dtype), Scores(0.1, softcap), mesh)


def test_the_kernel_follows_platform_and_shapes():
    assert choice("tpu", 256) == "splash"
    assert choice("tpu", 256, softcap=3.0) == "splash"
    assert choice("tpu", 200) == "xla"  # not a multiple of 128
    assert choice("gpu", 96) == "cudnn"
    assert choice("gpu", 96, dtype=jnp.float32) == "xla"
    assert choice("gpu", 96, softcap=3.0) == "xla"
    assert choice("gpu", 96, H=256) == "xla"
    assert choice("cpu", 256) == "blocks" and choice("cpu", 128) == "xla"


def test_cudnn_refuses_a_softcap(rng):
    query, key, value, valid = arrays(rng)
    options = {"windows": (WIDE,), "scores": Scores(0.1, 3.0), "kernel": "cudnn"}
    with pytest.raises(ValueError, match=r"no soft-cap, got 3.0"):
        whole_attention(query, key, value, valid, WIDE, **options)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_cache_is_attended_to_without_a_kernel(platform, rng, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda mesh: platform)
    query, key, value, valid = (x.astype(jnp.bfloat16) if x.dtype != bool else x for x in arrays(rng))
    run = functools.partial(lib.cached_attention, window=WIDE, scores=Scores(0.1))
    text = str(jax.make_jaxpr(run)(query, key, value, valid, jnp.int32(0)))
    assert "pallas_call" not in text and "cudnn" not in text

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


def reference(query, key, value, valid, window, scores):
    """Plain attention in NumPy's float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, N // K, axis=1) for x in (key, value))
    logits = np.einsum("btnh,bnsh->bnts", query, key) * scores.scale
    if scores.softcap:
        logits = scores.softcap * np.tanh(logits / scores.softcap)
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = np.asarray(valid)[:, None, None, :] & (distance >= 0) & (distance < window)
    logits = np.where(seen, logits, -np.inf)
    with np.errstate(invalid="ignore"):  # rows of padding
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("bnts,bnsh->btnh", weights / weights.sum(-1, keepdims=True), value)


def kernel(kind, scores, windows, mesh=None):
    if kind == "splash":
        return functools.partial(lib._splash, windows=windows, scores=scores, mesh=mesh, interpret=True)
    return functools.partial(lib.attention, slot=0, windows=windows, scores=scores, kind=kind)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [WIDE, 100])
@pytest.mark.parametrize("kind", ["xla", "splash"])
def test_equals_float64(kind, window, softcap, rng):
    query, key, value, valid = arrays(rng)
    scores = Scores(0.3, softcap)
    run = jax.jit(kernel(kind, scores, (100, WIDE)))
    actual = run(query, key, value, valid, window=window)
    expected = reference(query, key, value, valid, window, scores)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(np.asarray(actual)[valid], expected[valid], atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_of_splash_are_those_of_xla(softcap, rng):
    query, key, value, valid = arrays(rng)
    tangent = jnp.where(valid[:, :, None, None], jnp.asarray(rng.normal(size=query.shape), jnp.float32), 0.0)

    def gradients(kind):
        run = kernel(kind, Scores(0.3, softcap), (100, WIDE))
        total = lambda *qkv: jnp.sum(run(*qkv, valid, window=100) * tangent)  # noqa: E731
        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value)

    for ours, theirs in zip(gradients("splash"), gradients("xla")):
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


def choice(platform, T, S, H=64, dtype=jnp.bfloat16, slot=0, softcap=None):
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)]))
    query, key = (jax.ShapeDtypeStruct((2, *shape, H), dtype) for shape in ((T, 4), (4, S)))
    return lib.choose(query, key, slot, Scores(0.1, softcap), mesh)


def test_the_kernel_follows_platform_and_shapes():
    assert choice("tpu", 256, 256) == "splash"
    assert choice("tpu", 256, 256, softcap=3.0) == "splash"
    assert choice("tpu", 200, 200) == "xla"  # not a multiple of 128
    assert choice("tpu", 1, 256, slot=jnp.int32(3)) == "xla"  # decoding
    assert choice("gpu", 96, 96) == "cudnn"
    assert choice("gpu", 96, 96, dtype=jnp.float32) == "xla"
    assert choice("gpu", 96, 96, softcap=3.0) == "xla"
    assert choice("gpu", 96, 96, H=256) == "xla"
    assert choice("gpu", 1, 96, slot=jnp.int32(3)) == "xla"
    assert choice("cpu", 256, 256) == "xla"

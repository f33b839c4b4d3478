"""Weight-only int8: how far quantising moves a weight, what a product computes, and which parameters are quantised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msd_jax.models import config as model_config
from msd_jax.models import decoder, forward, int8, pretrained
from msd_jax.models.lora import Lora
from msd_jax.parallel import sharding
from tests.conftest import LLAMA
from tests.models.published import MODELS
from tests.models.published_test import shrunk

# Shape of a stacked matrix and the axes that a product sums over.
MATRICES = [((3, 32, 4, 8), (1,)), ((3, 4, 8, 32), (1, 2)), ((32, 40), (0,))]


def wide(quantised):
    """What an Int8 stands for, in float64."""
    return np.asarray(quantised.values, np.float64) * np.asarray(quantised.scale, np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "summed"), MATRICES)
def test_no_weight_moves_by_more_than_half_the_scale_of_its_channel(shape, summed, dtype, rng):
    spread = np.exp(rng.normal(size=[1 if axis in summed else size for axis, size in enumerate(shape)]))
    weight = jnp.asarray(rng.normal(size=shape) * spread, dtype)
    quantised = int8.quantise(weight, summed)
    assert quantised.values.dtype == jnp.int8 and quantised.scale.dtype == jnp.float32
    assert quantised.values.shape == shape and quantised.scale.shape == spread.shape
    largest = np.abs(np.asarray(weight, np.float64)).max(axis=summed, keepdims=True)
    np.testing.assert_allclose(quantised.scale, largest / 127, rtol=1e-6)
    off = np.abs(wide(quantised) - np.asarray(weight, np.float64))
    assert (off <= np.asarray(quantised.scale) * (0.5 + 1e-4)).all()
    assert off.max() > 0.4 * quantised.scale.min()  # so near the bound that a wrong scale would break it
    assert (np.abs(quantised.values).max(axis=summed) == 127).all()


def test_a_channel_of_zeros_stays_zero(rng):
    weight = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32).at[:, 2].set(0.0)
    quantised = int8.quantise(weight, (0,))
    assert (wide(quantised)[:, 2] == 0).all() and np.isfinite(quantised.scale).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "summed"), [((64, 4, 8), (0,)), ((4, 16, 32), (0, 1)), ((64, 40), (0,))])
def test_a_product_is_that_of_the_weights_that_it_stands_for(shape, summed, dtype, rng):
    inputs = len(summed)
    x = jnp.asarray(rng.normal(size=(2, 3, *shape[:inputs])), dtype)
    quantised = int8.quantise(jnp.asarray(rng.normal(size=shape), jnp.float32), summed)
    expected = np.tensordot(np.asarray(x, np.float64), wide(quantised), inputs)
    largest = np.tensordot(np.abs(np.asarray(x, np.float64)), np.abs(wide(quantised)), inputs).max()
    exact = int8.product(x, quantised, inputs, result=jnp.float32)
    assert exact.dtype == jnp.float32
    np.testing.assert_allclose(exact, expected, atol=1e-6 * largest)  # int8 is exact in bfloat16 too
    rounded = int8.product(x, quantised, inputs)
    assert rounded.dtype == dtype
    np.testing.assert_allclose(  # once as a product, once when it is scaled
        np.asarray(rounded, np.float64), expected, rtol=2 * jnp.finfo(dtype).eps, atol=1e-6 * largest
    )


def test_a_matrix_that_is_not_quantised_is_multiplied_as_it_was(rng):
    x, weight = (jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((2, 3, 8), (8, 5)))
    np.testing.assert_array_equal(int8.product(x, weight), jnp.tensordot(x, weight, 1))


@pytest.mark.parametrize(
    "name", ["microsoft/Phi-4-mini-instruct", "google/gemma-3-4b-it", "allenai/Olmo-3-7B-Instruct"]
)
def test_matrices_are_quantised_and_nothing_else(name):
    config = model_config.from_dict(shrunk(MODELS[name][0]))
    _, params = decoder.init(config, jax.random.key(0), lora=Lora(2, 4.0, ("query", "down")))
    named = dict(jax.tree.leaves_with_path(int8.quantised(params, jnp.bfloat16), is_leaf=_is_int8))
    quantised = {decoder.name_of(path) for path, leaf in named.items() if _is_int8(leaf)}
    matrices = {f"layers.{matrix}" for matrix in ("query", "key", "value", "output", "gate", "up", "down")}
    assert quantised == matrices | (set() if config.tied_embeddings else {"head"})
    assert all(leaf.dtype == jnp.bfloat16 for leaf in named.values() if not _is_int8(leaf))


def test_scales_are_split_as_their_channels():
    config = dataclasses.replace(model_config.from_dict(LLAMA | {"tie_word_embeddings": False}))
    model = pretrained.architecture(config, dtype="float32", param_dtype="float32", remat="full")
    mesh = sharding.rollout_mesh(sharding.make_mesh(2, 2, 2), 2, 4)
    layout = int8.layout(model.shardings(mesh, sharding.ROLLOUT))
    split = {name: tuple(layout["layers"][name].scale.spec) for name in ("query", "output", "down")}
    heads = layout["layers"]["query"].values.spec[2]
    assert heads is not None and split["query"] == (None, None, heads, None)
    assert split["output"] == (None,) * 4 and split["down"] == (None,) * 3  # split where they sum, whole as results
    assert layout["head"].scale.spec == layout["head"].values.spec
    assert not _is_int8(layout["embedding"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_model_gives_the_logits_of_the_weights_that_it_stands_for(tied, dtype, rng):
    """With adapters beside, which are not quantised."""
    config = model_config.from_dict(LLAMA | {"tie_word_embeddings": tied})
    graphdef, params = decoder.init(config, jax.random.key(1), dtype=dtype, lora=Lora(2, 4.0, ("query", "down")))
    params["layers"] |= {
        name: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        for name, leaf in params["layers"].items()
        if name.endswith("_lora_b")
    }
    quantised = int8.quantised(params, jnp.float32)
    same = jax.tree.map(
        lambda leaf: jnp.asarray(wide(leaf), jnp.float32) if _is_int8(leaf) else leaf, quantised, is_leaf=_is_int8
    )
    P, R = 7, 4
    prompt, response = (jnp.asarray(rng.integers(0, 40, (3, size)), jnp.int32) for size in (P, R))
    sequence = prompt, jnp.array([7, 3, 1]), response, jnp.array([4, 4, 2])
    given, expected, float_ = (
        jax.nn.log_softmax(forward.response_logits(graphdef, some, *sequence)) for some in (quantised, same, params)
    )
    if dtype == jnp.float32:
        np.testing.assert_allclose(given, expected, atol=2e-4)
        assert np.abs(given - float_).max() > 2e-3
    else:  # no further from float32 products than bfloat16 ones of the same weights, which are rounded twice as often
        wide_graphdef, _ = decoder.init(config, jax.random.key(1), lora=Lora(2, 4.0, ("query", "down")))
        exact = jax.nn.log_softmax(forward.response_logits(wide_graphdef, same, *sequence))
        assert np.abs(given - exact).mean() < 1.5 * np.abs(expected - exact).mean()


def _is_int8(leaf):
    return isinstance(leaf, int8.Int8)


def test_the_gradients_of_a_matrix_transpose_nothing_in_memory():
    """What XLA transposes for a sum over two axes, of rows and of tokens, is as large as all activations."""

    def loss(x, weight):
        return jnp.square(int8.product(jnp.tanh(x), weight)).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(jnp.ones((3, 16, 24)), jnp.ones((24, 40))).compile().as_text()
    assert " dot(" in compiled and " transpose(" not in compiled and " copy(" not in compiled

"""Products and their gradients, and what the backward pass keeps of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msd_jax.models import decoder, int8, products


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("leading", "summed", "out"), [((3, 4), (8,), (2, 5)), ((3, 4), (2, 4), (6,)), ((), (8,), (5,))]
)
def test_a_product_and_its_gradients(leading, summed, out, dtype, rng):
    x, weight, cotangent = (
        jnp.asarray(rng.normal(size=size), dtype) for size in (leading + summed, summed + out, leading + out)
    )
    y, pullback = jax.vjp(lambda x, weight: products.product(x, weight, len(summed)), x, weight)
    found = (y, *pullback(cotangent))
    x, weight, cotangent = (np.asarray(a, np.float64) for a in (x, weight, cotangent))
    last, first = (tuple(range(-count, 0)) for count in (len(out), len(leading)))
    expected = (
        np.tensordot(x, weight, len(summed)),
        np.tensordot(cotangent, weight, (last, tuple(range(len(summed), weight.ndim)))),
        np.tensordot(x, cotangent, (tuple(range(len(leading))),) * 2) if first else np.multiply.outer(x, cotangent),
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2 * jnp.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(("remat", "products_made"), [("none", 6), ("dots", 6), ("full", 8)])
def test_what_the_backward_pass_computes_again(remat, products_made):
    def layer(x, weight):
        return jnp.tanh(int8.product(jnp.tanh(int8.product(x, weight)), weight))

    kept = jax.checkpoint(layer, policy=decoder.REMAT_POLICIES[remat], prevent_cse=False)
    gradient = jax.grad(lambda x, weight: kept(x, weight).sum(), argnums=(0, 1))
    made = jax.make_jaxpr(gradient)(jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert str(made).count("dot_general[") == products_made

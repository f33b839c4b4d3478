"""The schedule's values, the clip, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from msd_jax.configs import default

from msd_jax.parallel import sharding
from msd_jax.training import optimizer

PARAMS = {"embedding": jnp.ones((3, 2)), "layers": {"query": jnp.ones((2, 2)), "query_norm": jnp.ones(2)}}


@pytest.fixture
def config():
    config = default.get_config().optimizer
    config.learning_rate, config.warmup_steps = 0.5, 4
    return config


def test_warm_up_then_cosine_or_constant(config):
    schedule = optimizer.make_schedule(config, 14)
    np.testing.assert_allclose([schedule(i) for i in range(5)], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(schedule(9), 0.5 * (0.1 + 0.9 * 0.5), rtol=1e-5)  # half of the way down to a tenth
    np.testing.assert_allclose(schedule(14), 0.05, rtol=1e-5)
    config.schedule = "constant"
    assert optimizer.make_schedule(config, 14)(12) == 0.5


def test_the_clip_is_by_global_norm(config):
    config.warmup_steps, config.adamw = 0, {"b1": 0.0, "b2": 0.0, "eps": 1.0}
    optimize, _ = optimizer.make_optimizer(config, 10)
    grads = jax.tree.map(lambda p: 100 * jnp.ones_like(p), PARAMS)
    updates, _ = optimize.update(grads, optimize.init(PARAMS), PARAMS)
    clipped = 1 / np.sqrt(12)  # twelve equal entries of norm 1
    np.testing.assert_allclose(updates["embedding"], -0.5 * clipped / (clipped + 1), rtol=1e-5)


def test_the_clip_takes_a_norm_that_is_known(config):
    optimize, _ = optimizer.make_optimizer(config, 10)
    rule, state = optax.with_extra_args_support(optimize), optimize.init(PARAMS)
    grads = jax.tree.map(lambda p: 3 * jnp.ones_like(p), PARAMS)
    jax.tree.map(
        np.testing.assert_array_equal,
        rule.update(grads, state, PARAMS, norm=optax.tree.norm(grads)),
        optimize.update(grads, state, PARAMS),
    )
    _, (_, (other, *_)) = rule.update(grads, state, PARAMS, norm=30.0)  # to a thirtieth
    np.testing.assert_allclose(other.mu["embedding"], 0.1 * 3 / 30, rtol=1e-6)


def test_decay_spares_norms(config):
    config.weight_decay, config.warmup_steps = 0.1, 0
    optimize, _ = optimizer.make_optimizer(config, 10)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimize.update(grads, optimize.init(PARAMS), PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    np.testing.assert_allclose(new["layers"]["query"], 1 - 0.5 * 0.1, rtol=1e-5)
    assert (new["layers"]["query_norm"] == 1).all()


def descend(config, steps=200):
    """Fits a matrix to a random one from noisy gradients; the share of the distance that is left."""
    target = jax.random.normal(jax.random.key(0), (256, 130))
    rule, _ = optimizer.make_optimizer(config, steps)

    def step(carry, key):
        params, state = carry
        grads = {"query": params["query"] - target + jax.random.normal(key, target.shape)}
        updates, state = rule.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"query": jnp.zeros_like(target)}
    keys = jax.random.split(jax.random.key(1), steps)
    (params, state), _ = jax.jit(jax.lax.scan, static_argnums=0)(step, (params, rule.init(params)), keys)
    return float(optax.tree.norm(params["query"] - target) / optax.tree.norm(target)), state


def test_every_rule_descends_and_keeps_what_it_should(config):
    config.learning_rate = 0.05

    def floats(state):
        return [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]

    left, state = descend(config)
    assert left < 0.1 and sum(x.size for x in floats(state)) == 2 * 256 * 130

    config.moments_dtype = "bfloat16"
    left_bfloat16, state = descend(config)
    assert {x.dtype.name for x in floats(state)} == {"bfloat16"}
    assert abs(left_bfloat16 - left) < 0.01

    config.name, config.moments_dtype = "adafactor", "float32"
    left, state = descend(config)
    assert left < 0.2 and sum(x.size for x in floats(state)) < 256 + 130 + 10


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_is_laid_out_as_the_weights(config, name):
    mesh = sharding.make_mesh(2, 2, 2)
    specs = {"query": PartitionSpec(None, "fsdp", "tensor"), "norm": PartitionSpec(None, "tensor")}
    shapes = {"query": (3, 256, 160), "norm": (3, 256)}
    params = {
        key: jax.ShapeDtypeStruct(shapes[key], jnp.float32, sharding=NamedSharding(mesh, specs[key])) for key in specs
    }
    config.name = name
    rule, _ = optimizer.make_optimizer(config, 10)
    state = optimizer.state_shardings(rule, params)
    found = {(leaf.shape, tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(state)}
    whole = {((3, 256, 160), (None, "fsdp", "tensor")), ((3, 256), (None, "tensor"))}
    factored = {((3, 256), (None, "fsdp")), ((3, 160), (None, "tensor")), ((3, 256), (None, "tensor"))}
    assert found == {((), ())} | ({"adamw": whole, "adafactor": factored | {((1,), ())}})[name]
    # And the state that is made has that layout.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, device=p.sharding), params)
    made = jax.jit(rule.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))(zeros)
    assert jax.tree.structure(made) == jax.tree.structure(state)

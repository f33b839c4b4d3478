"""The schedule's values, the clip, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from msd_jax.configs import default

from msd_jax import optimizer

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
    config.warmup_steps, config.b1, config.b2, config.eps = 0, 0.0, 0.0, 1.0
    optimize, _ = optimizer.make_optimizer(config, 10)
    grads = jax.tree.map(lambda p: 100 * jnp.ones_like(p), PARAMS)
    updates, _ = optimize.update(grads, optimize.init(PARAMS), PARAMS)
    clipped = 1 / np.sqrt(12)  # twelve equal entries of norm 1
    np.testing.assert_allclose(updates["embedding"], -0.5 * clipped / (clipped + 1), rtol=1e-5)


def test_decay_spares_norms(config):
    config.weight_decay, config.warmup_steps = 0.1, 0
    optimize, _ = optimizer.make_optimizer(config, 10)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimize.update(grads, optimize.init(PARAMS), PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    np.testing.assert_allclose(new["layers"]["query"], 1 - 0.5 * 0.1, rtol=1e-5)
    assert (new["layers"]["query_norm"] == 1).all()

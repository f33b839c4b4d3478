"""The losses in other people's programs: one distillation problem, solved with four libraries."""

import functools
import json
import subprocess
import sys

import equinox
import flax.nnx
import haiku
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msd_jax import losses
from tests.conftest import REPOSITORY

B, R, V, D = 16, 6, 12, 8
STEPS = 300


@pytest.fixture(params=["reverse_kl", "forward_kl"])
def problem(request, rng):
    """(student's features [B, R, D], teacher's logits [B, R, V], mask [B, R], the jitted loss of logits)."""
    features = jnp.asarray(rng.normal(size=(B, R, D)), jnp.float32)
    teacher_logits = jnp.tanh(features) @ jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    mask = jnp.asarray(np.arange(R) < rng.integers(1, R + 1, size=(B, 1)))

    @jax.jit
    def loss_fn(student_logits):
        dpsw_loss = functools.partial(losses.dpsw_loss, divergence=request.param, weight_top_k=6)
        return losses.mean_loss(*dpsw_loss(student_logits, teacher_logits, None, mask)[:2])

    return features, teacher_logits, mask, loss_fn


def check(problem, before, after):
    """The loss falls to a hundredth, and the student's distribution has moved to the teacher's."""
    _, teacher_logits, mask, loss_fn = problem
    assert loss_fn(before) > 0.5
    assert loss_fn(after) < 0.01 * loss_fn(before)

    def total_variation(student_logits):
        gap = jax.nn.softmax(student_logits) - jax.nn.softmax(teacher_logits)
        return 0.5 * jnp.abs(gap).sum(-1)[mask].mean()

    assert total_variation(before) > 0.4
    assert total_variation(after) < 0.06


def adam():
    return optax.adam(3e-2)


def test_plain_optax_loop(problem, rng):
    features, _, _, loss_fn = problem
    optimizer = adam()
    params = {
        "in": jnp.asarray(rng.normal(size=(D, 32)) / D**0.5, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(32, V)) / 32**0.5, jnp.float32),
    }

    def forward(params):
        return jnp.tanh(features @ params["in"]) @ params["out"]

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(lambda p: loss_fn(forward(p)))(params), state)
        return optax.apply_updates(params, updates), state

    before, state = forward(params), optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    check(problem, before, forward(params))


def test_flax_nnx(problem):
    features, _, _, loss_fn = problem
    rngs = flax.nnx.Rngs(0)
    model = flax.nnx.Sequential(flax.nnx.Linear(D, 32, rngs=rngs), jnp.tanh, flax.nnx.Linear(32, V, rngs=rngs))
    optimizer = flax.nnx.Optimizer(model, adam(), wrt=flax.nnx.Param)

    @flax.nnx.jit
    def step(model, optimizer):
        optimizer.update(model, flax.nnx.grad(lambda model: loss_fn(model(features)))(model))

    before = model(features)
    for _ in range(STEPS):
        step(model, optimizer)
    check(problem, before, model(features))


def test_equinox(problem):
    features, _, _, loss_fn = problem
    model = equinox.nn.MLP(D, V, 32, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    optimizer = adam()

    def forward(model):
        return jax.vmap(jax.vmap(model))(features)

    @equinox.filter_jit
    def step(model, state):
        updates, state = optimizer.update(equinox.filter_grad(lambda m: loss_fn(forward(m)))(model), state)
        return equinox.apply_updates(model, updates), state

    before, state = forward(model), optimizer.init(equinox.filter(model, equinox.is_array))
    for _ in range(STEPS):
        model, state = step(model, state)
    check(problem, before, forward(model))


def test_haiku(problem):
    features, _, _, loss_fn = problem
    model = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([32, V], activation=jnp.tanh)(x)))
    optimizer = adam()
    params = model.init(jax.random.key(0), features)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(lambda p: loss_fn(model.apply(p, features)))(params), state)
        return optax.apply_updates(params, updates), state

    before, state = model.apply(params, features), optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    check(problem, before, model.apply(params, features))


def test_import_brings_in_the_losses_and_nothing_heavy():
    code = """if True:
        import json, sys
        import jax, jax.numpy, jax.nn
        before = set(sys.modules)
        import msd_jax
        assert all(hasattr(msd_jax, name) for name in msd_jax.__all__)
        imported = {name.split(".")[0] for name in set(sys.modules) - before}
        print(json.dumps([sorted(imported), msd_jax.__all__]))
    """
    root = REPOSITORY
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    imported, public = json.loads(result.stdout)
    assert imported == ["msd_jax"]  # nothing that JAX has not imported itself
    assert {"dpsw_loss", "dpsw_weights", "forward_kl", "jsd", "mean_loss", "reverse_kl"} <= set(public)

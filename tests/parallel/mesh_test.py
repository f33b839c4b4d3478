"""One step and one greedy rollout of each family's smoke model, on every kind of mesh: the numbers of one device.

Fake devices tell that they belong to several machines or slices as real ones do, by their slice_index.
"""

import dataclasses
import functools
import importlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from msd_jax.generation import rollout
from msd_jax.models import config as model_config
from msd_jax.models import decoder, pretrained
from msd_jax.parallel import sharding
from msd_jax.testbed import tiny
from msd_jax.training import optimizer, packing, train_step
from tests.conftest import REPOSITORY
from tests.models.published import MODELS
from tests.models.published_test import shrunk
from tests.recipes_test import RECIPES

B, P, Q, R = 16, 12, 20, 6
# One of each family that has no recipe.
OTHERS = [
    *("CohereLabs/aya-expanse-8b", "CohereLabs/c4ai-command-r7b-12-2024", "HuggingFaceTB/SmolLM3-3B"),
    *("allenai/Olmo-3-7B-Instruct", "google/gemma-3-4b-it", "microsoft/Phi-4-mini-instruct"),
    *("swiss-ai/Apertus-8B-Instruct-2509", "ibm-granite/granite-3.3-8b-instruct"),
]
# Heads divide, are fewer than devices (key/value heads), rows are split alone; batches by data, fsdp and both.
MESHES = {name: [(1, 2, 4), (2, 2, 2)] for name in [*RECIPES, *OTHERS]} | {
    "llama3_8b": [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]
}


@functools.cache
def computed(name, shape, generating=(0, 0)):
    """(state after a step, its scalars, a rollout) as host arrays; `generating`: the sizes of sharding.rollout_mesh."""
    recipe = name if name in RECIPES else "llama3_8b"
    config = importlib.import_module(f"msd_jax.configs.{recipe}").get_config("smoke")
    config.model.dtype = "float32"
    # So large an eps makes AdamW's update linear in the gradient: it does not blow up the rounding of small ones.
    config.optimizer.warmup_steps, config.optimizer.learning_rate, config.optimizer.adamw.eps = 0, 1e-2, 1.0
    config = ml_collections.FrozenConfigDict(config)
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    options = {key: value for key, value in config.model.items() if key != "path"}
    # A vocabulary that divides over four devices, and weights so large that student and teacher differ.
    sizes = {"vocab_size": 1120, "initializer_range": 0.2}
    if name in OTHERS:
        architecture = model_config.from_dict(shrunk(MODELS[name][0]))
        # Rounding grows with depth; the last layers are of every kind.
        sizes |= {"layers": 3, "windows": architecture.windows[-3:], "ropes": architecture.ropes[-3:]}
        if architecture.logit_scale != 1.0:  # as published, it makes rows so flat that their entropy is all rounding
            sizes["logit_scale"] = 1.5
    else:
        architecture = model_config.read(tiny.model(name))
    architecture = dataclasses.replace(architecture, **sizes)
    model = pretrained.architecture(architecture, **options, mesh=mesh)
    optimize, _ = optimizer.make_optimizer(config.optimizer, config.train.steps)

    _, params = decoder.init(model.config, jax.random.key(0))
    _, other = decoder.init(model.config, jax.random.key(1))
    teacher = jax.tree.map(lambda a, b: a + 0.3 * b, params, other)
    zero = jnp.zeros((), jnp.int32)
    state = train_step.TrainState(zero, params, teacher, optimize.init(params), zero)
    parts = sharding.batch_shards(mesh)
    shape = packing.Shape(parts, B // 2 // parts, lengths=(P + R, Q + R))
    step = train_step.TrainStep(config, model, mesh, optimize, shape)
    state = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), jax.device_get(state), step.state)

    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, size + 1, B) for size in (P, Q, R)]
    prompt, teacher_prompt, response = (rng.integers(0, model.config.vocab_size, (B, size)) for size in (P, Q, R))
    arrays = (prompt, lengths[0], teacher_prompt, lengths[1], response, lengths[2])
    packs = packing.pack(packing.TrainBatch(*(x.astype(np.int32) for x in arrays)), shape)
    rollout_mesh = sharding.rollout_mesh(mesh, *generating)
    layout = model.shardings(rollout_mesh, sharding.ROLLOUT)
    greedy = rollout.Generator(
        model.on(rollout_mesh).graphdef, rollout_mesh, rollout.Sampling(R, temperature=0.0), (3,), 0
    )
    hashes, active = np.arange(B, dtype=np.uint32), np.ones(B, bool)
    laid = rollout.reshard(state.teacher, model.dtype, layout)
    written = greedy(laid, prompt.astype(np.int32), lengths[0].astype(np.int32), hashes, active, jax.random.key(0))
    state, scalars = step(state, {}, packs)
    return jax.device_get((state, scalars, written))


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in MESHES for shape in MESHES[name]])
def test_a_step_and_a_rollout_do_not_depend_on_the_devices(name, shape):
    same_as_alone(name, shape)


@pytest.mark.parametrize(
    ("name", "shape", "generating"),
    [
        ("llama3_8b", (1, 4, 2), (4, 8)),  # each size of its own, and fewer key/value heads than devices
        ("llama3_8b", (2, 4, 1), (2, 4)),  # every axis of the mesh of generation has devices
    ],
)
def test_nor_on_how_they_share_weights_in_generation(name, shape, generating):
    same_as_alone(name, shape, generating)


def test_nor_on_the_slices_that_they_are_in(monkeypatch):
    monkeypatch.setattr(type(jax.devices()[0]), "slice_index", property(lambda device: device.id // 4), raising=False)
    assert sharding.describe(sharding.make_mesh(2, 4, 1)).endswith("; between 2 machines: data")
    same_as_alone("llama3_8b", (2, 4, 1))


ON_MACHINES = """
import os

from tests.parallel import mesh_test

os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=32"  # no device was touched yet
import jax

from msd_jax.parallel import sharding

type(jax.devices()[0]).slice_index = property(lambda device: device.id // 8)
for shape in [(1, 8, 4), (2, 4, 4)]:
    print(sharding.describe(sharding.make_mesh(*shape)).partition("; ")[2])
    mesh_test.same_as_alone("llama3_8b", shape)
"""


def test_nor_on_the_machines_that_they_are_in():
    """Four of eight devices, joined by fsdp, and by data and fsdp."""
    command = [sys.executable, "-c", ON_MACHINES]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["between 4 machines: fsdp", "between 4 machines: data and fsdp"]


def same_as_alone(name, shape, generating=(0, 0)):
    (state, scalars, written), (alone, alone_scalars, alone_written) = (
        computed(name, shape, generating),
        computed(name, (1, 1, 1)),
    )
    np.testing.assert_array_equal(written.response_BxR, alone_written.response_BxR)
    assert len(np.unique(alone_written.response_BxR)) > 5
    for key, value in alone_scalars.items():
        np.testing.assert_allclose(scalars[key], value, rtol=1e-5, err_msg=key)
    assert alone_scalars["grad_norm"] > 1e-3
    # The optimizer's first moments are a tenth of the clipped gradient, not yet rounded by adding it to the weights.
    for expected, actual in ((alone.opt_state[1][0].mu, state.opt_state[1][0].mu), (alone.params, state.params)):
        difference = optax.tree.norm(optax.tree.sub(actual, expected))
        assert difference <= 1e-5 * optax.tree.norm(expected)
        for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
            # Small gradients that are sums of large ones (a key's bias all but cancels) are farthest off.
            assert np.linalg.norm(a - b) <= 5e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)

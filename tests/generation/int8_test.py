"""Generation from int8 weights: the same on every mesh, in batches and in pools, and int8 is what the loop reads."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msd_jax.generation import refill, rollout
from msd_jax.models import config as model_config
from msd_jax.models import decoder, int8, pretrained
from msd_jax.models.lora import Lora
from msd_jax.parallel import sharding
from msd_jax.planning.collectives import find_collectives
from msd_jax.planning.hlo import HloModule, shape_bytes
from tests.conftest import LLAMA

P, R, ROWS, STOP = 12, 8, 16, (3,)
SIZES = LLAMA | {"hidden_size": 64, "intermediate_size": 176, "vocab_size": 304, "tie_word_embeddings": False}
ADAPTERS = {"rank": 2, "alpha": 8.0, "targets": ("query", "output", "down")}


def architecture(mesh, lora=None, **options):
    options = {"dtype": "float32", "param_dtype": "float32", "remat": "full"} | options
    return pretrained.architecture(model_config.from_dict(SIZES), **options, lora=lora, mesh=mesh)


@functools.cache
def weights(lora):
    """Weights on the host, with adapters that are not new."""
    _, params = decoder.init(model_config.from_dict(SIZES), jax.random.key(2), lora=lora)
    keys = iter(jax.random.split(jax.random.key(3), 99))
    params["layers"] |= {
        name: 0.3 * jax.random.normal(next(keys), leaf.shape)
        for name, leaf in params["layers"].items()
        if name.endswith("_lora_b")
    }
    return jax.device_get(params)


def laid_out(shape, generating=(0, 0), lora=None, stored="int8"):
    """(the model on the mesh of generation, that mesh, its weights as `reshard` gives them from training's layout)."""
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    model = architecture(mesh, lora)
    params = jax.device_put(
        weights(Lora(**lora) if lora else None), jax.tree.map(lambda x: x.sharding, model.target(mesh))
    )
    generating = sharding.rollout_mesh(mesh, *generating)
    layout = rollout.layout(model, generating, stored)
    return model.on(generating), generating, rollout.reshard(params, model.dtype, layout)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 304, length).astype(np.int32) for length in np.sort(rng.integers(1, P + 1, ROWS))]


def written(model, mesh, params, temperature=0.0):
    generator = rollout.Generator(model.graphdef, mesh, rollout.Sampling(R, temperature), STOP, pad_id=0)
    return generator.write(params, prompts(), ROWS, P, range(ROWS), jax.random.key(5))


@functools.cache
def alone(adapted):
    model, mesh, params = laid_out((1, 1, 1), lora=ADAPTERS if adapted else None)
    return jax.device_get(params), written(model, mesh, params)


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize(
    ("shape", "generating"),
    [
        *[(shape, (0, 0)) for shape in ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2))],
        *[((1, 4, 2), (4, 8)), ((2, 4, 1), (2, 4))],
    ],
)
def test_neither_the_weights_nor_the_tokens_depend_on_the_devices(shape, generating, adapted):
    model, mesh, params = laid_out(shape, generating, ADAPTERS if adapted else None)
    expected_params, expected = alone(adapted)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected_params)
    planned = rollout.abstract_params(model, mesh, "int8")
    for leaf, plan in zip(jax.tree.leaves(params), jax.tree.leaves(planned), strict=True):
        assert (leaf.shape, leaf.dtype) == (plan.shape, plan.dtype)
        assert leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)
    np.testing.assert_array_equal(written(model, mesh, params).response_BxR, expected.response_BxR)
    assert len(np.unique(expected.response_BxR)) > 10


def test_the_weights_are_those_of_quantising_on_the_host():
    params, _ = alone(adapted=False)
    expected = int8.quantised(weights(None), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(expected))


def test_quantised_tokens_are_others():
    _, quantised = alone(adapted=False)
    unquantised = written(*laid_out((1, 1, 1), stored="float"))
    assert (quantised.response_BxR != unquantised.response_BxR).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_responses_of_a_pool_are_those_of_a_batch(shape, temperature):
    model, mesh, params = laid_out(shape)
    sampling, hashes = rollout.Sampling(R, temperature), np.arange(ROWS, dtype=np.uint32)
    pool = refill.PoolGenerator(model.graphdef, mesh, sampling, STOP, 0, rows=8, limit=P)
    given = {r.index: (r.tokens, r.stopped) for r in pool(params, prompts(), hashes, jax.random.key(5))}
    expected = written(model, mesh, params, temperature)
    assert [given[i] for i in range(ROWS)] == [expected.row(i) for i in range(ROWS)]


def test_unstacked_and_scanned_layers_generate_the_same(monkeypatch):
    model, mesh, params = laid_out((1, 1, 1))
    _, expected = alone(adapted=False)
    monkeypatch.setattr(rollout, "UNSTACKED", ())
    np.testing.assert_array_equal(written(model, mesh, params).response_BxR, expected.response_BxR)


@pytest.mark.parametrize("unstacked", [("cpu",), ()], ids=["unstacked", "scanned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_decode_loop_holds_int8_and_no_wider_copy(dtype, unstacked, monkeypatch):
    """What a while loop carries is its state and what was computed before it: XLA would like to widen weights there."""
    monkeypatch.setattr(rollout, "UNSTACKED", unstacked)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = architecture(mesh, dtype=dtype)
    generator = rollout.Generator(model.graphdef, mesh, rollout.Sampling(R), STOP, pad_id=0)
    carried = {}
    for stored in int8.WEIGHTS:
        text = generator.trace(rollout.abstract_params(model, mesh, stored), ROWS, P).lower().compile().as_text()
        loops = [line for line in text.splitlines() if " while(" in line and "[304,64]" in line]  # the embedding's
        assert len(loops) == 1
        matrices = r"(\w+)\[(?:3,)?(?:64,176|176,64|64,304|64,4,16|4,16,64|64,2,16)\]"
        carried[stored] = set(re.findall(matrices, loops[0].partition(" while(")[0]))
    assert carried["int8"] == {"s8"} and "s8" not in carried["float"] and carried["float"]


def test_int8_crosses_between_devices():
    """A gathered matrix is a quarter of the float32 one that training holds."""
    mesh = sharding.make_mesh(1, 8, 1)
    model = architecture(mesh)
    generating = sharding.rollout_mesh(mesh, 2, 4)
    received = {}
    for stored in int8.WEIGHTS:
        traced = rollout.trace_reshard(model.target(mesh), rollout.abstract_params(model, generating, stored))
        collectives = find_collectives(HloModule(traced.lower().compile().as_text()))
        received[stored] = sum(collective.bytes for collective in collectives)
    embedding = shape_bytes("f32[304,64]")
    assert received["int8"] < (received["float"] - embedding) / 3 + embedding

"""The frozen teacher in narrow dtypes: not one bit of what is computed changes, and half of its memory is free."""

import dataclasses
import functools
import importlib
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from msd_jax.configs import default
from safetensors.numpy import load_file, save_file

from msd_jax.errors import UserError
from msd_jax.models import config as model_config
from msd_jax.models import decoder, forward, pretrained, weights
from msd_jax.models.tokenizer import load_tokenizer
from msd_jax.parallel import sharding
from msd_jax.testbed import tiny
from msd_jax.training import checkpoint, optimizer, packing, run, train_step
from tests.conftest import write_model, write_tokenizer
from tests.recipes_test import RECIPES

# XLA may otherwise leave out a cast to bfloat16, which makes results differ by what should have been rounded away.
EXACTLY = {"xla_allow_excess_precision": False}


@pytest.fixture(scope="module")
def bfloat16_dir(tmp_path_factory):
    """A model whose tensors are bfloat16, as most are published."""
    directory = write_model(tmp_path_factory.mktemp("models") / "bfloat16")
    file = directory / "model.safetensors"
    save_file({name: value.astype(jnp.bfloat16) for name, value in load_file(file).items()}, file)
    return directory


def load(directory, **options):
    return pretrained.load(str(directory), **{"dtype": "float32", "param_dtype": "float32", "remat": "full"} | options)


def dtypes(tree):
    return {".".join(k.key for k in path): leaf.dtype.name for path, leaf in jax.tree.leaves_with_path(tree)}


def rolled(graphdef, params):
    """Final hidden states and logits of some tokens, from a program that rounds where the model says so."""
    tokens = jnp.arange(24).reshape(2, 12) % 17
    batch = (tokens[:, :7], jnp.array([7, 4]), tokens[:, 7:], jnp.array([5, 3]))

    def run(params):
        hidden, head = forward.response_hidden(graphdef, params, *batch), nnx.merge(graphdef, params).head_DxV
        return hidden, head.astype(jnp.bfloat16), forward.response_logits(graphdef, params, *batch)

    return jax.device_get(jax.jit(run, compiler_options=EXACTLY)(params))


@pytest.mark.parametrize("tensor, told", [(1, []), (2, []), (4, ["(2)", "tensor=4", "each device holds all"])])
def test_replicated_key_value_heads_are_reported_once(model_dir, tensor, told, monkeypatch):
    lines, mesh = [], sharding.make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])
    monkeypatch.setattr(pretrained, "log", lines.append)
    model = load(model_dir, mesh=mesh)
    for rules in (sharding.TRAIN, sharding.ROLLOUT):
        model.shardings(mesh, rules)
    assert len(lines) == bool(told) and all(part in line for line in lines for part in told)


def narrowed(model, params):
    held = model.frozen_teacher(model.split(model.abstract)[0])
    return jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), params, held)


def test_the_teachers_dtypes_follow_the_checkpoint_and_the_decoders_casts(model_dir, bfloat16_dir):
    def held(directory, **options):
        model = load(directory, **options)
        return dtypes(model.frozen_teacher(model.split(model.abstract)[0]))

    assert set(held(model_dir).values()) == {"float32"}
    assert set(held(bfloat16_dir).values()) == {"bfloat16"}
    assert set(held(bfloat16_dir, dtype="bfloat16", param_dtype="bfloat16").values()) == {"bfloat16"}
    assert set(held(bfloat16_dir, param_dtype="float16").values()) == {"float16"}  # which bfloat16 does not fit in
    cast = held(model_dir, dtype="bfloat16")
    kept = {"embedding", "final_norm", "layers.attention_norm", "layers.ffw_norm"}
    assert {name for name, dtype in cast.items() if dtype == "float32"} == kept
    assert {dtype for name, dtype in cast.items() if name not in kept} == {"bfloat16"}


def test_dtypes_of_a_checkpoint_whose_layers_differ(bfloat16_dir, tmp_path):
    config = model_config.read(bfloat16_dir)
    tensors = load_file(bfloat16_dir / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.float32)}, tmp_path / "model.safetensors")
    found = weights.dtypes(weights.check(tmp_path, config), config)
    assert found.pop("layers.up") == "mixed" and set(found.values()) == {"BF16"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_teacher_in_the_compute_dtype_is_the_same_function(name):
    """Of every family: biases, norms of queries and keys, Gemma's scaled embeddings."""
    options = {"dtype": "bfloat16", "param_dtype": "float32", "remat": "full"}
    model = pretrained.architecture(model_config.read(tiny.model(name)), **options)
    _, params = decoder.init(model.config, jax.random.key(0))
    # Norms of 1 and biases of 0 would be exact in any dtype.
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    teacher = narrowed(model, params)
    assert sum(x.nbytes for x in jax.tree.leaves(teacher)) < 0.9 * sum(x.nbytes for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, rolled(model.graphdef, teacher), rolled(model.graphdef, params))
    # The test can fail: with norms and embeddings rounded, hidden states differ.
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    assert np.any(rolled(model.graphdef, rounded)[0] != rolled(model.graphdef, params)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_of_a_bfloat16_checkpoint_is_the_same_function(bfloat16_dir, dtype):
    model, mesh = load(bfloat16_dir, dtype=dtype), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = model.params(mesh)
    teacher = narrowed(model, params)
    assert sum(x.nbytes for x in jax.tree.leaves(teacher)) == sum(x.nbytes for x in jax.tree.leaves(params)) / 2
    jax.tree.map(np.testing.assert_array_equal, rolled(model.graphdef, teacher), rolled(model.graphdef, params))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_step_with_the_teacher_of_a_bfloat16_checkpoint(bfloat16_dir, shape, rng):
    """Equal up to the order of float32 sums, which XLA chooses for each program; a rounded teacher is far off."""
    config = importlib.import_module("msd_jax.configs.default").get_config()
    config.loss.weight_top_k, config.optimizer.warmup_steps = 5, 0
    config = ml_collections.FrozenConfigDict(config)
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    model = load(bfloat16_dir, mesh=mesh)
    optimize, _ = optimizer.make_optimizer(config.optimizer, 10)
    abstract, _ = train_step.abstract_state(model, mesh, optimize, "frozen")
    assert set(dtypes(abstract.teacher).values()) == {"bfloat16"}
    shape = packing.Shape(sharding.batch_shards(mesh), rows=2, lengths=(16, 16))
    step = train_step.TrainStep(config, model, mesh, optimize, shape)
    lengths = [rng.integers(1, size + 1, 8) for size in (6, 9, 5)]
    tokens = [rng.integers(0, 17, (8, size)) for size in (6, 9, 5)]
    arrays = (array.astype(np.int32) for pair in zip(tokens, lengths) for array in pair)
    packs = packing.pack(packing.TrainBatch(*arrays), shape)

    def stepped(teacher_like, off=0.0):
        params = model.params(mesh)
        teacher = jax.tree.map(lambda p, leaf: (p * (1 + off)).astype(leaf.dtype), params, teacher_like)
        student = jax.tree.map(lambda p: p + 0.05, params)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract)
        state, scalars = step(dataclasses.replace(zeros, params=student, teacher=teacher), {}, packs)
        return jax.device_get((state.opt_state[1][0].mu, scalars["loss"]))

    def distance(one, other):
        return max(
            np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))
        )

    wide = stepped(abstract.params)
    assert distance(stepped(abstract.teacher), wide) < 1e-5
    assert distance(stepped(abstract.params, off=1e-3), wide) > 1e-4  # less than half a unit in bfloat16's last place


def test_a_checkpoint_with_a_float32_teacher_resumes(bfloat16_dir, tmp_path):
    """From a run that began before teachers were held in their checkpoint's dtype."""
    model, mesh = load(bfloat16_dir), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = model.params(mesh)
    held = functools.partial(narrowed, model)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, {"teacher": params}, {})
    checkpoints.close()
    state, _ = checkpoint.Checkpoints(tmp_path).restore(1, checkpoint.abstract({"teacher": held(params)}))
    assert set(dtypes(state["teacher"]).values()) == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, state["teacher"], held(params))


def write_model_with_tokens(directory, contents, special):
    """A tiny model whose tokenizer holds further tokens, beyond the vocabulary of config.json."""
    write_tokenizer(directory)
    first = len(load_tokenizer(str(directory)))
    write_model(directory, vocab_size=first)
    file = directory / "tokenizer.json"
    values = json.loads(file.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    values["added_tokens"] += [{"id": first + i, "content": text} | flags for i, text in enumerate(contents)]
    file.write_text(json.dumps(values))
    return directory, first


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_may_hold_tokens_beyond_the_vocabulary(special, tmp_path):
    """As those of Gemma 3 hold <image_soft_token>, and fine-tuned models a [PAD]."""
    directory, first = write_model_with_tokens(tmp_path / "model", ["<image_soft_token>", "[PAD]"], special)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "[PAD]"}))
    model = load(directory)
    assert len(model.tokenizer) == first + 2 and model.tokenizer.pad_token_id == first + 1
    assert model.pad_id < first == model.config.vocab_size
    model.require_embedded(np.arange(first), "a query")
    fault = (
        rf"^query 'q' in sw: the prompt holds the token '\[PAD\]' with id {first + 1}, for which .*vocab_size={first}"
    )
    with pytest.raises(UserError, match=fault):
        model.require_embedded([1, first + 1], "query 'q' in sw")


@pytest.mark.parametrize("special, refused", [(True, False), (False, True)])
def test_only_a_query_that_encodes_to_a_token_without_an_embedding_is_refused(special, refused, tmp_path):
    """A special token in a query is text; another added one is that token."""
    directory, _ = write_model_with_tokens(tmp_path / "model", ["[IMAGE]"], special)
    row = {"id": "odd", "texts": {"en": "look at [IMAGE] please", "sw": "tazama [IMAGE] tafadhali"}}
    (tmp_path / "queries.jsonl").write_text(json.dumps(row))
    config = default.get_config()
    config.model.path, config.data.path = str(directory), str(tmp_path / "queries.jsonl")
    config.mesh.data, config.mesh.fsdp = 8, 1
    if refused:
        with pytest.raises(UserError, match=r"query 'odd' in sw: the prompt holds the token '\[IMAGE\]'"):
            run.read(config)
    else:
        assert [record.id for record in run.read(config).records] == ["odd"]

"""Adapters: nothing at first, the same function merged or not, they alone are trained, and PEFT reads them."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from msd_jax.configs import default
from safetensors.numpy import load_file

from msd_jax import settings
from msd_jax.evaluation import evaluator
from msd_jax.models import config as model_config
from msd_jax.models import decoder, export, pretrained, trained
from msd_jax.models import lora as lora_lib
from msd_jax.parallel import sharding
from msd_jax.training import checkpoint, loop, run
from tests.conftest import LLAMA, WORDS

CONFIG = model_config.from_dict(LLAMA)
LORA = lora_lib.Lora(rank=3, alpha=7.0, targets=lora_lib.ADAPTABLE)


def logits(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model(tokens, positions, jnp.ones(tokens.shape, bool)))


def grown(params, key):
    """Adapters as after training: B is no longer zero."""
    adapters, base = decoder.split(params, lora_lib.is_adapter)
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(key, len(leaves))
    return decoder.join(
        base, treedef.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])
    )


@pytest.mark.parametrize("targets", [LORA.targets, ("query", "output", "down")])
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(rng, targets):
    lora = lora_lib.Lora(3, 7.0, targets)
    tokens = jnp.array(rng.integers(0, CONFIG.vocab_size, (2, 9)))
    graphdef, params = decoder.init(CONFIG, jax.random.key(0), lora=lora)
    plain = decoder.abstract(CONFIG)[0]
    adapters, base = decoder.split(params, lora_lib.is_adapter)
    assert len(jax.tree.leaves(adapters)) == 2 * len(targets)
    np.testing.assert_array_equal(logits(graphdef, params, tokens), logits(plain, base, tokens))
    params = grown(params, jax.random.key(1))
    adapted = logits(graphdef, params, tokens)
    assert jnp.abs(adapted - logits(plain, base, tokens)).max() > 1e-2
    merged = lora_lib.merge(params, lora, jnp.float32)
    np.testing.assert_allclose(logits(plain, merged, tokens), adapted, atol=1e-4)


def make_config(model_dir, tmp_path, rank=3) -> ml_collections.ConfigDict:
    path = tmp_path / "queries.jsonl"
    lines = [
        {"id": str(i), "harmful": True, "texts": {"en": f"make {w}", "sw": f"kikombe {w}"}} for i, w in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = default.get_config()
    config.model.path, config.data.path, config.eval.path = str(model_dir), str(path), str(path)
    config.model.lora.rank, config.model.lora.base_dtype = rank, "float32"
    config.model.lora.targets = ("query", "value", "output", "up")
    config.prompts.teacher_template = "answer in {language} : {query}"
    config.rollout.max_new_tokens = config.eval.max_new_tokens = 4
    config.data.batch_size, config.eval.limit = 8, 4
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-2, 0
    config.loss.weight_top_k = 5
    config.train.steps = 3
    return config


def test_a_run_trains_the_adapters_alone(model_dir, tmp_path):
    config = ml_collections.FrozenConfigDict(make_config(model_dir, tmp_path))
    ready = run.setup(config, tmp_path / "run")
    loop.train(ready)
    initial, _ = loop.initial_state(ready)
    state, _ = checkpoint.Checkpoints(tmp_path / "run").restore(3, checkpoint.abstract(initial))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    for tree in (state.params, state.teacher):  # the frozen teacher is the base: no second copy of the weights
        assert all(lora_lib.is_adapter(path[-1].key) for path, _ in jax.tree.leaves_with_path(tree))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.params))
    # Merged, only the targets have changed.
    before, after = load_file(model_dir / "model.safetensors"), load_file(tmp_path / "run/model/model.safetensors")
    changed = {name.split(".")[-2] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj", "o_proj", "up_proj"}
    # A step of the run, read for evaluation and export, is the same model.
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    model = pretrained.load(**config.model)
    params = trained.load_params(str(tmp_path / "run/checkpoints/3"), model, mesh)
    export.save(tmp_path / "again", params, model_dir, lora=model.lora)
    again = load_file(tmp_path / "again/model.safetensors")
    for name in after:
        np.testing.assert_allclose(again[name], after[name], atol=1e-6)
    assert (tmp_path / "run/eval/3/summary.json").exists()
    assert isinstance(evaluator.Evaluator(config, model, mesh), evaluator.Evaluator)


def test_the_base_is_in_its_own_dtype(model_dir, tmp_path):
    config = make_config(model_dir, tmp_path)
    config.model.lora.base_dtype = "bfloat16"
    model = pretrained.load(**config.model)
    adapters, base = model.split(model.params(sharding.make_mesh(), seed=1))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    a = adapters["layers"]["output_lora_a"]
    assert 0.9 * 32**-0.5 < jnp.abs(a).max() <= 32**-0.5 and (adapters["layers"]["output_lora_b"] == 0).all()
    other, _ = model.split(model.params(sharding.make_mesh(1, 4, 2), seed=1))
    jax.tree.map(np.testing.assert_array_equal, adapters, other)  # whatever the devices
    other, _ = model.split(model.params(sharding.make_mesh(), seed=2))
    assert not np.array_equal(other["layers"]["output_lora_a"], a)


def test_peft_and_transformers_give_our_logits(model_dir, tmp_path, rng):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    model = pretrained.load(**make_config(model_dir, tmp_path).model)
    params = grown(model.params(sharding.make_mesh(devices=jax.devices()[:1])), jax.random.key(5))
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 11))
    expected = np.asarray(logits(model.graphdef, params, jnp.array(tokens)))
    export.save_adapter(tmp_path / "adapter", params, model, str(model_dir))
    export.save(tmp_path / "merged", params, model_dir, lora=model.lora)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(load(model_dir), tmp_path / "adapter")
    for other in (adapted, load(tmp_path / "merged")):
        with torch.no_grad():
            np.testing.assert_allclose(other(torch.tensor(tokens)).logits.numpy(), expected, atol=2e-4)
    with torch.no_grad():
        plain = load(model_dir)(torch.tensor(tokens)).logits.numpy()
    assert np.abs(plain - expected).max() > 1e-2


def test_targets_are_checked(model_dir, tmp_path):
    config = make_config(model_dir, tmp_path)
    config.model.lora.targets = ("query", "q_proj")
    with pytest.raises(ValueError, match=r"config.model.lora.targets=.*choose one or more of query, key"):
        settings.check(config)

"""Adapters: nothing at first, the same function merged or not, they alone are trained, and PEFT reads them."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from msd_jax.configs import default
from safetensors.numpy import load_file, save_file

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
    _, merged = decoder.split(params, lora_lib.is_adapter)
    for name in targets:
        parts = (params["layers"][name + suffix] for suffix in ("", lora_lib.SUFFIX_A, lora_lib.SUFFIX_B))
        merged["layers"][name] = jax.vmap(lora_lib.merge, (0, 0, 0, None))(*parts, lora.scale)
    np.testing.assert_allclose(logits(plain, merged, tokens), adapted, atol=1e-4)


def make_config(model_dir, tmp_path, rank=3) -> ml_collections.ConfigDict:
    path = tmp_path / "queries.jsonl"
    lines = [
        {"id": str(i), "harmful": True, "texts": {"en": f"make {w}", "sw": f"kikombe {w}"}} for i, w in enumerate(WORDS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = default.get_config()
    config.model.path, config.data.path, config.eval.path = str(model_dir), str(path), str(path)
    config.model.lora.rank = rank
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
    assert isinstance(evaluator.of_model(config, model, mesh), evaluator.Evaluator)


@pytest.fixture(params=["float16", "bfloat16", "float32", "mixed"])
def stored_dir(model_dir, tmp_path, request):
    """The model in a dtype; "mixed": one layer's matrix in float16, and the rest in bfloat16."""
    directory = pathlib.Path(shutil.copytree(model_dir, tmp_path / request.param))
    file = directory / "model.safetensors"
    rng = np.random.default_rng(0)
    dtype = jnp.dtype("bfloat16" if request.param == "mixed" else request.param)
    tensors = {name: (x + 1e-3 * rng.normal(size=x.shape)).astype(dtype) for name, x in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -0.0
    if request.param == "mixed":
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, file)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"dtype": dtype.name}))
    return directory


def test_an_export_of_new_adapters_is_the_source_bit_for_bit(stored_dir, tmp_path):
    model = pretrained.load(**make_config(stored_dir, tmp_path).model)
    params = model.params(sharding.make_mesh(1, 4, 2))
    export.save(tmp_path / "out", params, stored_dir, lora=model.lora)
    before, after = (load_file(path / "model.safetensors") for path in (stored_dir, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name


def test_a_merged_export_is_rounded_once(stored_dir, tmp_path):
    """The sum in float32 of the checkpoint's own tensor and the adapter, in that tensor's dtype."""
    model = pretrained.load(**make_config(stored_dir, tmp_path).model)
    params = grown(model.params(sharding.make_mesh(1, 4, 2)), jax.random.key(5))
    export.save(tmp_path / "out", params, stored_dir, lora=model.lora)
    before, after = (load_file(path / "model.safetensors") for path in (stored_dir, tmp_path / "out"))
    name = "model.layers.1.self_attn.q_proj.weight"
    a, b = (np.asarray(params["layers"][f"query_lora_{x}"][1], np.float64) for x in "ab")
    exact = before[name].astype(np.float64) + model.lora.scale * (a @ b.reshape(3, -1)).T
    step = jnp.finfo(before[name].dtype).eps * np.abs(exact).max()
    assert np.abs(after[name].astype(np.float64) - exact).max() < 0.51 * step + 1e-6


def test_the_base_is_in_its_checkpoints_dtype(stored_dir, tmp_path):
    config = make_config(stored_dir, tmp_path)
    model = pretrained.load(**config.model)
    adapters, base = model.split(model.params(sharding.make_mesh(), seed=1))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    stored = {"bfloat16", "float32"} if stored_dir.name == "mixed" else {stored_dir.name}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == stored
    a = adapters["layers"]["output_lora_a"]
    assert 0.9 * 32**-0.5 < jnp.abs(a).max() <= 32**-0.5 and (adapters["layers"]["output_lora_b"] == 0).all()
    other, _ = model.split(model.params(sharding.make_mesh(1, 4, 2), seed=1))
    jax.tree.map(np.testing.assert_array_equal, adapters, other)  # whatever the devices
    other, _ = model.split(model.params(sharding.make_mesh(), seed=2))
    assert not np.array_equal(other["layers"]["output_lora_a"], a)


def test_peft_and_transformers_give_our_logits(stored_dir, tmp_path, rng):
    """Of the base with its adapter, and of what was merged from them, which is rounded to the checkpoint's dtype."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    model = pretrained.load(**make_config(stored_dir, tmp_path).model)
    params = grown(model.params(sharding.make_mesh(devices=jax.devices()[:1])), jax.random.key(5))
    tokens = rng.integers(0, CONFIG.vocab_size, (2, 11))
    expected = np.asarray(logits(model.graphdef, params, jnp.array(tokens)))
    export.save_adapter(tmp_path / "adapter", params, model, str(stored_dir))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == stored_dir.name  # a path of this machine is nobody's business
    export.save(tmp_path / "merged", params, stored_dir, lora=model.lora)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, attn_implementation="eager")

    def torch_logits(other):
        with torch.no_grad():
            return other(torch.tensor(tokens)).logits.numpy()

    def assert_close(ours, load):
        exact, single = (torch_logits(load(dtype)) for dtype in (torch.float64, torch.float32))
        # Random weights give a token now and then whose logits float32 cannot tell better, whoever computes them.
        off, usual = (np.abs(found - exact).max(-1) for found in (ours, single))
        assert (off < 2e-4 + 2 * usual).all(), (off, usual)

    assert_close(
        expected, lambda dtype: peft.PeftModel.from_pretrained(load(stored_dir, dtype=dtype), tmp_path / "adapter")
    )
    assert np.abs(torch_logits(load(stored_dir, dtype=torch.float32)) - expected).max() > 1e-2
    config = make_config(tmp_path / "merged", tmp_path)
    config.model.lora.rank = 0
    merged = pretrained.load(**config.model)
    ours = logits(merged.graphdef, merged.params(sharding.make_mesh(devices=jax.devices()[:1])), jnp.array(tokens))
    assert_close(ours, lambda dtype: load(tmp_path / "merged", dtype=dtype))
    if stored_dir.name.startswith("float"):  # bfloat16 rounds what was merged by more than logits can be compared by
        np.testing.assert_allclose(ours, expected, atol={"float32": 2e-4, "float16": 0.1}[stored_dir.name])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template


def test_targets_are_checked(model_dir, tmp_path):
    config = make_config(model_dir, tmp_path)
    config.model.lora.targets = ("query", "q_proj")
    with pytest.raises(ValueError, match=r"config.model.lora.targets=.*choose one or more of query, key"):
        settings.check(config)

"""safetensors in and out: sharded over files and devices, nothing left over, nothing from outside the directory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msd_jax import export, sharding
from msd_jax.models import config as model_config
from msd_jax.models import decoder, weights


@pytest.fixture
def loaded(model_dir):
    config = model_config.read(model_dir)
    return config, weights.read(model_dir, config, np.float32)


def test_several_files_with_an_index(model_dir, loaded, tmp_path):
    config, params = loaded
    export.save(tmp_path / "out", params, model_dir, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / weights.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    jax.tree.map(np.testing.assert_array_equal, weights.read(tmp_path / "out", config, np.float32), params)


def test_straight_into_the_sharding(model_dir, loaded):
    config, params = loaded
    mesh = sharding.make_mesh(2, 2, 2)
    _, abstract, axes = decoder.abstract(config)
    layout = sharding.param_shardings(mesh, abstract, axes, sharding.TRAIN)
    spread = weights.read(model_dir, config, np.float32, layout)
    for leaf, whole, wanted in zip(*map(jax.tree.leaves, (spread, params, layout))):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        np.testing.assert_array_equal(leaf, whole)


def test_bfloat16_and_back(model_dir, loaded, tmp_path):
    config, params = loaded
    export.save(tmp_path / "out", params, model_dir, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    back = weights.read(tmp_path / "out", config, jnp.bfloat16)
    for leaf, whole in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole.astype(jnp.bfloat16)))


def test_an_unfinished_export_is_not_taken_for_one(model_dir, loaded, tmp_path, monkeypatch):
    _, params = loaded
    export.save(tmp_path / "out", params, model_dir)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(weights, "copy_tokenizer", lambda *_: 1 / 0)
    changed = jax.tree.map(lambda x: x + 1, params)
    for name in ("out", "other"):
        with pytest.raises(ZeroDivisionError):
            export.save(tmp_path / name, changed, model_dir)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "other").exists()


def test_every_tensor_is_used_and_every_parameter_filled(model_dir, loaded, tmp_path):
    config, params = loaded
    export.save(tmp_path / "out", params, model_dir)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    taken = {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(taken | {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}, file)
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.up_proj.weight; left over: \S+q_proj.bias"):
        weights.read(tmp_path / "out", config, np.float32)
    # What follows from the rest may be there or not.
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    weights.read(tmp_path / "out", config, np.float32)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "pytorch_model.bin"])
def test_an_index_that_points_elsewhere(model_dir, loaded, tmp_path, name):
    config, params = loaded
    export.save(tmp_path / "out", params, model_dir)
    (tmp_path / "out" / weights.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=r"index.json points to '\S+', which is not a .safetensors file beside it"):
        weights.read(tmp_path / "out", config, np.float32)

"""Every recipe is a valid config; its smoke variant runs two steps, from the command's parts to the exported model."""

import importlib
import json

import ml_collections
import pytest

from msd_jax import settings
from msd_jax.models import config as model_config
from msd_jax.planning import launch
from msd_jax.testbed import tiny
from msd_jax.training import loop, run

RECIPES = {
    "qwen2_5_7b": "qwen2",
    "qwen3_8b": "qwen3",
    "llama2_7b": "llama",
    "llama3_8b": "llama",
    "gemma3_1b": "gemma3_text",
}


def recipe(name, *variant):
    return importlib.import_module(f"msd_jax.configs.{name}").get_config(*variant)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_in_each_variant(name):
    config = recipe(name)
    settings.check(config)
    assert "/" in config.model.path and config.model.lora.rank == 0
    settings.check(recipe(name, "lora"))
    assert recipe(name, "lora").model.lora.rank == 16
    assert config.model.dtype == "bfloat16" and config.model.param_dtype == "float32"
    with pytest.raises(ValueError, match=r"unknown variant 'smok'; choose lora or smoke"):
        recipe(name, "smok")


@pytest.mark.parametrize("name", ["default", "quickstart", "smollm2", *RECIPES])
def test_the_batch_divides_over_the_chips_that_a_recipe_is_planned_for(name):
    config = recipe(name)
    shards = launch.device_count(config.launch) // config.mesh.tensor
    assert launch.device_count(config.launch) % config.mesh.tensor == 0
    assert config.data.batch_size // config.train.micro_batches % shards == 0
    assert -1 in config.mesh.values()  # so that the mesh takes all chips, however many


@pytest.mark.parametrize("name", RECIPES)
def test_the_smoke_variant_runs_two_steps(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = recipe(name, "smoke")
    assert json.loads((tiny.model(name) / "config.json").read_text())["model_type"] == RECIPES[name]
    for key in ("loss", "teacher", "optimizer"):  # nothing of the method is another
        expected, actual = recipe(name)[key], config[key]
        assert expected == actual, key
    loop.train(run.setup(ml_collections.FrozenConfigDict(config), tmp_path / "run"))
    assert (tmp_path / "run/eval/2/summary.json").exists()
    assert model_config.read(tmp_path / "run/model") == model_config.read(tiny.model(name))

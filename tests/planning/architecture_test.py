"""Sizes of models that are not here."""

import jax
import pytest

from msd_jax.models import config as model_config
from msd_jax.models import decoder
from msd_jax.planning import architecture
from tests.planning.conftest import recipe

# From the checkpoints' own index files.
PARAMETERS = {
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "google/gemma-3-1b-it": 999_885_952,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_published_sizes_give_the_published_number_of_parameters(path):
    sizes, source = architecture.read_sizes(path)
    _, abstract, _ = decoder.abstract(sizes)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == PARAMETERS[path]
    assert "published" in source


@pytest.mark.parametrize("name", ["qwen2_5_7b", "qwen3_8b", "llama2_7b", "llama3_8b", "gemma3_1b", "smollm2"])
def test_the_sizes_of_every_recipe_are_here(name):
    assert recipe(name).model.path in PARAMETERS


def test_a_directory_comes_before_published_sizes(model_dir):
    sizes, source = architecture.read_sizes(str(model_dir))
    assert sizes == model_config.read(model_dir)
    assert source == str(model_dir / "config.json")


def test_an_unknown_model():
    with pytest.raises(FileNotFoundError, match=r"config.model.path='no/such-model' is not a directory.*config.json"):
        architecture.read_sizes("no/such-model")

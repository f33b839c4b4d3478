"""Published config.json files: they say what the models are, and a tiny model of theirs is transformers' own."""

import copy

import jax
import numpy as np
import pytest
from flax import nnx

from msd_jax.models import config as model_config
from msd_jax.models import decoder, weights
from tests.models.published import COMPARED, MODELS

# Of the tiny models; a head of 16 as published heads are multiples of it.
SMALL = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 61, "num_hidden_layers": 6, "initializer_range": 0.2}


@pytest.mark.parametrize("path", MODELS)
def test_the_number_of_parameters_is_the_published_one(path):
    values, billions = MODELS[path]
    _, abstract, _ = decoder.abstract(model_config.from_dict(values))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract)) / 1e9
    assert round(count, len(str(billions).partition(".")[2])) == billions


def test_the_models_that_were_compared_with_a_source_are_named():
    assert COMPARED.keys() < MODELS.keys() and all(COMPARED.values())


def shrunk(values: dict) -> dict:
    """The config.json with small sizes, and everything else as published."""
    values = copy.deepcopy(values)
    if "text_config" in values:
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
        values["vision_config"] |= vision | {"image_size": 32, "patch_size": 8}
        return values | {"text_config": shrunk(values["text_config"]), "mm_tokens_per_image": 4}
    values |= SMALL | {"sliding_window": values.get("sliding_window") and 5}
    if "head_dim" in values:
        values["head_dim"] = 16
    for key in ("layer_types", "no_rope_layers"):
        if key in values:
            values[key] = values[key][:6]
    rope = values.get("rope_scaling")
    if rope and "short_factor" in rope:
        rope["short_factor"], rope["long_factor"] = [1.0, 1.1, 1.3, 1.6, 2.0, 3.0], [9.0] * 6
    return values | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize("path", MODELS)
def test_a_tiny_model_computes_what_transformers_does(path, tmp_path, rng):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    values = shrunk(MODELS[path][0])
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**copy.deepcopy(values)), attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = model_config.from_dict(values)
    graphdef, abstract, _ = decoder.abstract(ours)
    params = weights.read(tmp_path, ours, abstract)
    tokens = rng.integers(0, 61, (2, 17))
    positions = np.broadcast_to(np.arange(17), tokens.shape)

    @jax.jit
    def log_probs(params):
        model = nnx.merge(graphdef, params)
        return jax.nn.log_softmax(model.logits(model(tokens, positions, np.ones(tokens.shape, bool))))

    with torch.no_grad():
        expected = torch.log_softmax(theirs(torch.tensor(tokens)).logits.double(), -1).numpy()
    np.testing.assert_allclose(log_probs(params), expected, atol=2e-4, rtol=0)

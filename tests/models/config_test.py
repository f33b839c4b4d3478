"""config.json: what is not implemented is refused by name, never approximated."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from msd_jax.errors import UserError
from msd_jax.models import config as model_config
from msd_jax.models import decoder
from tests.conftest import LLAMA


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral' is not supported: the nearest that is, 'mistral', differs: 'mixtral' has experts",
        ),
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported are apertus"),
        ({"model_type": "qwen4"}, "model_type 'qwen4' is not supported: the nearest by name is 'qwen2'"),
        ({"model_type": "mt5"}, "the nearest that is, 'llama', differs: 'mt5' has an encoder, and"),
        (
            {"model_type": "new_moe", "num_local_experts": 8, "kv_lora_rank": 4},
            "the nearest is perhaps 'llama': 'new_moe' has experts, attention to a latent .supported",
        ),
        ({"model_type": "qwen4", "n_routed_experts": 8}, "the nearest by name is 'qwen2': 'qwen4' has experts"),
        ({"model_type": "x", "text_config": {"model_type": "qwen3"}}, "only its text model, 'qwen3', is, in files of"),
        ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, "text_config=.* model_type 'gemma3_text'"),
        ({"model_type": "gemma3"}, "the key 'text_config' is missing"),
        ({"model_type": "apertus", "hidden_act": "silu"}, "hidden_act='silu' is not implemented .only xielu"),
        ({"hidden_act": "xielu"}, "hidden_act='xielu' is not implemented"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented .only 1.0, and less for phi3"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "the rope parameter short_factor holds 1 numbers, not 4",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers, num_hidden_layers says"),
        ({"num_local_experts": 8}, "num_local_experts=8: mixture-of-experts"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_type 'dynamic' is not implemented"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs the rope parameter 'factor'"),
        ({"attention_bias": True}, "attention_bias=True is not implemented"),
        ({"mlp_bias": True}, "mlp_bias=True is not implemented"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not implemented"),
        ({"vision_config": {"layers": 2}}, "vision_config="),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers says 3"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types holds 'linear_attention'"),
    ],
)
def test_refused_by_name(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(ValueError, match=message) as error:
        model_config.read(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_not_a_config(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config.json"):
        model_config.read(tmp_path)


def test_a_missing_key_is_named(tmp_path):
    values = {k: v for k, v in LLAMA.items() if k != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config.json: the key 'hidden_size' is missing"):
        model_config.read(tmp_path)


def test_both_layouts_of_rope_parameters():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    old = model_config.from_dict(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = model_config.from_dict(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old == new and old.ropes[0].theta == 5e5


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    rope = model_config.from_dict(
        LLAMA
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "rope_theta": 5e5,
        }
    ).ropes[0]
    scaled, factor = rope.frequencies(128)
    plain, _ = model_config.Rope(5e5).frequencies(128)
    wavelength = 2 * np.pi / plain
    assert factor == 1
    np.testing.assert_allclose(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": "32"}, r"hidden_size='32' must be a whole number from 1 to"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 must be"),
        ({"num_attention_heads": 0}, r"num_attention_heads=0 must be"),
        ({"vocab_size": True}, r"vocab_size=True must be"),
        ({"num_key_value_heads": 3}, r"num_attention_heads=4, .*the first must be a multiple of the second"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps=nan must be a positive number"),
        ({"rope_theta": None}, r"rope_theta=None must be a positive number"),
        ({"rope_theta": 1.0}, r"rope_theta=1.0 must be greater than 1"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] must be an object"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
            r"rope_scaling.factor='2' must be a positive number",
        ),
        ({"rope_scaling": {"rope_type": []}}, r"rope_scaling.rope_type=\[\] must be a string"),
        ({"layer_types": {"a": 1}}, r"layer_types=.* must be a list of strings"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings='yes' must be true or false"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"hidden_act": 1}, r"hidden_act=1 is not implemented"),
        ({"no_rope_layers": "1"}, r"no_rope_layers='1' must be a list of whole numbers"),
        ({"rope_scaling": {"short_factor": 1}}, r"rope_scaling.short_factor=1 must be a list of numbers"),
        ({"rope_scaling": {"short_factor": [0.0]}}, r"rope_scaling.short_factor=0.0 must be a positive number"),
        ({"logit_scale": 0}, r"logit_scale=0 must be a positive number"),
    ],
)
def test_a_wrong_type_or_size_is_one_error_that_names_the_key(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.json: {message}"):
        model_config.read(tmp_path)


def test_sequences_that_longrope_would_turn_otherwise_are_refused():
    values = LLAMA | {"model_type": "phi3", "original_max_position_embeddings": 16}
    values |= {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}
    config = model_config.from_dict(values)
    graphdef, params, _ = decoder.abstract(config)

    def hidden(tokens):
        def run(params):
            inputs = np.zeros((2, tokens), np.int32)
            return nnx.merge(graphdef, params)(inputs, inputs, inputs == 0)

        return jax.eval_shape(run, params)

    assert hidden(16).shape == (2, 16, 32)
    decoder.init_cache(config, 2, 16, np.float32)
    for too_long in (lambda: hidden(17), lambda: decoder.init_cache(config, 2, 17, np.float32)):
        with pytest.raises(UserError, match=r"sequences of 17 tokens are not implemented .* beyond 16 tokens"):
            too_long()

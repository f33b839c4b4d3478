"""config.json of popular models, as far as a decoder follows from it, and how many parameters they state.

Written down by hand. Those in COMPARED were then held against public repositories that have the model's config.json or
values from it. The others are from memory: only their number of parameters, which cards and the hub show, checks them.
The factors of longrope, which are long lists, are 1 here.
"""

from typing import Any

_LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_LLAMA |= {"tie_word_embeddings": False}
_LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_ROPE |= {"factor": 8.0, "original_max_position_embeddings": 8192}
_COHERE = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "layer_norm_eps": 1e-5}


def _sizes(width: int, ffw: int, layers: int, heads: int, kv_heads: int, vocab: int, positions: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": ffw,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
    }


_LLAMA31_8B = _LLAMA | _sizes(4096, 14336, 32, 32, 8, 128256, 131072)
_LLAMA31_8B |= {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": _LLAMA3_ROPE}
_GEMMA3_VISION = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
_GEMMA3_VISION |= {"image_size": 896, "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
_GEMMA3_VISION |= {"vision_use_head": False}
_GEMMA3 = {"model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106]}
_GEMMA3 |= {"image_token_index": 262144, "mm_tokens_per_image": 256, "vision_config": _GEMMA3_VISION}


def _gemma3(**text: Any) -> dict[str, Any]:
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    return _GEMMA3 | {"text_config": text | {"sliding_window": 1024}}


# hub id -> (config.json, billions of parameters of the decoder).
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "CohereLabs/aya-expanse-8b": (
        _sizes(4096, 14336, 32, 32, 8, 256000, 8192)
        | _COHERE
        | {"model_type": "cohere", "logit_scale": 0.125, "rope_theta": 10000, "use_qk_norm": False},
        8.03,
    ),
    "CohereLabs/aya-expanse-32b": (
        _sizes(8192, 24576, 40, 64, 8, 256000, 8192)
        | _COHERE
        | {"model_type": "cohere", "logit_scale": 0.0625, "rope_theta": 4000000, "use_qk_norm": False},
        32.30,
    ),
    "CohereLabs/c4ai-command-r7b-12-2024": (
        _sizes(4096, 14336, 32, 32, 8, 256000, 8192)
        | _COHERE
        | {"model_type": "cohere2", "logit_scale": 0.25, "rope_theta": 50000, "head_dim": 128, "rope_scaling": None}
        | {"sliding_window": 4096, "sliding_window_pattern": 4, "order_of_interleaved_layers": "local_attn_first"}
        | {"position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "use_parallel_block": True},
        8.03,
    ),
    "microsoft/phi-4": (
        _sizes(5120, 17920, 40, 40, 10, 100352, 16384)
        | {
            "model_type": "phi3",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 250000,
            "sliding_window": None,
        }
        | {"original_max_position_embeddings": 16384, "rope_scaling": None, "tie_word_embeddings": False},
        14.66,
    ),
    "microsoft/Phi-4-mini-instruct": (
        _sizes(3072, 8192, 32, 24, 8, 200064, 131072)
        | {"model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "sliding_window": 262144}
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}}
        | {"tie_word_embeddings": True, "attention_bias": False},
        3.84,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        _sizes(3072, 8192, 32, 32, 32, 32064, 4096)
        | {"model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        | {"original_max_position_embeddings": 4096, "sliding_window": 2047, "rope_scaling": None}
        | {"tie_word_embeddings": False, "attention_bias": False},
        3.82,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        _sizes(2048, 11008, 36, 16, 4, 128256, 65536)
        | {"model_type": "smollm3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5000000.0}
        | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36}
        | {"sliding_window": None, "use_sliding_window": False, "rope_scaling": None, "max_window_layers": 28}
        | {"attention_bias": False, "mlp_bias": False},
        3.08,
    ),
    "allenai/Olmo-3-7B-Instruct": (
        _sizes(4096, 11008, 32, 32, 32, 100278, 65536)
        | {"model_type": "olmo3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 500000}
        | {"sliding_window": 4096, "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8}
        | {
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
            | {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0}
        }
        | {"tie_word_embeddings": False, "attention_bias": False},
        7.30,
    ),
    "swiss-ai/Apertus-8B-Instruct-2509": (
        _sizes(4096, 21504, 32, 32, 8, 131072, 65536)
        | {"model_type": "apertus", "hidden_act": "xielu", "rms_norm_eps": 1e-5, "rope_theta": 12000000.0}
        | {"rope_scaling": _LLAMA3_ROPE, "qk_norm": True, "post_norm": False, "mlp_bias": False}
        | {"tie_word_embeddings": False, "attention_bias": False},
        8.05,
    ),
    "ibm-granite/granite-3.3-8b-instruct": (
        _sizes(4096, 12800, 40, 32, 8, 49159, 131072)
        | {"model_type": "granite", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000000.0}
        | {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
        | {"logits_scaling": 16.0, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
        8.17,
    ),
    "google/gemma-3-4b-it": (_gemma3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34), 3.88),
    "google/gemma-3-27b-it": (
        _gemma3(hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32) | {},
        27.01,
    ),
    "utter-project/EuroLLM-9B-Instruct": (
        _LLAMA | _sizes(4096, 12288, 42, 32, 8, 128000, 4096) | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        9.15,
    ),
    "utter-project/EuroLLM-1.7B-Instruct": (
        _LLAMA | _sizes(2048, 5632, 24, 16, 8, 128000, 4096) | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        1.66,
    ),
    "BSC-LT/salamandra-7b-instruct": (
        _LLAMA | _sizes(4096, 11008, 32, 32, 8, 256000, 8192) | {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
        7.768117248,
    ),
    "BSC-LT/salamandra-2b-instruct": (
        _LLAMA | _sizes(2048, 5440, 24, 16, 16, 256000, 8192) | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0},
        2.253490176,
    ),
    "meta-llama/Llama-Guard-3-8B": (_LLAMA31_8B, 8.03),
    "aisingapore/Llama-SEA-LION-v3-8B-IT": (_LLAMA31_8B, 8.03),
    "aisingapore/Gemma-SEA-LION-v3-9B-IT": (
        _sizes(3584, 14336, 42, 16, 8, 256000, 8192)
        | {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "rms_norm_eps": 1e-6}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}
        | {"sliding_window": 4096, "rope_theta": 10000.0, "attention_bias": False},
        9.24,
    ),
    "sail/Sailor2-8B-Chat": (
        _sizes(3584, 18944, 32, 28, 4, 152064, 32768)
        | {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
        | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "tie_word_embeddings": False},
        8.55,
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": (
        _sizes(5120, 14336, 40, 32, 8, 131072, 1024000)
        | {"model_type": "mistral", "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5}
        | {"rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
        12.25,
    ),
}
MODELS["google/gemma-3-27b-it"][0]["text_config"] |= {"num_key_value_heads": 16, "head_dim": 128}
MODELS["google/gemma-3-27b-it"][0]["text_config"] |= {"query_pre_attn_scalar": 168}

# hub id -> the public repository and file with which the values were compared. Every key that a decoder follows from
# agreed, as far as the file has it.
_LITGPT, _MLC = "Lightning-AI/litgpt: litgpt/config.py", "mlc-ai/mlc-llm: python/mlc_llm/model/model_preset.py"
_MAXTEXT = "AI-Hypercomputer/maxtext: src/maxtext/"
_GEMMA3_SOURCE = f"{_LITGPT}; the image encoder: {_MAXTEXT}checkpoint_conversion/utils/hf_model_configs.py"
_KERAS = "IMvision12/KerasFormers: kerasformers/models/"
COMPARED = {
    "CohereLabs/aya-expanse-8b": f"{_KERAS}cohere/config.py",
    "CohereLabs/aya-expanse-32b": f"{_KERAS}cohere/config.py",
    "CohereLabs/c4ai-command-r7b-12-2024": f"{_KERAS}cohere2/config.py",
    "microsoft/phi-4": _LITGPT,
    "microsoft/Phi-3-mini-4k-instruct": f"{_LITGPT}, which counts a window's own token",
    "microsoft/Phi-4-mini-instruct": f"{_MLC}, which has the factors of longrope too",
    "HuggingFaceTB/SmolLM3-3B": "tests of dotLLM's HfConfigExtractor; sizes: transformers' SmolLM3Config",
    "allenai/Olmo-3-7B-Instruct": f"{_MAXTEXT}configs/models/olmo3-7b.yml",
    "swiss-ai/Apertus-8B-Instruct-2509": "pd95/ollama: x/models/apertus/apertus_test.go",
    "ibm-granite/granite-3.3-8b-instruct": "a copy of its config.json in a list of models' shapes",
    "google/gemma-3-4b-it": _GEMMA3_SOURCE,
    "google/gemma-3-27b-it": _GEMMA3_SOURCE,
    "BSC-LT/salamandra-7b-instruct": _LITGPT,
    "BSC-LT/salamandra-2b-instruct": _LITGPT,
    "meta-llama/Llama-Guard-3-8B": f"{_MLC}, of the Llama 3.1 8B that it is made from",
    "aisingapore/Llama-SEA-LION-v3-8B-IT": f"{_MLC}, of the Llama 3.1 8B that it is made from",
    "aisingapore/Gemma-SEA-LION-v3-9B-IT": f"{_MLC}, of the Gemma 2 9B that it is made from",
    "mistralai/Mistral-Nemo-Instruct-2407": "NVIDIA/Fuser: benchmarks/python/model_configs.py, of the base model",
}

"""Tiny random models with the config.json keys of real ones, so that recipes can be tried anywhere."""

import contextlib
import json
import os
import pathlib
import tempfile
import zlib

import jax

from msd_jax.models import config as model_config
from msd_jax.models import decoder, export
from msd_jax.testbed import MODEL_PATH

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "dtype": "bfloat16",
}
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": False}
# Keys and values of the published config.json, with other sizes.
VALUES = {
    "qwen2_5_7b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 131_072,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    },
    "qwen3_8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 32,  # larger than hidden_size / heads, as in the real model
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "llama2_7b": _LLAMA
    | {"rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False, "num_key_value_heads": 4},
    "llama3_8b": _LLAMA | {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": False},
    "gemma3_1b": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
}


def model(name: str) -> pathlib.Path:
    """The directory of a tiny random model of the family of recipe `name`, with the testbed's tokenizer.

    It is made once, in the user's cache directory (XDG_CACHE_HOME, or ~/.cache).
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "msd_jax" / "tiny"
    values = _SIZES | VALUES[name]
    vocab_size = json.loads((MODEL_PATH / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    values |= {"vocab_size": vocab_size}
    text = json.dumps(values, indent=1)
    directory = cache / f"{name}-{zlib.crc32(text.encode()):08x}"
    if directory.exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        source = pathlib.Path(folder)
        export.copy_companions(MODEL_PATH, source)
        (source / "config.json").write_text(text, encoding="utf-8")
        _, params = decoder.init(model_config.read(source), jax.random.key(0))
        export.save(source / "model", params, source)
        with contextlib.suppress(OSError):  # another process on this machine was faster; its model is the same
            (source / "model").rename(directory)
    return directory

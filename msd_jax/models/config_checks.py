"""What a config.json may hold: types and ranges of its values, and what the decoder does not implement."""

from collections.abc import Sequence
from typing import Any

from msd_jax.errors import UserError
from msd_jax.models.rope import FULL, SLIDING

# Families that are asked for, the supported one that is nearest, and what they have beside it.
_NEAREST = {
    "arcee": ("llama", "a squared ReLU without a gate"),
    "aya_vision": ("cohere2", "an image encoder"),
    "bloom": ("llama", "ALiBi instead of RoPE, LayerNorm, biases, and no gate"),
    "cohere2_moe": ("cohere2", "experts"),
    "cohere2_vision": ("cohere2", "an image encoder"),
    "dbrx": ("mistral", "experts, LayerNorm, and query, key and value as one tensor"),
    "deepseek_v2": ("llama", "experts and attention to a latent"),
    "deepseek_v3": ("llama", "experts and attention to a latent"),
    "ernie4_5": ("llama", "RoPE on neighbours in a head"),
    "exaone4": ("olmo3", "layers without RoPE, and norms of queries and keys over each head"),
    "falcon": ("llama", "attention and feed-forward side by side, LayerNorm, and no gate"),
    "flex_olmo": ("olmo2", "experts"),
    "gemma": ("gemma2", "no norms behind the sublayers and no soft caps"),
    "gemma3n": ("gemma3_text", "embeddings for each layer, and encoders"),
    "gemma4": ("gemma3_text", "embeddings for each layer or experts, heads of two sizes, and encoders"),
    "gemma4_text": ("gemma3_text", "embeddings for each layer or experts, and heads of two sizes"),
    "glm": ("llama", "biases on query, key and value, and RoPE on neighbours in a part of each head"),
    "glm4": ("llama", "norms behind the sublayers too, and RoPE on neighbours in a part of each head"),
    "glm4_moe": ("qwen3", "experts, and RoPE on a part of each head"),
    "gpt2": ("llama", "learned positions, LayerNorm, biases, and no gate"),
    "gpt_neox": ("llama", "LayerNorm, biases, no gate, and RoPE on a part of each head"),
    "gpt_oss": ("mistral", "experts, and sinks in the attention"),
    "gptj": ("cohere", "RoPE on a part of each head, biases, and no gate"),
    "granitemoe": ("granite", "experts"),
    "granitemoehybrid": ("granite", "experts, and layers of Mamba"),
    "helium": ("llama", "RoPE on neighbours in a head"),
    "hunyuan_v1_dense": ("qwen3", "norms of queries and keys behind RoPE"),
    "jamba": ("llama", "experts, layers of Mamba, and no RoPE"),
    "kimi_k2": ("llama", "experts and attention to a latent"),
    "lfm2": ("qwen3", "layers of short convolutions"),
    "llama4": ("llama", "experts, layers without RoPE, and an image encoder"),
    "mamba": ("llama", "layers of Mamba instead of attention"),
    "mamba2": ("llama", "layers of Mamba instead of attention"),
    "minimax": ("mistral", "experts, and layers of linear attention"),
    "ministral3": ("mistral", "queries that are scaled by their position"),
    "mistral3": ("mistral", "an image encoder"),
    "mixtral": ("mistral", "experts"),
    "mt5": ("llama", "an encoder, and learned distances instead of RoPE"),
    "nemotron": ("llama", "LayerNorm, a squared ReLU without a gate, and RoPE on a part of each head"),
    "olmo": ("llama", "LayerNorm without weights"),
    "olmoe": ("olmo2", "experts"),
    "opt": ("llama", "learned positions, LayerNorm, biases, and no gate"),
    "phi": ("phi3", "attention and feed-forward side by side, LayerNorm, biases, and no gate"),
    "phi4_multimodal": ("phi3", "encoders of images and speech"),
    "phimoe": ("phi3", "experts"),
    "qwen2_5_vl": ("qwen2", "an image encoder"),
    "qwen2_moe": ("qwen2", "experts"),
    "qwen2_vl": ("qwen2", "an image encoder"),
    "qwen3_5": ("qwen3", "layers of linear attention"),
    "qwen3_5_text": ("qwen3", "layers of linear attention"),
    "qwen3_moe": ("qwen3", "experts"),
    "qwen3_next": ("qwen3", "experts, and layers of linear attention"),
    "qwen3_vl": ("qwen3", "an image encoder"),
    "qwen3_vl_moe": ("qwen3", "experts, and an image encoder"),
    "seed_oss": ("qwen2", "keys of its own for the biases"),
    "stablelm": ("llama", "LayerNorm, and RoPE on a part of each head"),
    "starcoder2": ("mistral", "LayerNorm, biases, and no gate"),
    "t5": ("llama", "an encoder, and learned distances instead of RoPE"),
    "xglm": ("llama", "sinusoidal positions, LayerNorm, biases, and no gate"),
}

# What parts of keys in the config.json of an unknown family tell of it.
_SIGNS = {
    "expert": "experts",
    "is_encoder_decoder": "an encoder",
    "kv_lora_rank": "attention to a latent",
    "mamba": "layers of Mamba",
    "state_size": "state-space layers",
    "linear_attention": "layers of linear attention",
    "linear_num_": "layers of linear attention",
    "alibi": "ALiBi",
    "vision_config": "an image encoder",
    "audio_config": "an audio encoder",
}


def nearest(values: dict[str, Any], supported: Sequence[str]) -> str:
    """The end of a line about a model_type that is not supported: what is nearest to it, and what differs."""
    family, all_of_them = values.get("model_type"), f"supported are {', '.join(supported)}"
    text = values.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if isinstance(family, str) and family in _NEAREST:
        other, more = _NEAREST[family]
        return f": the nearest that is, {other!r}, differs: {family!r} has {more} ({all_of_them})"
    if isinstance(inner, str) and inner in supported:
        return f": only its text model, {inner!r}, is, in files of its own ({all_of_them})"
    # Families grow new members more often than they change: qwen4 is nearest to qwen3, qwen3_x to qwen3.
    name = family if isinstance(family, str) else ""
    alike = max(supported, key=lambda other: _shared(name, other))
    by_name = _shared(name, alike) >= 4
    signs = {sign: None for part, sign in _SIGNS.items() for key in values if part in key and values[key]}
    if not by_name and not signs:
        return f"; {all_of_them}"
    more = f": {family!r} has {', '.join(signs)}" if signs else "; compare their config.json"
    if by_name:
        return f": the nearest by name is {alike!r}{more} ({all_of_them})"
    return f": the nearest is perhaps 'llama'{more} ({all_of_them})"


def _shared(first: str, second: str) -> int:
    """How many characters two names share at their beginning."""
    differing = (i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    return next(differing, min(len(first), len(second)))


# Numbers, the least and the most that they may be; those that may be null are absent then.
_SIZES = {
    "num_hidden_layers": (1, 1000),
    "hidden_size": (1, 1 << 17),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "intermediate_size": (1, 1 << 20),
    "vocab_size": (1, 1 << 22),
    "sliding_window": (0, 1 << 30),
    "sliding_window_pattern": (1, 1000),
    "max_window_layers": (0, 1000),
    "max_position_embeddings": (1, 1 << 30),
    "original_max_position_embeddings": (1, 1 << 30),
    "no_rope_layer_interval": (1, 1000),
}
_POSITIVE = (
    *("rms_norm_eps", "initializer_range", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
    *("layer_norm_eps", "logit_scale", "logits_scaling"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier"),
    *("attn_logit_softcapping", "final_logit_softcapping", "partial_rotary_factor"),
)
_ROPE_NUMBERS = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "partial_rotary_factor"),
)
_FLAGS = ("tie_word_embeddings", "use_sliding_window", "attention_bias", "use_qk_norm")
_NULLABLE = (
    *("num_key_value_heads", "head_dim", "sliding_window", "original_max_position_embeddings"),
    *("attn_logit_softcapping", "final_logit_softcapping", "partial_rotary_factor"),
)


def check_values(values: dict[str, Any]) -> None:
    """Raises UserError where a value is of another type, or out of the range that any model has."""
    for key, (least, most) in _SIZES.items():
        value = values.get(key, least)
        if not (value is None and key in _NULLABLE) and not (type(value) is int and least <= value <= most):
            raise UserError(f"{key}={_shown(value)} must be a whole number from {least} to {most}")
    for key in _POSITIVE:
        _check_positive(key, values.get(key, None if key in _NULLABLE else 1.0), key in _NULLABLE)
    for key in _FLAGS:
        if not isinstance(values.get(key, False), bool):
            raise UserError(f"{key}={_shown(values[key])} must be true or false")
    kinds = values.get("layer_types")
    if not (kinds is None or (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds))):
        raise UserError(f"layer_types={_shown(kinds)} must be a list of strings")
    flags = values.get("no_rope_layers") or []
    if not (isinstance(flags, list) and all(type(flag) is int for flag in flags)):
        raise UserError(f"no_rope_layers={_shown(flags)} must be a list of whole numbers")
    if flags and len(flags) < values["num_hidden_layers"]:
        raise UserError(f"no_rope_layers names {len(flags)} layers, num_hidden_layers says more")
    for key in ("rope_parameters", "rope_scaling"):
        section = values.get(key)
        _check_rope(key, section)
        for kind in (FULL, SLIDING):
            _check_rope(f"{key}.{kind}", (section or {}).get(kind))


def _check_rope(key: str, section: Any) -> None:
    if not isinstance(section, dict | None):
        raise UserError(f"{key}={_shown(section)} must be an object")
    section = section or {}
    for name in section.keys() & set(_ROPE_NUMBERS):
        _check_positive(f"{key}.{name}", section[name], name in ("beta_fast", "beta_slow", "attention_factor"))
    for name in section.keys() & {"rope_type", "type"}:
        if not isinstance(section[name], str):
            raise UserError(f"{key}.{name}={_shown(section[name])} must be a string")
    factors = section.get("short_factor", [])
    if not isinstance(factors, list):
        raise UserError(f"{key}.short_factor={_shown(factors)} must be a list of numbers")
    for factor in factors:
        _check_positive(f"{key}.short_factor", factor, False)


def _check_positive(key: str, value: Any, nullable: bool) -> None:
    if value is None and nullable:
        return
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise UserError(f"{key}={_shown(value)} must be a positive number")


def _shown(value: Any) -> str:
    return repr(value)[:60]


# Keys of config.json, and the one value that the decoder implements, which an absent or empty one means too.
_ONLY = {
    "attention_bias": False,  # Qwen2 has its biases by architecture; elsewhere this puts one on the output as well
    "mlp_bias": False,
    "quantization_config": None,
    "vision_config": None,
    "use_bidirectional_attention": False,
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_WITHOUT_GATE = {"apertus": {"xielu": "xielu"}}


def refuse_unimplemented(values: dict[str, Any]) -> None:
    """Raises UserError where a value asks for something that the decoder does not implement."""
    for key, implemented in _ONLY.items():
        if values.get(key) and values[key] != implemented:
            raise UserError(f"{key}={values[key]!r} is not implemented (only {implemented!r})")
    for key in values:
        if "expert" in key and values[key]:
            raise UserError(f"{key}={values[key]!r}: mixture-of-experts models are not implemented")
    activation(values)


def activation(values: dict[str, Any]) -> str:
    """DecoderConfig.activation.

    Raises:
      UserError: the family has no such activation here.
    """
    known = _WITHOUT_GATE.get(values["model_type"], _ACTIVATIONS)
    name = values.get("hidden_activation") or values.get("hidden_act") or "silu"
    if not isinstance(name, str) or name not in known:
        raise UserError(f"hidden_act={name!r} is not implemented (only {', '.join(known)})")
    return known[name]

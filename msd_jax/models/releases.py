"""What an export says twice, so that releases of transformers older and newer than its source read the same from it.

transformers 5 gathered RoPE in `rope_parameters`, renamed `torch_dtype`, and writes class names that transformers 4
does not know; what transformers 4 does not find it takes from defaults, without a word. Both read the older keys.
"""

from typing import Any

from msd_jax.models.rope import FULL, SLIDING


def config_json(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json, or the part of one that is a model's within a larger one, with older keys beside newer ones."""
    values = dict(values)
    if isinstance(values.get("text_config"), dict):
        values["text_config"] = config_json(values["text_config"])
    if dtype := values.get("dtype") or values.get("torch_dtype"):
        values |= {"dtype": dtype, "torch_dtype": dtype}
    parameters = values.get("rope_parameters") or {}
    whole, local = parameters.get(FULL, parameters), parameters.get(SLIDING) or {}
    if "rope_theta" in whole:
        values["rope_theta"] = whole["rope_theta"]
    if "rope_theta" in local and values.get("model_type") == "gemma3_text":
        values["rope_local_base_freq"] = local["rope_theta"]
    if whole:
        scaling = {key: value for key, value in whole.items() if key != "rope_theta"}
        if values.get("model_type") == "phi3":
            scaling = _phi3(values, scaling)
        plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
        values["rope_scaling"] = None if plain else scaling
    return values


def _phi3(values: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling with the three keys that transformers 4 takes for Phi-3; the others go to the top of `values`."""
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if key in scaling:
            values[key] = scaling[key]
    if scaling.get("rope_type", "default") == "default":
        return {}
    return {"type": scaling["rope_type"]} | {key: scaling[key] for key in ("short_factor", "long_factor")}


def tokenizer_config(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json in the older words, which every release reads."""
    values = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values.setdefault("additional_special_tokens", values.pop("extra_special_tokens"))
    return values

"""What an export says twice, so that releases of transformers older and newer than its source read the same from it.

transformers 5 gathered RoPE in `rope_parameters`, renamed `torch_dtype`, and writes class names that transformers 4
does not know; what transformers 4 does not find it takes from defaults, without a word. Both read the older keys.
"""

from typing import Any

from msd_jax.models.config import FULL, SLIDING


def config_json(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the older keys beside the newer ones."""
    values = dict(values)
    if dtype := values.get("dtype") or values.get("torch_dtype"):
        values |= {"dtype": dtype, "torch_dtype": dtype}
    parameters = values.get("rope_parameters") or {}
    whole, local = parameters.get(FULL, parameters), parameters.get(SLIDING) or {}
    if "rope_theta" in whole:
        values["rope_theta"] = whole["rope_theta"]
    if "rope_theta" in local:
        values["rope_local_base_freq"] = local["rope_theta"]
    if whole:
        scaling = {key: value for key, value in whole.items() if key != "rope_theta"}
        values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return values


def tokenizer_config(values: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json in the older words, which every release reads."""
    values = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values.setdefault("additional_special_tokens", values.pop("extra_special_tokens"))
    return values

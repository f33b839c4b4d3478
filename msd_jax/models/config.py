"""config.json of a Hugging Face model -> DecoderConfig, in which every difference between families is data."""

import dataclasses
import json
import pathlib
from typing import Any

from msd_jax.errors import UserError, UserFileError
from msd_jax.models import config_checks, rope
from msd_jax.models.rope import FULL, SLIDING, Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer: sizes, and the differences between families as data.

    Attributes:
      vocab_size, width, layers, heads, kv_heads, head_dim, ffw: V, D, L, N, K, H, F.
      norm_eps: epsilon of every norm.
      norm_offset: norms multiply by (norm_offset + weight): 1 for Gemma, else 0.
      layer_norm: norms subtract the mean: LayerNorm without a bias instead of RMSNorm (Cohere).
      activation: "silu" (SwiGLU), "gelu_tanh" (GeGLU), or "xielu", which has parameters and no gate (Apertus).
      tied_embeddings: the head is the transposed embedding.
      embed_scale: factor on the embeddings: sqrt(D) for Gemma.
      residual_scale: factor on what attention and feed-forward add to the residual stream (Granite).
      logit_scale: factor on the logits (Cohere, Granite).
      qkv_bias: biases on the query, key and value projections (Qwen2).
      qk_norm: a norm of query and key before RoPE: over each head, all heads with one weight ("head": Qwen3, Gemma 3,
        Apertus), over each head with its own ("each head": Command R+), over all heads together ("all heads": OLMo), or
        none ("").
      pre_norms: normalise the inputs of attention and feed-forward (all but OLMo).
      post_norms: normalise the outputs of attention and feed-forward (Gemma, OLMo).
      parallel: attention and feed-forward see the same normalised input, and are added together (Cohere).
      query_scale: factor on the attention logits.
      attention_softcap, logit_softcap: cap * tanh(x / cap) on attention and final logits (Gemma 2), or None.
      windows: for each layer the number of most recent tokens that it attends to, None for all.
      ropes: for each layer its Rope.
      rope_interleaved: RoPE rotates neighbours in a head, not its two halves (Cohere).
      longest: the most tokens that a sequence may have, None for any number.
      fused: files hold query, key and value as one tensor, and gate and up (Phi-3).
      wrapped: files hold the decoder as part of a larger model (Gemma 3 with its image encoder).
      initializer_range: standard deviation of a new model's weights.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffw: int
    norm_eps: float
    query_scale: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    norm_offset: float = 0.0
    layer_norm: bool = False
    activation: str = "silu"
    tied_embeddings: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    qkv_bias: bool = False
    qk_norm: str = ""
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    rope_interleaved: bool = False
    longest: int | None = None
    fused: bool = False
    wrapped: bool = False
    initializer_range: float = 0.02


_GEMMA = {"norm_offset": 1.0, "post_norms": True}
_COHERE = {"layer_norm": True, "parallel": True, "rope_interleaved": True}
_OLMO = {"qk_norm": "all heads", "pre_norms": False, "post_norms": True}
# What each family has by architecture, whatever else its config.json says.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {"qk_norm": "head"},
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"qk_norm": "head"},
    "granite": {},
    "llama": {},
    "mistral": {},
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi3": {"fused": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "smollm3": {},
}
WRAPPERS = {"gemma3": "gemma3_text"}  # models of several parts, and the family of the part that is trained
SUPPORTED = tuple(sorted([*FAMILIES, *WRAPPERS]))

# Keys of config.json that files of a family leave out where they have these values.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "apertus": {"hidden_act": "xielu", "rms_norm_eps": 1e-5, "rope_theta": 12_000_000.0},
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.0625, "layer_norm_eps": 1e-5},
    "cohere2": {
        **{"tie_word_embeddings": True, "logit_scale": 0.0625, "layer_norm_eps": 1e-5},
        **{"sliding_window": 4096, "sliding_window_pattern": 4},
    },
    "gemma2": {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {
        **{"vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
        **{"sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1_000_000.0},
        **{"max_position_embeddings": 131_072, "tie_word_embeddings": True},
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "olmo3": {"rope_theta": 500_000.0, "sliding_window": 4096, "sliding_window_pattern": 4},
    "phi3": {"rms_norm_eps": 1e-5},
    "smollm3": {"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "no_rope_layer_interval": 4}
    | {"use_sliding_window": False},
}


def read(directory: pathlib.Path) -> DecoderConfig:
    """Reads DIRECTORY/config.json.

    Raises:
      UserError: the file is missing or broken, or asks for something that the decoder does not implement.
    """
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        raise UserFileError(f"{path} is missing: {directory} is not a Hugging Face model directory")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers of too many digits, and nests of lists, among them
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}")
    try:
        return from_dict(values)
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def from_dict(values: dict[str, Any]) -> DecoderConfig:
    """DecoderConfig from the contents of a config.json.

    Raises:
      UserError: the configuration asks for something that the decoder does not implement; the message names it.
      KeyError: a key without a default is missing.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in SUPPORTED:
        raise UserError(f"model_type {family!r} is not supported{config_checks.nearest(values, SUPPORTED)}")
    if family in WRAPPERS:
        return _from_wrapper(values, WRAPPERS[family])
    values = _DEFAULTS.get(family, {}) | values
    config_checks.check_values(values)
    config_checks.refuse_unimplemented(values)
    gemma = family.startswith("gemma")
    layers, width, heads = values["num_hidden_layers"], values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim") or width // heads
    kv_heads = values.get("num_key_value_heads") or heads
    if heads % kv_heads or head_dim % 2 or not head_dim:
        raise UserError(
            f"num_attention_heads={heads}, num_key_value_heads={kv_heads}, head size {head_dim}: the first must be "
            "a multiple of the second, and the head size even"
        )
    kinds = _layer_kinds(values)
    ropes = {kind: rope.read(values, kind, head_dim) for kind in kinds}
    slides = values.get("use_sliding_window") is not False
    windows = {FULL: None, SLIDING: (values.get("sliding_window") or None) if slides else None}
    qk_norm = {"qk_norm": "each head"} if family == "cohere" and values.get("use_qk_norm") else {}
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffw=values["intermediate_size"],
        norm_eps=values.get("layer_norm_eps" if family.startswith("cohere") else "rms_norm_eps", 1e-6),
        windows=tuple(windows[kind] for kind in kinds),
        ropes=tuple(
            ropes[kind] if sees else Rope(ropes[kind].theta, "none") for kind, sees in zip(kinds, _seen(values, kinds))
        ),
        activation=config_checks.activation(values),
        tied_embeddings=values.get("tie_word_embeddings", False),
        attention_softcap=values.get("attn_logit_softcapping") if gemma else None,
        logit_softcap=values.get("final_logit_softcapping") if gemma else None,
        longest=next((int(r.original_positions) for r in ropes.values() if r.rope_type == "longrope"), None),
        initializer_range=float(values.get("initializer_range", 0.02)),
        **_scales(values, width, head_dim),
        **FAMILIES[family] | qk_norm,
    )


def _scales(values: dict[str, Any], width: int, head_dim: int) -> dict[str, Any]:
    """The factors of DecoderConfig that are not its defaults."""
    family = values["model_type"]
    if family.startswith("gemma"):
        return {"query_scale": values.get("query_pre_attn_scalar", head_dim) ** -0.5, "embed_scale": width**0.5}
    if family.startswith("cohere"):
        return {"query_scale": head_dim**-0.5, "logit_scale": float(values["logit_scale"])}
    if family == "granite":
        return {
            "query_scale": float(values.get("attention_multiplier", 1.0)),
            "embed_scale": float(values.get("embedding_multiplier", 1.0)),
            "residual_scale": float(values.get("residual_multiplier", 1.0)),
            "logit_scale": 1.0 / values.get("logits_scaling", 1.0),
        }
    return {"query_scale": head_dim**-0.5}


def _from_wrapper(values: dict[str, Any], family: str) -> DecoderConfig:
    """The decoder of a model that holds others beside it, from its `text_config`."""
    text = values["text_config"]
    if not isinstance(text, dict) or text.get("model_type", family) != family:
        raise UserError(f"text_config={str(text)[:60]} must be an object with model_type {family!r}")
    config_checks.refuse_unimplemented({key: value for key, value in values.items() if key != "vision_config"})
    tied = {"tie_word_embeddings": values["tie_word_embeddings"]} if "tie_word_embeddings" in values else {}
    return dataclasses.replace(from_dict(text | {"model_type": family} | tied), wrapped=True)


def _layer_kinds(values: dict[str, Any]) -> tuple[str, ...]:
    """FULL or SLIDING for each layer."""
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if _is_sliding(values, layer) else FULL for layer in range(layers)]
    if len(kinds) != layers:
        raise UserError(f"layer_types names {len(kinds)} layers, num_hidden_layers says {layers}")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise UserError(f"layer_types holds {kind!r}, which is not implemented (only {FULL!r} and {SLIDING!r})")
    return tuple(kinds)


def _is_sliding(values: dict[str, Any], layer: int) -> bool:
    """Whether a layer attends to a window, in the files of families that did not yet write layer_types."""
    if not values.get("sliding_window") or values.get("use_sliding_window") is False:
        return False
    family = values["model_type"]
    if family in ("gemma3_text", "cohere2", "olmo3"):
        return (layer + 1) % values["sliding_window_pattern"] != 0
    if family == "gemma2":
        return layer % 2 == 0
    if family in ("qwen2", "qwen3"):
        return layer >= values.get("max_window_layers", 28)
    if family == "smollm3":
        return not _rotated(values, layer)
    return True


def _seen(values: dict[str, Any], kinds: tuple[str, ...]) -> list[bool]:
    """Whether each layer sees positions."""
    if values["model_type"] == "cohere2":
        return [kind == SLIDING and bool(values.get("sliding_window")) for kind in kinds]
    return [values["model_type"] != "smollm3" or _rotated(values, layer) for layer in range(len(kinds))]


def _rotated(values: dict[str, Any], layer: int) -> bool:
    """Whether a layer of SmolLM3 sees positions; its no_rope_layers holds 1 where they do."""
    flags = values.get("no_rope_layers")
    return bool(flags[layer]) if flags else (layer + 1) % values["no_rope_layer_interval"] != 0

"""config.json of a Hugging Face model -> DecoderConfig, in which every difference between families is data."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from msd_jax.errors import UserError, UserFileError

SUPPORTED = ("gemma2", "gemma3_text", "llama", "mistral", "olmo2", "qwen2", "qwen3")
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as config.json names them


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
      theta: base of the geometric series of wavelengths.
      rope_type: how frequencies are scaled for longer contexts: "default" (not at all), "linear", "llama3" or "yarn".
      factor: of the scaling.
      original_positions: the context that the model was trained on before scaling (llama3, yarn).
      low_freq_factor, high_freq_factor: of llama3.
      beta_fast, beta_slow: of yarn.
      attention_factor: of yarn, on cos and sin; None: 0.1 log(factor) + 1.
    """

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_positions: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians per position, float32 [H/2], and the factor on cos and sin.

        The formulas are those of `transformers.modeling_rope_utils` and of the papers named there.
        """
        plain = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.rope_type == "default":
            return plain.astype(np.float32), 1.0
        if self.rope_type == "linear":
            return (plain / self.factor).astype(np.float32), 1.0
        kept = self._kept_by_llama3(plain) if self.rope_type == "llama3" else self._kept_by_yarn(head_dim)
        scaled = (kept * plain + (1 - kept) * plain / self.factor).astype(np.float32)
        if self.rope_type == "llama3":
            return scaled, 1.0
        return scaled, 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def _kept_by_llama3(self, frequencies: np.ndarray) -> np.ndarray:
        """The share of each frequency that is not scaled.

        0 where the wavelength exceeds original/low, 1 where it is below original/high, and linear between.
        """
        low, high = self.low_freq_factor, self.high_freq_factor
        return np.clip((self.original_positions * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)

    def _kept_by_yarn(self, head_dim: int) -> np.ndarray:
        """The share of each frequency that is not scaled, by how often it rotates within the original context."""

        def dimension(rotations: float) -> float:
            wavelength = self.original_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        first = max(math.floor(dimension(self.beta_fast)), 0)
        last = min(math.ceil(dimension(self.beta_slow)), head_dim - 1)
        return 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer: sizes, and the differences between families as data.

    Attributes:
      vocab_size, width, layers, heads, kv_heads, head_dim, ffw: V, D, L, N, K, H, F.
      norm_eps: epsilon of every RMSNorm.
      norm_offset: RMSNorm multiplies by (norm_offset + weight): 1 for Gemma, else 0.
      activation: "silu" (SwiGLU) or "gelu_tanh" (GeGLU).
      tied_embeddings: the head is the transposed embedding.
      embed_scale: factor on the embeddings: sqrt(D) for Gemma.
      qkv_bias: biases on the query, key and value projections (Qwen2).
      qk_norm: RMSNorm over each head of query and key before RoPE (Qwen3, Gemma 3, OLMo 2).
      qk_norm_over_heads: that norm is over all heads together (OLMo 2).
      pre_norms: normalise the inputs of attention and feed-forward (all but OLMo 2).
      post_norms: normalise the outputs of attention and feed-forward (Gemma, OLMo 2).
      query_scale: factor on the attention logits.
      attention_softcap, logit_softcap: cap * tanh(x / cap) on attention and final logits (Gemma 2), or None.
      windows: for each layer the number of most recent tokens that it attends to, None for all.
      ropes: for each layer its Rope.
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
    activation: str = "silu"
    tied_embeddings: bool = False
    embed_scale: float = 1.0
    qkv_bias: bool = False
    qk_norm: bool = False
    qk_norm_over_heads: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    initializer_range: float = 0.02


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
        raise UserError(f"model_type {family!r} is not supported{_nearest(family)}")
    _check_values(values)
    _refuse_unimplemented(values)
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
    scale = values.get("query_pre_attn_scalar", head_dim) if gemma else head_dim
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffw=values["intermediate_size"],
        norm_eps=values.get("rms_norm_eps", 1e-6),
        query_scale=scale**-0.5,
        windows=tuple(values.get("sliding_window") or None if kind == SLIDING else None for kind in kinds),
        ropes=tuple(_rope(values, kind) for kind in kinds),
        norm_offset=1.0 if gemma else 0.0,
        activation=_ACTIVATIONS[_activation(values)],
        tied_embeddings=values.get("tie_word_embeddings", gemma),
        embed_scale=width**0.5 if gemma else 1.0,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3_text", "olmo2"),
        qk_norm_over_heads=family == "olmo2",
        pre_norms=family != "olmo2",
        post_norms=gemma or family == "olmo2",
        attention_softcap=values.get("attn_logit_softcapping") if gemma else None,
        logit_softcap=values.get("final_logit_softcapping") if gemma else None,
        initializer_range=float(values.get("initializer_range", 0.02)),
    )


# Families that are asked for, the supported one that is nearest, and what they have beside it.
_NEAREST = {
    "apertus": ("llama", "another activation (xIELU) and norms of queries and keys"),
    "cohere": ("llama", "attention and feed-forward side by side, LayerNorm and a scale on the logits"),
    "cohere2": ("mistral", "attention and feed-forward side by side, LayerNorm and layers without RoPE"),
    "exaone4": ("qwen3", "norms behind the sublayers and layers without RoPE"),
    "gemma": ("gemma2", "no norms behind the sublayers and no soft caps"),
    "gemma3": ("gemma3_text", "an image encoder; its text model alone, exported as gemma3_text, is supported"),
    "gemma3n": ("gemma3_text", "embeddings for each layer, and encoders"),
    "granite": ("llama", "factors on embeddings, residuals, attention and logits"),
    "llama4": ("llama", "experts, layers without RoPE, and an image encoder"),
    "mistral3": ("mistral", "an image encoder"),
    "mixtral": ("mistral", "experts"),
    "olmo": ("llama", "LayerNorm without weights"),
    "olmo3": ("olmo2", "windows in three of four layers"),
    "phi3": ("mistral", "projections that are stored as one"),
    "qwen2_moe": ("qwen2", "experts"),
    "qwen3_moe": ("qwen3", "experts"),
    "smollm3": ("llama", "layers without RoPE"),
}


def _nearest(family: Any) -> str:
    supported = f"supported are {', '.join(SUPPORTED)}"
    if not isinstance(family, str) or family not in _NEAREST:
        return f"; {supported}"
    nearest, more = _NEAREST[family]
    return f": the nearest that is, {nearest!r}, lacks what it has: {more} ({supported})"


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
}
_POSITIVE = (
    *("rms_norm_eps", "initializer_range", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_ROPE_NUMBERS = (
    *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "attention_factor", "partial_rotary_factor"),
)
_FLAGS = ("tie_word_embeddings", "use_sliding_window", "attention_bias")
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", *_POSITIVE[5:])


def _check_values(values: dict[str, Any]) -> None:
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
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _refuse_unimplemented(values: dict[str, Any]) -> None:
    for key, implemented in _ONLY.items():
        if values.get(key) and values[key] != implemented:
            raise UserError(f"{key}={values[key]!r} is not implemented (only {implemented!r})")
    for key in values:
        if "expert" in key and values[key]:
            raise UserError(f"{key}={values[key]!r}: mixture-of-experts models are not implemented")
    if not isinstance(_activation(values), str) or _activation(values) not in _ACTIVATIONS:
        raise UserError(f"hidden_act={_activation(values)!r} is not implemented (only {', '.join(_ACTIVATIONS)})")


def _activation(values: dict[str, Any]) -> str:
    return values.get("hidden_activation") or values.get("hidden_act") or "silu"


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
    if family == "gemma3_text":
        return (layer + 1) % values.get("sliding_window_pattern", 6) != 0
    if family == "gemma2":
        return layer % 2 == 0
    if family in ("qwen2", "qwen3"):
        return layer >= values.get("max_window_layers", 28)
    return True


# Parameters of each type of scaling, and whether it needs them.
_ROPE_PARAMETERS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True},
    "yarn": {"factor": True, "beta_fast": False, "beta_slow": False, "attention_factor": False},
}


def _rope(values: dict[str, Any], kind: str) -> Rope:
    """The Rope of one kind of layer."""
    theta, parameters = _rope_parameters(values, kind)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in _ROPE_PARAMETERS:
        raise UserError(f"rope_type {rope_type!r} is not implemented (only {', '.join(_ROPE_PARAMETERS)})")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial_rotary_factor other than 1.0 is not implemented")
    for key in ("mscale", "mscale_all_dim"):
        if parameters.get(key):
            raise UserError(f"the rope parameter {key} is not implemented")
    if parameters.get("truncate") is False:
        raise UserError("the rope parameter truncate=False is not implemented")
    if not theta > 1:
        raise UserError(f"rope_theta={theta!r} must be greater than 1")
    known = {key: parameters[key] for key in _ROPE_PARAMETERS[rope_type] if parameters.get(key) is not None}
    for key, needed in _ROPE_PARAMETERS[rope_type].items():
        if needed and key not in known:
            raise UserError(f"rope_type {rope_type!r} needs the rope parameter {key!r}, which is missing")
    if rope_type in ("llama3", "yarn"):
        original = parameters.get("original_max_position_embeddings")
        known["original_positions"] = values["max_position_embeddings"] if original is None else original
    if rope_type == "llama3" and not known["high_freq_factor"] > known["low_freq_factor"]:
        raise UserError("the rope parameter high_freq_factor must be greater than low_freq_factor")
    return Rope(theta=float(theta), rope_type=rope_type, **known)


def _rope_parameters(values: dict[str, Any], kind: str) -> tuple[float, dict[str, Any]]:
    """(theta, parameters of the scaling), from the layout of transformers 5, rope_parameters, or the older one."""
    theta, parameters = values.get("rope_theta", 10_000.0), values.get("rope_parameters")
    if parameters is not None:
        parameters = parameters.get(kind, parameters)
        return parameters.get("rope_theta", theta), parameters
    if values["model_type"] == "gemma3_text" and kind == SLIDING:
        return values.get("rope_local_base_freq", 10_000.0), {}
    return theta, values.get("rope_scaling") or {}

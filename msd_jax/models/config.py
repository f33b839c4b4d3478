"""config.json of a Hugging Face model -> DecoderConfig, in which every difference between families is data."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from msd_jax.errors import UserError, UserFileError

SUPPORTED = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
      theta: base of the geometric series of wavelengths.
      scaling: parameters of the scaling, `rope_type` among them, as sorted pairs (hashable); empty for none.
    """

    theta: float
    scaling: tuple[tuple[str, float | str], ...] = ()

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians per position, float32 [H/2], and the factor on cos and sin (YaRN's attention factor, else 1).

        The formulas are those of `transformers.modeling_rope_utils` and of the papers named there.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        frequencies = self.theta**-exponents
        scaling = dict(self.scaling)
        kind = scaling.get("rope_type", "default")
        if kind == "default":
            return frequencies.astype(np.float32), 1.0
        factor = scaling["factor"]
        if kind == "linear":
            return (frequencies / factor).astype(np.float32), 1.0
        original = scaling["original_max_position_embeddings"]
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            # 0 where the wavelength exceeds original/low, 1 where it is below original/high, linear between.
            keep = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
            return (keep * frequencies + (1 - keep) * frequencies / factor).astype(np.float32), 1.0
        assert kind == "yarn", kind  # read() admits no other

        def dimension(rotations: float) -> float:
            return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        first = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
        last = min(math.ceil(dimension(scaling.get("beta_slow", 1))), head_dim - 1)
        ramp = (np.arange(head_dim // 2) - first) / max(last - first, 1e-3)
        keep = 1 - np.clip(ramp, 0, 1)
        attention_factor = scaling.get("attention_factor") or 0.1 * math.log(factor) + 1.0
        return (keep * frequencies + (1 - keep) * frequencies / factor).astype(np.float32), attention_factor


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
      qk_norm: RMSNorm over each head of query and key before RoPE (Qwen3, Gemma 3).
      sandwich_norms: also normalise the outputs of attention and feed-forward (Gemma).
      query_scale: factor on the attention logits.
      attention_softcap, logit_softcap: cap * tanh(x / cap) on attention and final logits (Gemma 2), or None.
      windows: for each layer the number of most recent positions that it attends to, 0 for all.
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
    windows: tuple[int, ...]
    ropes: tuple[Rope, ...]
    norm_offset: float = 0.0
    activation: str = "silu"
    tied_embeddings: bool = False
    embed_scale: float = 1.0
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    initializer_range: float = 0.02


def read(directory: pathlib.Path) -> DecoderConfig:
    """Reads DIRECTORY/config.json; raises one clear error for what is missing or not implemented."""
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
      UserError: the configuration asks for something that the decoder does not implement; it is named.
      KeyError: a key without a default is missing.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in SUPPORTED:
        raise UserError(f"model_type {family!r} is not supported; supported are {', '.join(SUPPORTED)}")
    _check_values(values)
    gemma = family.startswith("gemma")
    for key, harmless in _ONLY.items():
        if (values.get(key) or harmless) != harmless:
            raise UserError(f"{key}={values[key]!r} is not implemented (only {harmless!r})")
    for key in values:
        if "expert" in key and values[key]:
            raise UserError(f"{key}={values[key]!r}: mixture-of-experts models are not implemented")
    # Qwen2 has its biases by architecture; elsewhere `attention_bias` would put one on the output as well.
    if values.get("attention_bias"):
        raise UserError("attention_bias=True is not implemented")

    activation = values.get("hidden_activation") or values.get("hidden_act") or "silu"
    activations = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if not isinstance(activation, str) or activation not in activations:
        raise UserError(f"hidden_act={activation!r} is not implemented (only {', '.join(activations)})")

    layers, width, heads = values["num_hidden_layers"], values["hidden_size"], values["num_attention_heads"]
    head_dim = values.get("head_dim") or width // heads
    kv_heads = values.get("num_key_value_heads") or heads
    if heads % kv_heads or head_dim % 2 or not head_dim:
        raise UserError(
            f"num_attention_heads={heads}, num_key_value_heads={kv_heads}, head size {head_dim}: the first must be "
            "a multiple of the second, and the head size even"
        )
    kinds = _layer_kinds(values)
    window = values.get("sliding_window") or 0
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
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        ropes=tuple(_rope(values, kind) for kind in kinds),
        norm_offset=1.0 if gemma else 0.0,
        activation=activations[activation],
        tied_embeddings=values.get("tie_word_embeddings", gemma),
        embed_scale=width**0.5 if gemma else 1.0,
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3_text"),
        sandwich_norms=gemma,
        attention_softcap=values.get("attn_logit_softcapping") if gemma else None,
        logit_softcap=values.get("final_logit_softcapping") if gemma else None,
        initializer_range=float(values.get("initializer_range", 0.02)),
    )


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
        for kind in ("full_attention", "sliding_attention"):
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


# Keys whose other values the decoder does not implement.
_ONLY = {
    "mlp_bias": False,
    "quantization_config": None,
    "vision_config": None,
    "partial_rotary_factor": 1.0,
    "use_bidirectional_attention": False,
}


def _layer_kinds(values: dict[str, Any]) -> tuple[str, ...]:
    """ "full_attention" or "sliding_attention" for each layer."""
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if kinds is None:
        if not values.get("sliding_window") or values.get("use_sliding_window") is False:
            kinds = ["full_attention"] * layers
        elif values["model_type"] == "gemma3_text":
            pattern = values.get("sliding_window_pattern", 6)
            kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
        elif values["model_type"] == "gemma2":
            kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
        elif values["model_type"] in ("qwen2", "qwen3"):
            first = values.get("max_window_layers", 28)
            kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        else:
            kinds = ["sliding_attention"] * layers
    if len(kinds) != layers:
        raise UserError(f"layer_types names {len(kinds)} layers, num_hidden_layers says {layers}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"layer_types holds {kind!r}, which is not implemented")
    return tuple(kinds)


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


def _rope(values: dict[str, Any], kind: str) -> Rope:
    """The Rope of one kind of layer, from the layout of transformers 5 (rope_parameters) or the older one."""
    parameters = values.get("rope_parameters")
    if parameters is None:
        theta = values.get("rope_theta", 10_000.0)
        parameters = dict(values.get("rope_scaling") or {})
        if values["model_type"] == "gemma3_text" and kind == "sliding_attention":
            theta, parameters = values.get("rope_local_base_freq", 10_000.0), {}
    else:
        parameters = dict(parameters.get(kind, parameters))
        theta = parameters.get("rope_theta", values.get("rope_theta", 10_000.0))
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in _ROPE_KEYS:
        raise UserError(f"rope_type {rope_type!r} is not implemented (only {', '.join(_ROPE_KEYS)})")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial_rotary_factor other than 1.0 is not implemented")
    for key in ("mscale", "mscale_all_dim"):
        if parameters.get(key):
            raise UserError(f"the rope parameter {key} is not implemented")
    if parameters.get("truncate") is False:
        raise UserError("the rope parameter truncate=False is not implemented")
    if not theta > 1:
        raise UserError(f"rope_theta={theta!r} must be greater than 1")
    scaling: dict[str, float | str] = {}
    if rope_type != "default":
        scaling["rope_type"] = rope_type
        if rope_type in ("llama3", "yarn"):
            parameters.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        for key in _ROPE_KEYS[rope_type]:
            if parameters.get(key) is not None:
                scaling[key] = parameters[key]
            elif key not in ("beta_fast", "beta_slow", "attention_factor"):
                raise KeyError(f"rope parameter {key}")
    if rope_type == "llama3" and not parameters["high_freq_factor"] > parameters["low_freq_factor"]:
        raise UserError("the rope parameter high_freq_factor must be greater than low_freq_factor")
    return Rope(theta=float(theta), scaling=tuple(sorted(scaling.items())))

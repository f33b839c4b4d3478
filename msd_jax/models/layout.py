"""How a Hugging Face directory stores the parameters of a decoder: names, shapes, and what it holds beside them."""

import collections
import math
import re
from typing import NamedTuple

from msd_jax.models import decoder
from msd_jax.models.config import DecoderConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
GROUPS = re.compile(r"\(([^)]*)\)|(\w)")  # of one side of an einops pattern


class Stored(NamedTuple):
    """Where a parameter is.

    Attributes:
      tensor: its tensor's name, with {} for the layer if it is a parameter of the layers.
      pattern: einops pattern from tensor to parameter, of one layer.
      row: the tensor's first row that is the parameter's; 0 but for tensors that several parameters share.
    """

    tensor: str
    pattern: str
    row: int = 0


def layout(config: DecoderConfig) -> dict[str, Stored]:
    """Parameter name -> where it is."""
    table = {
        "embedding": Stored(EMBEDDING, "v d -> v d"),
        "final_norm": Stored("model.norm.weight", "d -> d"),
        "layers.attention_norm": Stored("input_layernorm.weight", "d -> d"),
        "layers.query": Stored("self_attn.q_proj.weight", "(n h) d -> d n h"),
        "layers.key": Stored("self_attn.k_proj.weight", "(n h) d -> d n h"),
        "layers.value": Stored("self_attn.v_proj.weight", "(n h) d -> d n h"),
        "layers.output": Stored("self_attn.o_proj.weight", "d (n h) -> n h d"),
        "layers.ffw_norm": Stored("post_attention_layernorm.weight", "d -> d"),
        "layers.gate": Stored("mlp.gate_proj.weight", "f d -> d f"),
        "layers.up": Stored("mlp.up_proj.weight", "f d -> d f"),
        "layers.down": Stored("mlp.down_proj.weight", "d f -> f d"),
    }
    if not config.tied_embeddings:
        table["head"] = Stored(HEAD, "v d -> d v")
    if config.qkv_bias:
        table["layers.query_bias"] = Stored("self_attn.q_proj.bias", "(n h) -> n h")
        table["layers.key_bias"] = Stored("self_attn.k_proj.bias", "(n h) -> n h")
        table["layers.value_bias"] = Stored("self_attn.v_proj.bias", "(n h) -> n h")
    if config.qk_norm:
        pattern = {"head": "h -> h", "each head": "n h -> n h", "all heads": "(n h) -> n h"}[config.qk_norm]
        table["layers.query_norm"] = Stored("self_attn.q_norm.weight", pattern)
        table["layers.key_norm"] = Stored("self_attn.k_norm.weight", pattern)
    if config.post_norms:
        table["layers.post_attention_norm"] = Stored("post_attention_layernorm.weight", "d -> d")
        table["layers.ffw_norm"] = Stored("pre_feedforward_layernorm.weight", "d -> d")
        table["layers.post_ffw_norm"] = Stored("post_feedforward_layernorm.weight", "d -> d")
    if config.activation == "xielu":
        table["layers.attention_norm"] = Stored("attention_layernorm.weight", "d -> d")
        table["layers.ffw_norm"] = Stored("feedforward_layernorm.weight", "d -> d")
        table["layers.positive_alpha"] = Stored("mlp.act_fn.alpha_p", "o -> o")
        table["layers.negative_alpha"] = Stored("mlp.act_fn.alpha_n", "o -> o")
        del table["layers.gate"]
    if config.fused:
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        for name, row in {"query": 0, "key": query, "value": query + key}.items():
            table[f"layers.{name}"] = Stored("self_attn.qkv_proj.weight", "(n h) d -> d n h", row)
        for name, row in {"gate": 0, "up": config.ffw}.items():
            table[f"layers.{name}"] = Stored("mlp.gate_up_proj.weight", "f d -> d f", row)
    if not config.pre_norms:
        del table["layers.attention_norm"]
    if not config.pre_norms or config.parallel:
        del table["layers.ffw_norm"]
    return {
        name: stored._replace(tensor=f"model.layers.{{}}.{stored.tensor}") if name.startswith("layers.") else stored
        for name, stored in table.items()
    }


def shared(config: DecoderConfig) -> dict[str, list[str]]:
    """Tensor name -> the parameters in it, in the order of their rows."""
    parameters = collections.defaultdict(list)
    for name, stored in sorted(layout(config).items(), key=lambda item: item[1].row):
        parameters[stored.tensor].append(name)
    return parameters


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the config asks for, by its name without {}."""
    _, abstract, _ = decoder.abstract(config)
    flat, table = dict(decoder.flat(abstract)), layout(config)
    found: dict[str, tuple[int, ...]] = {}
    for tensor, names in shared(config).items():
        stacked = "{}" in tensor
        parts = [_shape(table[name].pattern, flat[name].shape[1 if stacked else 0 :]) for name in names]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        found |= {tensor.format(layer): shape for layer in range(config.layers if stacked else 1)}
    return found


def _shape(pattern: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the tensor of which an einops pattern makes a parameter of `shape`."""
    left, right = pattern.split("->")
    sizes = dict(zip(right.split(), shape))
    groups = [(group or single).split() for group, single in GROUPS.findall(left)]
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)


# A model of several parts has its decoder under either name: files of the hub, and those of some releases.
_PREFIXES = re.compile(r"^(language_model\.model|model\.language_model)\.")


def in_file(name: str) -> str:
    """The name that `layout` has for a tensor of a file; a model of several parts prefixes those of its decoder."""
    return _PREFIXES.sub("model.", name).replace("language_model.lm_head.", "lm_head.")


def new_name(tensor: str, config: DecoderConfig) -> str:
    """The name in a new file of a tensor that `layout` names: of a model of several parts, that of the hub's files."""
    return f"language_model.{tensor}" if config.wrapped else tensor


_OTHER_PARTS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_CONSTANTS = re.compile(r"\.mlp\.act_fn\.(beta|eps)$")  # of xIELU


def is_carried(tensor: str, config: DecoderConfig) -> bool:
    """Whether the decoder does without a tensor, and an export has it as the source does."""
    if config.activation == "xielu" and _CONSTANTS.search(tensor):
        return True
    return config.wrapped and bool(_OTHER_PARTS.match(tensor))


_NEW_VISION = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")  # of transformers 5


def carried_name(tensor: str, config: DecoderConfig) -> str:
    """The name in a new file of a tensor that is carried: of an image encoder the hub's, which all releases read."""
    return _NEW_VISION.sub(r"\1vision_model.", tensor) if config.wrapped else tensor


def is_derived(tensor: str, config: DecoderConfig) -> bool:
    """Whether a tensor follows from others: a tied head and rotary tables are sometimes stored."""
    return tensor.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and tensor == HEAD)

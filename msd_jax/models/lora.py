"""Low-rank adapters beside the stacked matrices of the layers: what they are, merging, and PEFT's file layout.

The adapter of the matrix `query` is two parameters, `query_lora_a` (A) and `query_lora_b` (B).
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

SUFFIX_A, SUFFIX_B = "_lora_a", "_lora_b"
ADAPTABLE = ("query", "key", "value", "output", "gate", "up", "down")  # matrices of a layer


@dataclasses.dataclass(frozen=True)
class Lora:
    """A matrix W acts as W + (alpha / rank) A B (Hu et al., 2021, arXiv 2106.09685, section 4.1).

    Attributes:
      rank: of A [inputs, rank] and B [rank, outputs]; B starts at zero, so that a new adapter changes nothing.
      alpha: scale of the update.
      targets: adapted matrices of every layer, among ADAPTABLE.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((SUFFIX_A, SUFFIX_B))


def init_bound(inputs: Iterable[int]) -> float:
    """The bound of a new, uniform A, from the sizes of W's input axes: PEFT's default, Kaiming's with a = sqrt 5."""
    return math.prod(inputs) ** -0.5


def merge(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + scale A B of one layer, in float32; W itself, to the sign of its zeros, where the adapter adds nothing."""
    weight, a, b = (x.astype(jnp.float32) for x in (weight, a, b))
    update = scale * jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(update == 0, weight, weight + update)


def write_peft(directory: pathlib.Path, params: dict[str, Any], lora: Lora, layout: dict[str, Any], base: str) -> None:
    """Writes the adapters as PEFT does: adapter_model.safetensors and adapter_config.json.

    Args:
      directory: exists.
      params: holds the adapters; everything else in it is ignored.
      lora: their settings.
      layout: weights.layout of the model.
      base: the base model, as adapter_config.json names it.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    modules = {target: layout[f"layers.{target}"][0].removesuffix(".weight") for target in lora.targets}
    tensors = {}
    for target, module in modules.items():
        suffixes = (SUFFIX_A, SUFFIX_B)
        a_L, b_L = (np.asarray(jax.device_get(flat[f"layers.{target}{s}"]), dtype=np.float32) for s in suffixes)
        for layer, (a, b) in enumerate(zip(a_L, b_L)):
            name = f"base_model.model.{module.format(layer)}"
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
    file = directory / "adapter_model.safetensors"
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files that only their owner may read
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(module.rpartition(".")[2] for module in modules.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

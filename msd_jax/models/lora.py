"""Low-rank adapters beside the stacked matrices of the layers: what they are, merging, and PEFT's file layout."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

# Suffixes of an adapter's two matrices, behind the name of the matrix that it adapts.
A, B = "_lora_a", "_lora_b"
# Adaptable matrices and how many of their axes (behind the layers' axis) are inputs.
INPUTS = {"query": 1, "key": 1, "value": 1, "output": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class Lora:
    """A matrix W acts as W + (alpha / rank) A B (Hu et al., 2021, arXiv 2106.09685, section 4.1).

    Attributes:
      rank: of A [inputs, rank] and B [rank, outputs]; B starts at zero, so that a new adapter changes nothing.
      alpha: scale of the update.
      targets: adapted matrices of every layer, among INPUTS.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_adapter(name: str) -> bool:
    return name.endswith((A, B))


def merge(params: dict[str, Any], lora: Lora, dtype: Any) -> dict[str, Any]:
    """The same function without adapters: params with W + scale A B, computed in float32, in `dtype`."""

    @jax.jit
    def merged(params):
        flat = traverse_util.flatten_dict(params, sep=".")
        out = {name: value for name, value in flat.items() if not is_adapter(name)}
        for target in (f"layers.{name}" for name in lora.targets):
            a, b = (flat[target + suffix].astype(jnp.float32) for suffix in (A, B))
            update = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)
            out[target] = out[target].astype(jnp.float32) + lora.scale * update
        return traverse_util.unflatten_dict({name: value.astype(dtype) for name, value in out.items()}, sep=".")

    return merged(params)


def write(directory: pathlib.Path, params: dict[str, Any], lora: Lora, layout: dict[str, Any], base: str) -> None:
    """Writes the adapters as PEFT does: adapter_model.safetensors and adapter_config.json.

    Args:
      directory: exists.
      params: holds the adapters; everything else in it is ignored.
      lora: their settings.
      layout: weights.layout of the model.
      base: hub id or directory of the base model, noted in adapter_config.json.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    tensors = {}
    for target in lora.targets:
        module = layout[f"layers.{target}"][0].removesuffix(".weight")
        a_L, b_L = (np.asarray(jax.device_get(flat[f"layers.{target}{suffix}"]), dtype=np.float32) for suffix in (A, B))
        for layer, (a, b) in enumerate(zip(a_L, b_L)):
            name = f"base_model.model.{module.format(layer)}"
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_model.safetensors").chmod(0o644)  # safetensors gives it to its owner alone
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(layout[f"layers.{t}"][0].split(".")[-2] for t in lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def bound(inputs: tuple[int, ...]) -> float:
    """New A are uniform within this (PEFT's default, Kaiming's with a = sqrt 5)."""
    return math.prod(inputs) ** -0.5

"""Adapters in PEFT's file layout."""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from msd_jax.models import decoder, layout
from msd_jax.models.config import DecoderConfig
from msd_jax.models.lora import SUFFIX_A, SUFFIX_B, Lora


def write(directory: pathlib.Path, params: dict[str, Any], lora: Lora, config: DecoderConfig, base: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json.

    Args:
      directory: exists.
      params: holds the adapters, on the host; everything else in it is ignored.
      lora: their settings.
      config: of the model.
      base: hub id or directory of the base model, named in adapter_config.json.
    """
    flat = dict(decoder.flat(params))
    tensors, ranks = {}, {}
    for tensor, names in layout.shared(config).items():
        if not any(name + SUFFIX_A in flat for name in names):
            continue
        module = _module(tensor, config)
        for layer in range(config.layers):
            a, b = _joined(flat, names, layer, config, lora.rank)
            name = f"base_model.model.{module.format(layer)}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
            ranks[module.rpartition(".")[2]] = len(a)
    file = directory / "adapter_model.safetensors"
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files that only their owner may read
    (directory / "adapter_config.json").write_text(
        json.dumps(_settings(ranks, lora, config, base), indent=2) + "\n", encoding="utf-8"
    )


def _settings(ranks: dict[str, int], lora: Lora, config: DecoderConfig, base: str) -> dict[str, Any]:
    """adapter_config.json; `ranks` are those of each adapted module."""
    # The other parts of a larger model may have modules of the same names.
    inside = rf".*\.language_model\..*\.({'|'.join(sorted(ranks))})"
    joined = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    # Adapters of several matrices in one have a rank each, and PEFT scales by alpha / rank.
    alphas = {module: lora.alpha * rank / lora.rank for module, rank in joined.items()}
    patterns = {"rank_pattern": joined, "alpha_pattern": alphas} if joined else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": inside if config.wrapped else sorted(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **patterns,
    }


def _module(tensor: str, config: DecoderConfig) -> str:
    """The name of a module within transformers' model, from that of its weight."""
    module = tensor.removesuffix(".weight")
    return module.replace("model.", "model.language_model.", 1) if config.wrapped else module


def _joined(
    flat: dict[str, Any], names: list[str], layer: int, config: DecoderConfig, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """(A [ranks, inputs], B [outputs, ranks]) of one tensor's adapter, out of those of the matrices that share it.

    Of several matrices each has ranks of its own, and in B its own rows; everything else of B is zero.
    """
    rows = {"query": config.heads, "key": config.kv_heads, "value": config.kv_heads}
    all_a, blocks = [], []
    for name in names:
        adapted = name + SUFFIX_A in flat
        if adapted:
            a, b = (np.asarray(flat[name + suffix][layer], np.float32) for suffix in (SUFFIX_A, SUFFIX_B))
            all_a.append(a.reshape(-1, rank).T)
            blocks.append(b.reshape(rank, -1).T)
        elif len(names) > 1:
            matrix = name.removeprefix("layers.")
            size = rows[matrix] * config.head_dim if matrix in rows else config.ffw
            blocks.append(np.zeros((size, 0), np.float32))
    whole = np.zeros((sum(map(len, blocks)), sum(block.shape[1] for block in blocks)), np.float32)
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return np.ascontiguousarray(np.concatenate(all_a)), whole

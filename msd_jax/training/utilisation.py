"""What a run makes of its devices: model FLOPs utilisation of training, and decoding against the memory's bandwidth."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from msd_jax.generation import rollout
from msd_jax.generation.responses import Responses
from msd_jax.models import pretrained
from msd_jax.models.config import DecoderConfig
from msd_jax.models.lora import Lora
from msd_jax.parallel import sharding
from msd_jax.training.packing import TrainBatch


class Peak(NamedTuple):
    """What one JAX device can do at most.

    Attributes:
      flops: bfloat16 operations per second.
      hbm_bandwidth: bytes per second.
      devices_per_chip: 2 where a chip has two cores.
    """

    flops: float
    hbm_bandwidth: float
    devices_per_chip: int = 1


class Utilisation:
    """Columns of metrics.jsonl that relate a step's tokens and seconds to the peak of the devices.

    mfu: model FLOPs utilisation: operations of the update's matrix products on real tokens (what rematerialisation
      repeats, padding, and pairs of tokens that attention masks are no work; a beginning that sequences share counts
      for each of them), per second and peak of all devices.
    hbm_share: the time to read from memory what decoding must (all weights once per token of the longest response, and
      each row's cached tokens), over rollout_seconds.
    train_tokens_per_second_per_chip, rollout_tokens_per_second_per_chip.

    The seconds include compilation, which makes the first steps' shares small.
    """

    def __init__(self, model: pretrained.Architecture, mesh: Mesh, peak: Peak | None, weights: str = "float"):
        """Nothing is compiled.

        Args:
          model: that trains and generates.
          mesh: of generation.
          peak: of each device; None where it is not known, and there are no columns.
          weights: config.rollout.weights.
        """
        self._model, self._mesh, self._peak = model, mesh, peak
        self._weights = _weight_bytes(model, mesh, weights)

    def __call__(self, batch: TrainBatch, responses: Responses, row: dict[str, float]) -> dict[str, float]:
        """The columns of a step that trained on `batch`, and whose row is `row` without them."""
        if self._peak is None:
            return {}
        model = self._model
        flops = train_flops(model.config, model.lora, batch, trains_head=not (model.lora or model.freeze_embeddings))
        devices, seconds = self._mesh.size, row["rollout_seconds"]
        columns = {"mfu": flops / row["train_seconds"] / devices / self._peak.flops}
        if responses.generated and seconds:
            written_B = np.where(responses.prompt_length_B > 0, responses.length_B, 0)
            cached = _cached_bytes(model, self._mesh, responses.prompt_length_B, written_B)
            least = (self._weights * responses.decoded + cached) / self._peak.hbm_bandwidth
            columns["hbm_share"] = least / seconds
        for name in ("train", "rollout"):
            per_device = row[f"{name}_tokens_per_second"] / devices
            columns[f"{name}_tokens_per_second_per_chip"] = per_device * self._peak.devices_per_chip
        return columns


def train_flops(config: DecoderConfig, lora: Lora | None, batch: TrainBatch, trains_head: bool) -> float:
    """Operations of the matrix products of one update; see Utilisation."""
    response_B = batch.response_length_B.astype(np.int64)
    read_B = np.maximum(response_B - 1, 0)  # nothing is predicted after the last token
    student_B = batch.student_length_B + read_B
    head = 2.0 * config.width * config.vocab_size * int(response_B.sum())
    base, adapters, pairs = (sum(parts) for parts in zip(*_forward(config, lora, student_B)))
    # Backward, a product's operands have a gradient each: inputs always, weights where they are trained.
    total = base * (2 if lora else 3) + adapters * 3 + pairs * 3 + head * (3 if trains_head else 2)
    if batch.teacher_prompt_BxP is not None:
        teacher_B = batch.teacher_length_B + read_B
        total += head + sum(sum(parts) for parts in _forward(config, lora, teacher_B))
    return total


def _forward(config: DecoderConfig, lora: Lora | None, length_B: np.ndarray) -> Iterator[tuple[float, float, float]]:
    """Of each layer's forward pass over sequences: operations with its matrices, its adapters, and between tokens."""
    tokens = int(length_B.sum())
    D, N, K, H, F = config.width, config.heads, config.kv_heads, config.head_dim, config.ffw
    sizes = {"query": (D, N * H), "key": (D, K * H), "value": (D, K * H), "output": (N * H, D)}
    sizes |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
    matrices = sum(math.prod(size) for size in sizes.values())
    adapted = sum(lora.rank * sum(sizes[name]) for name in lora.targets) if lora else 0
    for window in config.windows:
        yield 2.0 * tokens * matrices, 2.0 * tokens * adapted, 4.0 * N * H * _pairs(length_B, window)


def _pairs(length_B: np.ndarray, window: int | None) -> float:
    """How many pairs of tokens, one at or before the other, causal attention over sequences of these lengths has."""
    length_B = length_B.astype(np.float64)
    seen_B = length_B if window is None else np.minimum(length_B, window)
    return float((seen_B * (seen_B + 1) / 2 + (length_B - seen_B) * seen_B).sum())


def _weight_bytes(model: pretrained.Architecture, mesh: Mesh, weights: str) -> int:
    """Bytes of the weights that a device reads for each token; of an embedding that is no head only rows are read."""
    params = rollout.abstract_params(model, mesh, weights)
    names = set(params) - (set() if model.config.tied_embeddings else {"embedding"})
    leaves = jax.tree.leaves([params[name] for name in names])
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _cached_bytes(
    model: pretrained.Architecture, mesh: Mesh, prompt_length_B: np.ndarray, length_B: np.ndarray
) -> float:
    """Bytes of keys and values that a device reads while rows with prompts are given responses of `length_B`."""
    config, rules = model.config, sharding.ROLLOUT
    heads = config.kv_heads
    if not sharding.is_replicated(rules, mesh, "kv_heads", heads):
        heads //= sharding.parts(mesh, "kv_heads")
    whole_B = prompt_length_B + length_B
    tokens = sum(_pairs(whole_B, window) - _pairs(prompt_length_B, window) for window in config.windows)
    return tokens * 2 * heads * config.head_dim * model.dtype.itemsize / sharding.batch_shards(mesh)

"""Rotary position embeddings: what config.json says of them, and the frequencies that follow."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msd_jax.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as config.json names them


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
      theta: base of the geometric series of wavelengths.
      rope_type: how frequencies are scaled for longer contexts: "default" (not at all), "linear", "llama3", "yarn" or
        "longrope"; or "none", for a layer that does not see positions (NoPE).
      factor: of the scaling.
      original_positions: the context that the model was trained on before scaling (llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: of llama3.
      beta_fast, beta_slow: of yarn.
      attention_factor: of yarn and longrope, on cos and sin; None: 0.1 log(factor) + 1, and
        sqrt(1 + log(factor) / log(original_positions)).
      short_factor: of longrope, for each frequency, in sequences up to original_positions.
      partial: the share of each head that is rotated, its first part.
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
    short_factor: tuple[float, ...] = ()
    partial: float = 1.0

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Radians per position, float32 [H/2] or fewer where `partial` is below 1, and the factor on cos and sin.

        The formulas are those of `transformers.modeling_rope_utils` and of the papers named there.
        """
        rotated = int(head_dim * self.partial)
        plain = self.theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        if self.rope_type == "default":
            return plain.astype(np.float32), 1.0
        if self.rope_type == "none":
            return np.zeros_like(plain, np.float32), 1.0
        if self.rope_type == "linear":
            return (plain / self.factor).astype(np.float32), 1.0
        if self.rope_type == "longrope":
            scale = math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(self.original_positions))
            scaled = (plain / np.array(self.short_factor)).astype(np.float32)
            return scaled, scale if self.attention_factor is None else self.attention_factor
        kept = self._kept_by_llama3(plain) if self.rope_type == "llama3" else self._kept_by_yarn(rotated)
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


def distinct(ropes: Sequence[Rope]) -> list[Rope]:
    """Of the Ropes of all layers each one once, by first occurrence."""
    return list(dict.fromkeys(ropes))


def rotations(ropes: Sequence[Rope], head_dim: int, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each `distinct` Rope's angles at these positions, times its factor.

    Layers read them from here: in a layer, XLA would compute each anew for every head that it rotates.

    Returns:
      Two float32 [R, B, T, H/2], or fewer where a part of each head is rotated.
    """
    frequencies, factors = zip(*(rope.frequencies(head_dim) for rope in distinct(ropes)))
    angle = positions_BxT[..., None].astype(jnp.float32) * np.stack(frequencies)[:, None, None]
    factor = np.array(factors, np.float32)[:, None, None, None]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


# Parameters of each type of scaling, and whether it needs them.
_PARAMETERS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True},
    "yarn": {"factor": True, "beta_fast": False, "beta_slow": False, "attention_factor": False},
    "longrope": {"short_factor": True, "factor": False, "attention_factor": False},
}


def read(values: dict[str, Any], kind: str, head_dim: int) -> Rope:
    """The Rope of one kind of layer, from the contents of a config.json.

    Raises:
      UserError: it asks for something that is not implemented, or lacks something.
    """
    theta, parameters = _parameters(values, kind)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    rope_type = "longrope" if rope_type == "su" else rope_type  # its first name
    if rope_type not in _PARAMETERS:
        raise UserError(f"rope_type {rope_type!r} is not implemented (only {', '.join(_PARAMETERS)})")
    partial = parameters.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if partial != 1.0 and not (values["model_type"] == "phi3" and partial < 1 and int(head_dim * partial) >= 2):
        raise UserError(f"partial_rotary_factor={partial!r} is not implemented (only 1.0, and less for phi3)")
    for key in ("mscale", "mscale_all_dim"):
        if parameters.get(key):
            raise UserError(f"the rope parameter {key} is not implemented")
    if parameters.get("truncate") is False:
        raise UserError("the rope parameter truncate=False is not implemented")
    if not theta > 1:
        raise UserError(f"rope_theta={theta!r} must be greater than 1")
    known = {key: parameters[key] for key in _PARAMETERS[rope_type] if parameters.get(key) is not None}
    for key, needed in _PARAMETERS[rope_type].items():
        if needed and key not in known:
            raise UserError(f"rope_type {rope_type!r} needs the rope parameter {key!r}, which is missing")
    if rope_type in ("llama3", "yarn", "longrope"):
        original = parameters.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        known["original_positions"] = values["max_position_embeddings"] if original is None else original
    if rope_type == "llama3" and not known["high_freq_factor"] > known["low_freq_factor"]:
        raise UserError("the rope parameter high_freq_factor must be greater than low_freq_factor")
    if rope_type == "longrope":
        known |= _longrope(values, known, int(head_dim * partial) // 2)
    return Rope(theta=float(theta), rope_type=rope_type, partial=float(partial), **known)


def _longrope(values: dict[str, Any], known: dict[str, Any], frequencies: int) -> dict[str, Any]:
    """short_factor and factor of longrope, checked."""
    if len(known["short_factor"]) != frequencies:
        raise UserError(
            f"the rope parameter short_factor holds {len(known['short_factor'])} numbers, not {frequencies}"
        )
    if not known["original_positions"] > 1:
        raise UserError("original_max_position_embeddings must be greater than 1")
    factor = known.get("factor") or values["max_position_embeddings"] / known["original_positions"]
    return {"short_factor": tuple(map(float, known["short_factor"])), "factor": factor}


def _parameters(values: dict[str, Any], kind: str) -> tuple[float, dict[str, Any]]:
    """(theta, parameters of the scaling), from the layout of transformers 5, rope_parameters, or the older one."""
    theta, parameters = values.get("rope_theta", 10_000.0), values.get("rope_parameters")
    if parameters is not None:
        parameters = parameters.get(kind, parameters)
        return parameters.get("rope_theta", theta), parameters
    if values["model_type"] == "gemma3_text" and kind == SLIDING:
        return values.get("rope_local_base_freq", 10_000.0), {}
    if values["model_type"] == "olmo3" and kind == SLIDING:  # whose scaling is that of the full layers alone
        return theta, {}
    return theta, values.get("rope_scaling") or {}

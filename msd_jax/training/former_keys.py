"""Config keys of earlier releases: what became of them, for whoever types one and for runs that began with them."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class _Removed(NamedTuple):
    """What to write instead, and the value with which the key changed nothing."""

    instead: str
    neutral: Any


RENAMED = {
    "train.checkpoint_every": "train.checkpoints.every",
    "train.checkpoints_kept": "train.checkpoints.kept",
    "train.completions_every": "train.completions.every",
    "train.completions_kept": "train.completions.kept",
    "eval.every": "eval.monitor.every",
    "eval.slice": "eval.monitor.slice",
    "eval.utility_floor": "eval.monitor.utility_floor",
    "eval.over_refusal_ceiling": "eval.monitor.over_refusal_ceiling",
    "optimizer.b1": "optimizer.adamw.b1",
    "optimizer.b2": "optimizer.adamw.b2",
    "optimizer.eps": "optimizer.adamw.eps",
}
REMOVED = {
    "data.tfds": _Removed("config.data.path='tfds://NAME:VERSION/SPLIT'", ""),
    "data.split": _Removed("the end of config.data.path='tfds://NAME:VERSION/SPLIT'", "train"),
    "data.data_dir": _Removed("part of config.data.path='tfds://NAME:VERSION/SPLIT?data_dir=DIR'", ""),
    "model.lora.base_dtype": _Removed("the checkpoint's own dtype, always", "bfloat16"),
    "optimizer.final_fraction": _Removed("a tenth, always", 0.1),
}
# Keys that earlier releases lacked, and the value that is as they were.
ADDED = {
    "eval.weights": "float",
    "loss.beta_ramp": 0.0,
    "loss.entropy_scale": "linear",
    "loss.token_cap": 0.0,
    "mesh.rollout_ffw": 0,
    "mesh.rollout_tensor": 0,
    "prompts.analysis_is_thinking": False,
    "prompts.chat_template": "",
    "prompts.require_same_ending": True,
    "rollout.rows": 0,
    "rollout.weights": "float",
    "train.response_tokens": 0,
    "train.skip_spikes": 0.0,
}
# What loss.divergence="auto" was for responses that a student writes, when checkpoints still recorded it by that name.
_FORMER_AUTO = {"on_policy": "reverse_kl", "mixed": "reverse_kl"}


def today(key: str) -> str:
    """What `key` is now, to end the sentence "KEY is now ..."; "" for a key that never was."""
    if key in RENAMED:
        return f"config.{RENAMED[key]}"
    return REMOVED[key].instead if key in REMOVED else ""


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config of any release, by dotted keys, with today's; a removed key stays if its value changed something."""
    config: dict[str, Any] = ADDED | {
        RENAMED.get(key, key): value
        for key, value in values.items()
        if key not in REMOVED or value != REMOVED[key].neutral
    }
    if config.get("loss.divergence") == "auto":
        config["loss.divergence"] = _FORMER_AUTO.get(config["rollout.policy"], "forward_kl")
    return config

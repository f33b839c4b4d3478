"""Save and resume everything: parameters, teacher, optimizer, step, data position and the config (Orbax)."""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp

# Keys that a resumed run may change; all others decide what the run computes.
MAY_CHANGE = (
    "train.steps",
    "train.checkpoints.",
    "train.log_every",
    "train.completions.",
    "train.export",
    "eval.",
    "mesh.",
    "launch.",
)


class Checkpoints:
    """The checkpoints of one workdir, in WORKDIR/checkpoints/STEP."""

    def __init__(self, workdir: pathlib.Path, kept: int = 2):
        self._manager = ocp.CheckpointManager(
            workdir.resolve() / "checkpoints",
            options=ocp.CheckpointManagerOptions(max_to_keep=kept, enable_async_checkpointing=True),
        )

    @property
    def latest(self) -> int | None:
        """The last step that was saved completely, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Of the complete checkpoints, the last first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any, data: dict[str, Any], config: ml_collections.ConfigDict) -> None:
        """Saves in the background; a checkpoint exists once all of it is written."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data),
                config=ocp.args.JsonSave(json.loads(config.to_json_best_effort())),
            ),
            force=True,
        )

    def config(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """State, in the shardings of `abstract_state` (ShapeDtypeStructs), and the data position."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()),
        )
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Until what is being written is there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written."""
        self.wait()
        self._manager.close()


def abstract(state: Any) -> Any:
    """ShapeDtypeStructs with the shardings of `state`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def config_changes(old: dict[str, Any], new: ml_collections.ConfigDict) -> list[str]:
    """Lines `key: old -> new` of the keys that differ and may not."""
    before, after = _flatten(old), _flatten(json.loads(new.to_json_best_effort()))
    return [
        f"config.{key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]


def without_paths(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All values by their dotted key but paths, which may differ between the machines of a run."""
    flat = _flatten(json.loads(config.to_json_best_effort()))
    return {key: value for key, value in flat.items() if not key.endswith((".path", ".data_dir"))}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

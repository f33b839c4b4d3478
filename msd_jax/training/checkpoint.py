"""Saves and restores all that changes in a run: weights, teacher, optimizer, step and data position (by Orbax)."""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from flax import traverse_util

# Keys, or beginnings of keys, that a resumed run may change. They decide how long a run goes on, what it keeps and
# shows, and how its work is laid out; every other key decides the numbers of its steps or of its stored evaluations.
MAY_CHANGE = (
    "train.steps",
    "train.checkpoint_every",
    "train.checkpoints_kept",
    "train.log_every",
    "train.completions_every",
    "train.completions_kept",
    "train.export",
    "eval.every",
    "eval.utility_floor",
    "eval.batch_size",
    "preflight.",  # of another command
    "judge.guard.batch_size",
    "judge.openai.key_variable",
    "judge.openai.addresses",
    "judge.openai.concurrency",
    "judge.openai.timeout",
    "judge.openai.retries",
    "judge.openai.price_per_million_",
    "mesh.",  # the order in which devices add changes the last bits
    "launch.",
)


class Checkpoints:
    """The checkpoints of one workdir, in WORKDIR/checkpoints/STEP."""

    def __init__(self, workdir: pathlib.Path, kept: int = 2):
        self._manager = _Manager(
            workdir.resolve() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=kept)
        )

    @property
    def latest(self) -> int | None:
        """The last step with a complete checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, the last first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any, data: dict[str, Any], config: ml_collections.ConfigDict) -> None:
        """Saves in the background; the checkpoint exists once all of it is written.

        Args:
          step: number of finished steps.
          state: a pytree of arrays.
          data: the position in the stream of batches, a JSON object.
          config: kept with the checkpoint, for the reader.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data),
                config=ocp.args.JsonSave(plain(config)),
            ),
            force=True,
        )

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data) as `save` took them, the state in the shardings of `abstract_state` (ShapeDtypeStructs)."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Waits until every save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until every save is complete, and lets go of the directory."""
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """False: whether the run is preempted the loop asks, by distributed.preempted, which counts the questions."""
        del step
        return False


def abstract(state: Any) -> Any:
    """ShapeDtypeStructs with the shardings of `state`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON holds it."""
    return json.loads(config.to_json_best_effort())


def config_changes(old: dict[str, Any], new: ml_collections.ConfigDict) -> list[str]:
    """A line `config.KEY: OLD -> NEW` for each key that differs and must not; `old` is `plain` of a config."""
    before, after = (traverse_util.flatten_dict(config, sep=".") for config in (old, plain(new)))
    return [
        f"config.{key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]


def without_paths(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Values by dotted key, without paths, which may differ between the machines of a run."""
    flat = traverse_util.flatten_dict(plain(config), sep=".")
    return {key: value for key, value in flat.items() if not key.endswith((".path", ".data_dir"))}

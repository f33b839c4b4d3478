"""Saves and restores all that changes in a run: weights, teacher, optimizer, step and data position (by Orbax).

A checkpoint is sealed by checksums once it is written, and checked against them before it is restored. It may have no
copy on a disk: see io/stores.py.
"""

import errno
import json
import logging
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from msd_jax import losses
from msd_jax.errors import UserError, UserFileError
from msd_jax.io import seals, stores
from msd_jax.io.console import log
from msd_jax.parallel import distributed, peers
from msd_jax.training import former_keys

# Keys, or beginnings of keys, that a resumed run may change. They decide how long a run goes on, what it keeps and
# shows, and how its work is laid out; every other key decides the numbers of its steps or of its stored evaluations.
MAY_CHANGE = (
    "compilation_cache",
    "prompts.require_same_ending",
    "train.steps",
    "train.max_skipped",
    "train.stall_limit",
    "train.stop_on_collapse",
    "train.checkpoints.",
    "train.log_every",
    "train.profile_steps",
    "train.completions.",
    "train.export",
    "train.trackers",
    "eval.monitor.every",
    "eval.monitor.utility_floor",
    "eval.monitor.over_refusal_ceiling",
    "eval.batch_size",
    "eval.server.",  # of another command
    "preflight.",  # likewise
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


def _not_raised_too(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_not_raised_too)  # Orbax logs each exception several times before it raises it
_unraisablehook = sys.unraisablehook


def _not_of_a_closed_loop(unraisable: Any) -> None:
    """Prints what could not be raised, but not what TensorStore's threads say once a write has failed.

    Orbax raises the first failure and closes its event loop; each write that fails later would print a traceback.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        _unraisablehook(unraisable)


sys.unraisablehook = _not_of_a_closed_loop


class Checkpoints:
    """The checkpoints of one workdir, in WORKDIR/checkpoints/STEP."""

    def __init__(self, workdir: pathlib.Path, kept: int = 2, record: Mapping[str, Any] | None = None):
        """Keeps the last `kept` steps, and with each `record`: JSON objects by name, which `recorded` finds again."""
        self._workdir, self._directory = workdir, stores.checkpoints(workdir)
        # What a save that was interrupted left behind takes room, and no other run writes here: see run.claim.
        options = ocp.CheckpointManagerOptions(max_to_keep=kept, cleanup_tmp_directories=True)
        self._manager = _Manager(self._directory, options=options)
        self._record = {name: ocp.args.JsonSave(value) for name, value in (record or {}).items()}
        self._sealer = threading.Thread()
        self._error: UserFileError | None = None
        self._saving = 0

    @property
    def latest(self) -> int | None:
        """The last step with a complete checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, the last first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Saves in the background; the checkpoint exists once all of it is written.

        Args:
          step: number of finished steps.
          state: a pytree of arrays.
          data: the position in the stream of batches, a JSON object.

        Raises:
          UserFileError: this step, or the one that was saved before, cannot be written.
        """
        peers.moved(f"saving step {step}")
        self._wait_for_seal()  # or Orbax could remove a step that is being hashed
        self._saving = step
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        try:
            if stores.is_shared(self._workdir):
                self._directory.stat()  # where it was removed, Orbax would make it anew, and the workdir around it
            self._manager.save(step, args=ocp.args.Composite(**items, **self._record), force=True)
        except Exception as error:
            raise _unwritten(step, error) or error from error
        self._sealer = threading.Thread(target=self._seal, args=(step,), name=f"seal step {step}", daemon=True)
        self._sealer.start()

    def _seal(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            seals.seal(self._directory / str(step), jax.process_index(), jax.process_count())
        except UserFileError as error:
            self._error = error
        except Exception as error:
            self._error = _unwritten(step, error)
            if not self._error:
                raise

    def check(self) -> None:
        """Raises a UserFileError as soon as a checkpoint could not be written; never waits."""
        if self._error:
            raise self._error
        if failure := self._manager.failure:
            raise _unwritten(self._saving, failure) or failure from failure

    def restorable(self, abstract_state: Any) -> Iterator[tuple[int, Any, dict[str, Any]]]:
        """(step, state, data) of every checkpoint that is whole, the last first, each restored when it is asked for.

        A damaged one is named, passed over and renamed to STEP.damaged. All processes must ask for the same.

        Args:
          abstract_state: ShapeDtypeStructs, in whose shardings the state is restored.

        Raises:
          UserError: there are checkpoints, and none is whole.
        """
        damaged: dict[int, str] = {}
        any_whole = False
        for step in distributed.from_first(lambda: sorted(step_directories(self._directory), reverse=True)):
            restored, damage = self._restore_checked(step, abstract_state)
            if damage:
                damaged[step] = damage
                continue
            for number, what in damaged.items():
                log(f"step {number} is damaged ({what}); going on from step {step}")
            self._set_aside(damaged)
            damaged, any_whole = {}, True
            yield step, *restored
        if damaged and not any_whole:
            raise UserError(
                f"no checkpoint in {self._directory} is whole:\n"
                + "".join(f"  step {number}: {what}\n" for number, what in damaged.items())
                + "Restore them from a copy, remove these directories to train from the start, or use a new --workdir"
            )

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data) of one step, unchecked; the arguments are those of `restorable`."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored["state"], restored["data"]

    def _restore_checked(self, step: int, abstract_state: Any) -> tuple[Any, str | None]:
        """(what `restore` gives, None), or (None, what is damaged)."""
        directory = self._directory / str(step)
        peers.moved(f"restoring step {step}")
        if damage := damage_of(directory):
            return None, damage
        sealed = distributed.from_first(lambda: seals.sealed(directory))
        if not sealed:
            log(f"note: step {step} has no checksums, since the run ended before they were written; it is not checked")
        restored, failure = None, None
        try:
            restored = self.restore(step, abstract_state)
        except Exception as error:
            if sealed or "RESOURCE_EXHAUSTED" in str(error):  # not the checkpoint's fault
                raise
            failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else step}"
        return restored, next(filter(None, distributed.from_all(lambda: failure)), None)

    def _set_aside(self, steps: Mapping[int, str]) -> None:
        """Renames step directories, so that these steps can be saved again."""
        if not steps:
            return

        def rename() -> None:
            for step in steps:
                aside = epath.Path(self._directory) / f"{step}.damaged"
                if aside.exists():
                    aside.rmtree()
                epath.Path(self._directory / str(step)).rename(aside)

        distributed.from_first(rename)
        self._manager.reload()

    def wait(self) -> None:
        """Waits until every save is complete. Raises as `check`."""
        peers.moved("waiting for the last save")
        self._wait_for_seal()
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until every save is complete, and lets go of the directory. Raises as `check`."""
        peers.moved("waiting for the last save")
        self._wait_for_seal()
        self._manager.close()

    def _wait_for_seal(self) -> None:
        while self._sealer.is_alive():
            self._sealer.join(_SECONDS_BETWEEN_LOOKS)
            self.check()
        self.check()


_SECONDS_BETWEEN_LOOKS = 0.5
# What a full, read-only or removed disk says; the libraries below Orbax hand on the words without the number.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ESTALE)


def _unwritten(step: int, error: BaseException) -> UserFileError | None:
    """The error of a checkpoint that storage did not take; None where `error` has another cause."""
    words = next((os.strerror(code) for code in _STORAGE if os.strerror(code) in str(error)), None)
    if words is None and isinstance(error, OSError):
        words = error.strerror or str(error)
    if words is None:
        return None
    failed = UserFileError(
        f"checkpoint {step} could not be written: {words}; earlier checkpoints are whole: once there is room, run the "
        "same command again to resume"
    )
    failed.__cause__ = error
    return failed


def step_directories(checkpoints: pathlib.Path) -> list[int]:
    """The steps of which there is a directory, complete or not."""
    return [int(path.name) for path in checkpoints.glob("[0-9]*") if path.name.isdigit() and path.is_dir()]


def damage_of(directory: pathlib.Path) -> str | None:
    """What is wrong with a step's directory by its checksums, the same on all processes; each checks a share."""
    found = distributed.from_all(lambda: seals.damage(directory, jax.process_index(), jax.process_count()))
    return next(filter(None, found), None)


def recorded(workdir: pathlib.Path, name: str) -> dict[str, Any]:
    """The object `name` of the last checkpoint whose record is legible; {} if there is none."""
    directory = stores.checkpoints(workdir)
    for step in sorted(step_directories(directory), reverse=True):
        try:
            return json.loads((directory / str(step) / name / "metadata").read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
    return {}


class _Manager(ocp.CheckpointManager):
    """
    Attributes:
      failure: why this process could not write its part. Orbax raises it only after a barrier at which the others, who
        wait at another one for that part, do not come before it times out.
    """

    failure: Exception | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failure = error
            raise

    def reached_preemption(self, step: int) -> bool:
        """False: whether the run is preempted the loop asks, by preemption.preempted."""
        del step
        return False


def abstract(state: Any) -> Any:
    """ShapeDtypeStructs with the shardings of `state`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as JSON holds it, with the divergence that "auto" stands for: a later release may take another."""
    values = json.loads(config.to_json_best_effort())
    if "loss" in values:
        loss, policy = values["loss"], values["rollout"]["policy"]
        loss["divergence"] = losses.resolve_divergence(loss["divergence"], policy)
    return values


def config_changes(old: dict[str, Any], new: ml_collections.ConfigDict) -> list[str]:
    """A line `config.KEY: OLD -> NEW` for each key that differs and must not; `old` is `plain` of a config."""
    before = former_keys.renamed(traverse_util.flatten_dict(old, sep="."))
    after = traverse_util.flatten_dict(plain(new), sep=".")
    return [
        f"config.{key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]


def without_paths(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Values by dotted key, without paths, which may differ between the machines of a run."""
    flat = traverse_util.flatten_dict(plain(config), sep=".")
    return {key: value for key, value in flat.items() if not key.endswith(".path")}

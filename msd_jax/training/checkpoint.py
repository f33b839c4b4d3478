"""Saves and restores all that changes in a run: weights, teacher, optimizer, step and data position (by Orbax).

A checkpoint is sealed by checksums once it is written, and checked against them before it is restored. It may have no
copy on a disk: see io/stores.py. Where storage fails for a moment the state of a later step is saved instead: that of
its own is gone by the time this is noticed.
"""

import contextlib
import errno
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from msd_jax import losses
from msd_jax.errors import UserError, UserFileError
from msd_jax.io import retries, seals, stores
from msd_jax.io.console import log
from msd_jax.parallel import distributed, joint, peers
from msd_jax.training import former_keys, orbax

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


PAUSES = (1.0, 10.0, 60.0)  # seconds before a save that failed for a moment is repeated; training goes on meanwhile


class Checkpoints:
    """The checkpoints of one workdir, in WORKDIR/checkpoints/STEP."""

    def __init__(
        self, workdir: pathlib.Path, kept: int = 2, record: Mapping[str, Any] | None = None, patience: float = 0.0
    ):
        """Looks for what is there.

        Args:
          workdir: of the run.
          kept: how many steps are kept, the last ones.
          record: JSON objects by name, which are kept with each step, and which `recorded` finds again.
          patience: seconds after which a save that is not complete has failed; 0: never.
        """
        self._workdir, self._directory = workdir, stores.checkpoints(workdir)
        self._joint = joint.Saves()
        self._manager = orbax.manager(self._directory, kept, patience, self._joint.barrier)
        self._record = {name: ocp.args.JsonSave(value) for name, value in (record or {}).items()}
        self._sealer = threading.Thread()
        self._error: UserFileError | None = None
        self._failures, self._again_at = 0, 0.0  # in a row, for a moment each; when the save may be repeated
        self._left_over: int | None = None  # the step that could not be saved, of which there may be parts

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
        self._clear_up()
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        self._joint.begin()
        try:
            if stores.is_shared(self._workdir):
                self._directory.stat()  # where it was removed, Orbax would make it anew, and the workdir around it
            if step not in self._manager.all_steps():  # else it is whole, and was not sealed
                self._manager.save(step, args=ocp.args.Composite(**items, **self._record), force=True)
        except Exception as error:
            if jax.process_count() > 1:  # which wait for this one
                raise _unwritten(step, error) or error from error
            self._left_over = step
            if not self._fail(step, error):
                raise
            self.check()
            return
        self._sealer = threading.Thread(target=self._seal, args=(step,), name=f"seal step {step}", daemon=True)
        self._sealer.start()

    def _seal(self, step: int) -> None:
        try:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                if not self._is_saved(step):
                    self._left_over = step
                    self._manager.settle()
                    raise
                print(f"note: step {step} is saved, but an earlier one could not be removed: {error}", file=sys.stderr)
            seals.seal(self._directory / str(step), jax.process_index(), jax.process_count())
            self._failures = 0
        except Exception as error:
            if not self._fail(step, error):
                raise

    def _is_saved(self, step: int) -> bool:
        with contextlib.suppress(Exception):  # of storage that does not answer
            return step in self._manager.all_steps(read=True)
        return False

    def _fail(self, step: int, error: Exception) -> bool:
        """Has the save of `step` repeated if it failed for a moment, or makes of storage's refusal the run's error.

        Returns:
          Whether storage is the cause at all.
        """
        another = isinstance(error, joint.Failed)
        # What the try before this one still had in hand may have met this one in the directory of the same step.
        disturbed = self._failures > 0 and isinstance(error, FileNotFoundError)
        transient = another or disturbed or (retries.is_transient(error) and not _is_overdue(error))
        if transient and self._failures < len(PAUSES):
            pause = PAUSES[self._failures]
            if not another:
                retries.announce(f"checkpoint {step} could not be written: {_words(error)}", pause)
            self._failures, self._again_at = self._failures + 1, time.monotonic() + pause
        elif not another:
            self._error = _unwritten(step, error, self._failures + 1)
        return transient or self._error is not None

    def _clear_up(self) -> None:
        """Before a save that takes the place of one that failed: removes what that left, and has Orbax forget it."""
        if self.failing:
            time.sleep(max(0.0, self._again_at - time.monotonic()))
        if self._left_over is None or not self.failing:
            return
        with contextlib.suppress(Exception):  # each thread that asks Orbax is told of the failure once
            self._manager.wait_until_finished()
        if distributed.is_first():
            # What of it was under way may have committed it in the end.
            of_it = self._directory.glob(f"{self._left_over}.orbax-checkpoint-tmp*")
            for directory in (self._directory / str(self._left_over), *of_it):
                with contextlib.suppress(OSError):
                    epath.Path(directory).rmtree()
        self._left_over = None
        self._manager.reload()

    @property
    def failing(self) -> bool:
        """Whether storage refused the last save for a moment, so that another is to take its place."""
        return self._failures > 0 and not self._error

    @property
    def due_again(self) -> bool:
        """Whether that other one is due; never waits."""
        return self.failing and not self._sealer.is_alive() and time.monotonic() >= self._again_at

    def check(self) -> None:
        """Raises a UserFileError as soon as a checkpoint could not be written; never waits."""
        if self._error:
            raise self._error

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

    def wait(self) -> bool:
        """Waits until the last save is complete; False, on all processes, where it failed. Raises as `check`."""
        peers.moved("waiting for the last save")
        self._wait_for_seal()
        return not any(distributed.from_all(lambda: self.failing))

    def close(self) -> None:
        """Waits until every save is complete, and lets go of the directory. Raises as `check`."""
        peers.moved("waiting for the last save")
        self._wait_for_seal()
        if not self.failing:
            self._manager.close()

    def _wait_for_seal(self) -> None:
        if self._sealer.ident:
            self._sealer.join()
        self.check()


# What a full, read-only or removed disk says; the libraries below Orbax hand on the words without the number.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, *retries.TRANSIENT)


def _unwritten(step: int, error: BaseException, tries: int = 1) -> UserFileError | None:
    """The error of a checkpoint that storage did not take; None where `error` has another cause."""
    if isinstance(error, UserFileError):
        return error
    if not (words := _words(error)):
        return None
    failed = UserFileError(
        f"checkpoint {step} could not be written{f' in {tries} tries' if tries > 1 else ''}: {words}; earlier "
        "checkpoints are whole: once there is room, run the same command again to resume"
    )
    failed.__cause__ = error
    return failed


def _words(error: BaseException) -> str:
    """What storage says in `error`; "" where it is not the cause."""
    if _is_overdue(error):
        return "storage did not answer in time (config.train.stall_limit)"
    said = next((os.strerror(code) for code in _STORAGE if os.strerror(code) in str(error)), "")
    return said or (error.strerror or str(error) if isinstance(error, OSError) else "")


def _is_overdue(error: BaseException) -> bool:
    """Whether Orbax gave up waiting; a time-out that the operating system reports has a number."""
    return isinstance(error, TimeoutError) and error.errno is None


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

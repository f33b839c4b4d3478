"""Orbax as a run wants it: quiet where it raises, patient, and reading again where storage fails for a moment."""

import contextlib
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from msd_jax.io import retries

_FOR_EVER = 365 * 24 * 3600  # seconds; Orbax wants a number


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


def manager(directory: pathlib.Path, kept: int, patience: float, barrier: Callable[..., None]) -> "_Manager":
    """Of the checkpoints in `directory`.

    Args:
      directory: made if there is none.
      kept: how many steps are kept, the last ones.
      patience: seconds after which a save that is not complete has failed; 0: never.
      barrier: waits for the other processes in the background, see joint.py.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=kept,
        # What a save that was interrupted left behind takes room, and no other run writes here: see run.claim.
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
            timeout_secs=int(patience) or _FOR_EVER,
            barrier_sync_fn=barrier if jax.process_count() > 1 else None,
            create_directories_asynchronously=False,  # or threads would wait for minutes for one that fails
        ),
    )
    return _Manager(directory, options=options, handler_registry=_handlers())


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """False: whether the run is preempted the loop asks, by preemption.agreed."""
        del step
        return False

    def settle(self) -> None:
        """Waits for all of a save that is still under way, as some is when another part of it has failed."""
        with contextlib.suppress(Exception):  # one failure is known
            self._wait_for_checkpointers()


class _RetryingHandler(ocp.StandardCheckpointHandler):
    """Reads again where storage fails for a moment: each process by itself, between Orbax's barriers."""

    typestr = ocp.StandardCheckpointHandler.typestr  # which checkpoints record

    def restore(self, *args: Any, **keywords: Any) -> Any:
        return retries.retried(lambda: super(_RetryingHandler, self).restore(*args, **keywords))


class _RetryingJsonHandler(ocp.JsonCheckpointHandler):
    typestr = ocp.JsonCheckpointHandler.typestr

    def restore(self, *args: Any, **keywords: Any) -> Any:
        return retries.retried(lambda: super(_RetryingJsonHandler, self).restore(*args, **keywords))


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for handler, kinds in (
        (_RetryingHandler(), (ocp.args.StandardSave, ocp.args.StandardRestore)),
        (_RetryingJsonHandler(), (ocp.args.JsonSave, ocp.args.JsonRestore)),
    ):
        for kind in kinds:
            registry.add(None, kind, handler)
    return registry

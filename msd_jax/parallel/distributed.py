"""One run over many processes: how they find each other, agree, and end together.

On a TPU pod, under Slurm's srun and in a GKE JobSet, JAX finds the other processes by itself. Elsewhere, as in
launch/local.sh, --coordinator, --processes and --process_id name them, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
and JAX_PROCESS_ID in the environment. Without any of these a run is one process, and nothing here has an effect.

Every process runs the same program on the same queries, holds the same host batches and copies its own rows to its
devices. What processes might see differently, above all files, process 0 looks up for all: `from_first`.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from msd_jax.errors import UserError
from msd_jax.parallel import peers, preemption

# A set of their own, because they are needed before --config is read: a config file may touch a device.
_FLAGS = flags.FlagValues()
_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0 [{_ENVIRONMENT[0]}].", flag_values=_FLAGS)
flags.DEFINE_integer("processes", None, f"How many processes the run has [{_ENVIRONMENT[1]}].", flag_values=_FLAGS)
flags.DEFINE_integer("process_id", None, f"Which of them this is, from 0 [{_ENVIRONMENT[2]}].", flag_values=_FLAGS)
flags.FLAGS.append_flag_values(_FLAGS)


def start(argv: list[str]) -> None:
    """Joins the run that this process is part of; must be called before any device is touched.

    Raises:
      UserError: only some of the three flags are given.
      RuntimeError: the coordinator did not answer.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, see preemption.py
    _FLAGS(argv, known_only=True)
    flag_values = (_FLAGS.coordinator, _FLAGS.processes, _FLAGS.process_id)
    given = [os.environ.get(name) if value is None else value for name, value in zip(_ENVIRONMENT, flag_values)]
    coordinator, processes, process_id = given
    if coordinator is not None and processes is not None and process_id is not None:
        jax.distributed.initialize(coordinator, int(processes), int(process_id), cluster_detection_method="deactivate")
    elif any(value is not None for value in given):
        raise UserError(
            f"--coordinator, --processes and --process_id (or {', '.join(_ENVIRONMENT)}) go together; "
            "give all three or none"
        )
    elif not _in_pod_without_job():
        try:
            jax.distributed.initialize()
        except ValueError as error:  # no TPU, no Slurm step, no JobSet: a run of one process
            if not str(error).startswith("coordinator_address"):
                raise
    peers.join(preemption.terminate, preemption.end_at_once)
    preemption.listen()


def _in_pod_without_job() -> bool:
    """Whether this is a Kubernetes pod outside any job, such as a notebook: JAX would fail looking for the job."""
    of_many = {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_PROCID"}
    return "KUBERNETES_SERVICE_HOST" in os.environ and not of_many & os.environ.keys()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a run: an error in one process ends them all; without one, they all end at the same time."""
    try:
        yield
    except BaseException as error:
        if peers.joined is None:
            peers.do_last_acts()
            raise
        if peers.joined.ending.is_set():
            threading.Event().wait()  # others ended before this process, which is the error
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            peers.joined.finish()
            raise
        reason = str(error) or "interrupted"
        if not isinstance(error, SystemExit | KeyboardInterrupt):  # those need one line alone
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason
        if lost or "Gloo" in reason:
            time.sleep(peers.SECONDS_OF_SILENCE + 10)  # most likely a peer died; the watching thread will name it
        peers.joined.fail(reason)


def end_in_error(message: str) -> None:
    """Ends the run with exit code 1 and one line.

    At once: what libraries would still write, to a disk that is full say, fails again, with a traceback each.
    """
    if peers.joined:
        peers.joined.fail(message)
    print(message, file=sys.stderr)
    peers.quit_process(1)


def is_first() -> bool:
    """Whether this is process 0, which alone prints and writes files (other than checkpoints)."""
    return jax.process_index() == 0


def from_first(look_up: Callable[[], Any]) -> Any:
    """On every process, what `look_up` returns on process 0 (a JSON value)."""
    if jax.process_count() == 1:
        return look_up()
    data = json.dumps(look_up()).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    text = np.frombuffer(data or bytes(size), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def from_all(look_up: Callable[[], Any]) -> list[Any]:
    """What `look_up` gives on each process (a JSON value), in their order, on every process."""
    mine = look_up()
    if jax.process_count() == 1:
        return [mine]
    data = json.dumps(mine).encode()
    size = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    texts_PxS = multihost_utils.process_allgather(np.frombuffer(data.ljust(size), np.uint8))
    return [json.loads(text_S.tobytes()) for text_S in texts_PxS]


def require_same(what: str, look_up: Callable[[], Any]) -> None:
    """Raises a UserError, on every process, where `look_up` (of a JSON value) differs between processes."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(json.dumps(look_up(), sort_keys=True).encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)  # one row for each process
    _require((digests == digests[0]).all(axis=1), f"has another {what} than process 0; all need the same")


def require_shared(directory: pathlib.Path) -> None:
    """Raises a UserError, on every process, where one does not see what process 0 writes to `directory`."""
    if jax.process_count() == 1:
        return

    def leave_mark() -> str:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".shared", delete=False) as file:
            return pathlib.Path(file.name).name

    mark = directory / from_first(leave_mark)
    deadline = time.monotonic() + 30  # a network file system may be late
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    if is_first():
        mark.unlink()
    _require(seen, f"does not see what process 0 writes to {directory}; use a directory that all machines share")


def _require(fine: np.ndarray, otherwise: str) -> None:
    """Raises a UserError that names the first process for which `fine` is false."""
    for process in np.flatnonzero(~fine):
        raise UserError(f"{peers.joined.names[process] if peers.joined else f'process {process}'} {otherwise}")

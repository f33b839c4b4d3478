"""One run over many processes: how they find each other, agree, and end together.

On a TPU pod, under Slurm's srun and in a GKE JobSet JAX finds the other processes by itself. Elsewhere, as in
launch/local.sh, they are told by --coordinator, --processes and --process_id, or by JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment. Without any of it a run is one process, and nothing here does
anything.

Every process runs the same program on the same queries, holds the same host batches and copies its rows of them to its
devices. What a process might see otherwise than its peers (files, above all) process 0 looks up for all: `from_first`.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import socket
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
from jax._src import distributed as jax_distributed  # the only way to the key-value store that the processes share
from jax.experimental import multihost_utils

from msd_jax.errors import UserError

# Their own set, for they are needed before --config is read: a config file may touch a device.
_FLAGS = flags.FlagValues()
_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0 [{_ENVIRONMENT[0]}].", flag_values=_FLAGS)
flags.DEFINE_integer("processes", None, f"How many processes the run has [{_ENVIRONMENT[1]}].", flag_values=_FLAGS)
flags.DEFINE_integer("process_id", None, f"Which of them this is, from 0 [{_ENVIRONMENT[2]}].", flag_values=_FLAGS)
flags.FLAGS.append_flag_values(_FLAGS)

SECONDS_BETWEEN_BEATS = 2.0
# A process that was silent for so long is dead. Compiling and reading weights leave the beating thread running.
SECONDS_OF_SILENCE = 30.0
_EXIT_PREEMPTED = 143  # as a shell tells SIGTERM

_peers: "_Peers | None" = None
_questions = itertools.count(1)


def start(argv: list[str]) -> None:
    """Joins the run that this process is a part of; to be called before any device is touched.

    Raises:
      UserError: only some of the three flags are given.
      RuntimeError: the coordinator did not answer.
    """
    global _peers
    _FLAGS(argv, known_only=True)
    environment = [os.environ.get(name) for name in _ENVIRONMENT]
    coordinator = _FLAGS.coordinator or environment[0]
    processes = _FLAGS.processes if _FLAGS.processes is not None else environment[1]
    process_id = _FLAGS.process_id if _FLAGS.process_id is not None else environment[2]
    told = [value is not None for value in (coordinator, processes, process_id)]
    if any(told) and not all(told):
        raise UserError(
            "--coordinator, --processes and --process_id (or "
            + ", ".join(_ENVIRONMENT)
            + ") go together; give all three or none"
        )
    if all(told):
        jax.distributed.initialize(coordinator, int(processes), int(process_id), cluster_detection_method="deactivate")
    elif not _in_a_bare_pod():
        try:
            jax.distributed.initialize()
        except ValueError as error:
            if not str(error).startswith("coordinator_address"):
                raise
            return  # no TPU, no Slurm step, no JobSet: a run of one process
    if jax_distributed.global_state.num_processes > 1:
        _peers = _Peers()


def _in_a_bare_pod() -> bool:
    """Whether this is a Kubernetes pod of no job, a notebook say: JAX would look for the job in vain, and fail."""
    of_many = {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "SLURM_PROCID"}
    return "KUBERNETES_SERVICE_HOST" in os.environ and not of_many & os.environ.keys()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around a run: an error in one process ends them all, and without one they all end at the same time."""
    try:
        yield
    except BaseException as error:
        if _peers is None:
            raise
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            _peers.finish()
            raise
        reason = str(error) or "interrupted"
        if not isinstance(error, SystemExit | KeyboardInterrupt):  # those are said in one line
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason
        if lost or "Gloo" in reason:
            time.sleep(SECONDS_OF_SILENCE + 10)  # most likely a peer died; the thread that watches it will name it
        _peers.fail(reason)


def preempted() -> bool:
    """Whether all processes are to save and end now, for one was sent SIGTERM. To be asked by all, after each step."""
    # JAX has all of them stop at one number, the next that none has asked with. Questions are counted, not steps: a
    # resumed run that is preempted before it has asked at all would have passed that number already.
    return _peers is not None and multihost_utils.reached_preemption_sync_point(next(_questions))


def end_preempted(message: str) -> None:
    """Ends this process, as all others, with the exit code of a preemption."""
    if is_first():
        print(message, file=sys.stderr)
    sys.exit(_EXIT_PREEMPTED)


def is_first() -> bool:
    """Whether this is process 0, which alone prints and writes files (but for checkpoints)."""
    return jax.process_index() == 0


def from_first(look_up: Callable[[], Any]) -> Any:
    """What `look_up` gives on process 0 (a JSON value), on every process."""
    if jax.process_count() == 1:
        return look_up()
    data = json.dumps(look_up()).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    text_S = np.frombuffer(data or bytes(size), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text_S).tobytes())


def require_same(what: str, look_up: Callable[[], Any]) -> None:
    """Raises a UserError, on every process, where `look_up` (of a JSON value) differs between processes."""
    if jax.process_count() == 1:
        return
    digest_H = np.frombuffer(hashlib.sha256(json.dumps(look_up(), sort_keys=True).encode()).digest(), np.uint8)
    digests_PxH = multihost_utils.process_allgather(digest_H)
    _require((digests_PxH == digests_PxH[0]).all(axis=1), f"has another {what} than process 0; all need the same")


def require_shared(directory: pathlib.Path) -> None:
    """Raises a UserError, on every process, where one does not see in `directory` what process 0 writes there."""
    if jax.process_count() == 1:
        return

    def leave_mark() -> str:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".shared", delete=False) as file:
            return pathlib.Path(file.name).name

    mark = directory / from_first(leave_mark)
    deadline = time.monotonic() + 30  # a network file system may be late
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    seen_P = multihost_utils.process_allgather(np.array(mark.exists()))
    if is_first():
        mark.unlink()
    _require(seen_P, f"does not see what process 0 writes to {directory}; take a directory that all machines share")


def _require(good_P: np.ndarray, otherwise: str) -> None:
    for process in np.flatnonzero(~good_P):
        raise UserError(f"{_peers.names[process] if _peers else f'process {process}'} {otherwise}")


class _Peers:
    """The other processes of the run: tells them that this one lives, and ends this one once one of them does not."""

    def __init__(self):
        # Not from jax.process_index(), which would set up the devices before --jax_platforms is read.
        state = jax_distributed.global_state
        self._store, self._me, count = state.client, state.process_id, state.num_processes
        self._stop = threading.Event()
        self._store.key_value_set(f"msd_jax/host/{self._me}", socket.gethostname())
        hosts = [self._store.blocking_key_value_get(f"msd_jax/host/{i}", 60_000) for i in range(count)]
        self.names = [f"process {i} on {host}" for i, host in enumerate(hosts)]
        if self._me == 0:
            print(f"{count} processes: " + ", ".join(f"{i} on {host}" for i, host in enumerate(hosts)), flush=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        beat, last = 0, {}
        while not self._stop.wait(SECONDS_BETWEEN_BEATS):
            beat += 1
            try:
                self._store.key_value_set(f"msd_jax/beat/{self._me}", str(beat), allow_overwrite=True)
                beats = dict(self._store.key_value_dir_get("msd_jax/beat/"))
                failures = self._store.key_value_dir_get("msd_jax/failed/")
            except jax.errors.JaxRuntimeError as error:
                self._end(f"{self.names[0]}, which coordinates the run, cannot be reached: {error}")
            now = time.monotonic()
            for key, reason in failures:
                self._end(f"{self.names[_index(key)]} ended: {reason}")
            for process, name in enumerate(self.names):
                seen = beats.get(f"msd_jax/beat/{process}")
                if last.setdefault(process, (seen, now))[0] != seen:
                    last[process] = (seen, now)
                if now - last[process][1] > SECONDS_OF_SILENCE:
                    self._end(f"{name} died: not a sign of life for {SECONDS_OF_SILENCE:.0f} seconds")

    def fail(self, reason: str) -> None:
        """Tells the others why this process ends, and ends it."""
        line = " ".join(reason.removeprefix("error: ").split())[:1000]
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"msd_jax/failed/{self._me}", line)
        print(f"error: {self.names[self._me]}: {reason.removeprefix('error: ')}", file=sys.stderr)
        self._stop.set()
        self._exit()

    def finish(self) -> None:
        """Waits for the others, so that none is taken for dead, and leaves the run."""
        self._store.wait_at_barrier("msd_jax/finish", 24 * 3600 * 1000)
        self._stop.set()
        self._thread.join()
        jax.distributed.shutdown()

    def _end(self, message: str) -> None:
        if not self._stop.is_set():
            print(f"error: {message}\nThe same command goes on from the last checkpoint.", file=sys.stderr)
            self._exit()
        threading.Event().wait()  # this process is ending already

    def _exit(self) -> None:
        """Ends the process, whatever its main thread waits for."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._me == 0:
            time.sleep(3 * SECONDS_BETWEEN_BEATS)  # the store ends with this process; let the others read it first
        os._exit(1)


def _index(key: str) -> int:
    return int(key.rpartition("/")[2])

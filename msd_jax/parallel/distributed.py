"""One run over many processes: how they find each other, agree, and end together.

On a TPU pod, under Slurm's srun and in a GKE JobSet, JAX finds the other processes by itself. Elsewhere, as in
launch/local.sh, --coordinator, --processes and --process_id name them, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
and JAX_PROCESS_ID in the environment. Without any of these a run is one process, and nothing here has an effect.

Every process runs the same program on the same queries, holds the same host batches and copies its own rows to its
devices. What processes might see differently, above all files, process 0 looks up for all: `from_first`.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import signal
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
from jax._src import distributed as jax_distributed  # there is no other way to the processes' key-value store
from jax.experimental import multihost_utils

from msd_jax.errors import UserError

# A set of their own, because they are needed before --config is read: a config file may touch a device.
_FLAGS = flags.FlagValues()
_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0 [{_ENVIRONMENT[0]}].", flag_values=_FLAGS)
flags.DEFINE_integer("processes", None, f"How many processes the run has [{_ENVIRONMENT[1]}].", flag_values=_FLAGS)
flags.DEFINE_integer("process_id", None, f"Which of them this is, from 0 [{_ENVIRONMENT[2]}].", flag_values=_FLAGS)
flags.FLAGS.append_flag_values(_FLAGS)

SECONDS_BETWEEN_BEATS = 2.0
# A process that has been silent for this long is dead; compiling and reading weights do not stop the beating thread.
SECONDS_OF_SILENCE = 24.0
_EXIT_PREEMPTED = 143  # as a shell reports SIGTERM
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # JAX's key for a process that was sent SIGTERM

_peers: "_Peers | None" = None
_told = threading.Event()  # a process of the run was sent SIGTERM
_ending = threading.Event()  # on SIGTERM, without waiting for a step
_finishing = False  # SIGTERM waits for `preempted`
_last_acts: list[Callable[[], None]] = []
_questions = itertools.count(1)


def start(argv: list[str]) -> None:
    """Joins the run that this process is part of; must be called before any device is touched.

    Raises:
      UserError: only some of the three flags are given.
      RuntimeError: the coordinator did not answer.
    """
    global _peers
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
    if (jax_distributed.global_state.num_processes or 1) > 1:
        _peers = _Peers()  # who also listen for SIGTERM, by JAX's handler
    else:
        _listen_for_sigterm()


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
        if _peers is None:
            raise
        if _ending.is_set():
            threading.Event().wait()  # a thread ends this process; others ended before it, which is the error
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            _peers.finish()
            raise
        reason = str(error) or "interrupted"
        if not isinstance(error, SystemExit | KeyboardInterrupt):  # those need one line alone
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason
        if lost or "Gloo" in reason:
            time.sleep(SECONDS_OF_SILENCE + 10)  # most likely a peer died; the watching thread will name it
        _peers.fail(reason)


@contextlib.contextmanager
def finishing_steps() -> Iterator[None]:
    """Around steps: SIGTERM waits until `preempted` is asked. Elsewhere it ends the run within seconds."""
    global _finishing
    _finishing = True
    try:
        yield
    finally:
        _finishing = False
    if _told.is_set():
        _end_at_once()


def preempted() -> bool:
    """Whether all processes are to save and end now, for one was sent SIGTERM. To be asked by all, after each step."""
    # JAX has all of them stop at one number, the next that none has asked with. Questions are counted, not steps: a
    # resumed run that is preempted before it has asked at all would have passed that number already.
    return _told.is_set() if _peers is None else multihost_utils.reached_preemption_sync_point(next(_questions))


def end_preempted(message: str) -> None:
    """Ends this process, as it does all others, with the exit code of a preemption."""
    if is_first():
        print(message, file=sys.stderr)
    sys.exit(_EXIT_PREEMPTED)


def end_in_error(message: str) -> None:
    """Ends the run with exit code 1 and one line.

    At once: what libraries would still write, to a disk that is full say, fails again, with a traceback each.
    """
    if _peers:
        _peers.fail(message)
    print(message, file=sys.stderr)
    _quit(1)


def _listen_for_sigterm() -> None:
    """Takes SIGTERM from JAX and from the default, in a thread: the main one may be waiting for a device."""
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _leave_it_to_the_thread)

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                if _told.is_set():
                    _quit(_EXIT_PREEMPTED)  # told twice: whoever sends it does not want to wait
                _terminate()

    threading.Thread(target=listen, daemon=True).start()


def _leave_it_to_the_thread(number: int, frame: Any) -> None:
    """Does nothing: the thread reads the signal's number from the pipe."""


def _terminate() -> None:
    """Does what SIGTERM asks for; in no thread that steps or the others of the run depend on."""
    _told.set()
    if not _finishing:
        _end_at_once()


def _end_at_once() -> None:
    _ending.set()
    if _peers is None or _peers.first:
        print("preempted: nothing finished is lost; run the same command again to resume", file=sys.stderr)
    if _peers:
        _peers.exit(_EXIT_PREEMPTED)
    _quit(_EXIT_PREEMPTED)


def _quit(code: int) -> None:
    """Ends the process, whatever its main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    _do_last_acts()
    os._exit(code)


def at_end(act: Callable[[], None]) -> None:
    """Has `act` done when this process ends, however it does; only SIGKILL and the like prevent it."""
    _last_acts.append(act)


@atexit.register
def _do_last_acts() -> None:
    while _last_acts:
        _last_acts.pop()()


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
        raise UserError(f"{_peers.names[process] if _peers else f'process {process}'} {otherwise}")


class _Peers:
    """The processes of the run: tells the others that this one is alive, and ends this one once one of them is not."""

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
        self._asked = 0  # seconds for which the store has not answered
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        self._thread.start()
        threading.Thread(target=self._await_answers, daemon=True).start()

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self._me == 0

    def _await_answers(self) -> None:
        """Ends this process once the store is silent: a stopped coordinator lets calls hang for minutes."""
        while not self._stop.wait(1.0):
            self._asked += 1  # counted, not measured: this process may have been stopped itself
            if self._asked > SECONDS_OF_SILENCE:
                self._end(f"{self.names[0]}, which coordinates the run, is silent for {SECONDS_OF_SILENCE:.0f} seconds")

    def _exchange(self) -> None:
        beat = 0
        last: dict[int, tuple[str | None, float]] = {}  # of each process, its latest beat and when it was first seen
        while not self._stop.wait(SECONDS_BETWEEN_BEATS):
            beat += 1
            try:
                self._store.key_value_set(f"msd_jax/beat/{self._me}", str(beat), allow_overwrite=True)
                beats = dict(self._store.key_value_dir_get("msd_jax/beat/"))
                failures = self._store.key_value_dir_get("msd_jax/failed/")
                noticed = not _told.is_set() and self._noticed()
            except jax.errors.JaxRuntimeError as error:
                self._end(f"{self.names[0]}, which coordinates the run, cannot be reached: {error}")
            self._asked, now = 0, time.monotonic()
            for key, reason in failures:
                self._end(f"{self.names[_index(key)]} ended: {reason}")
            if noticed:
                threading.Thread(target=_terminate, daemon=True).start()
            for process, name in enumerate(self.names):
                seen = beats.get(f"msd_jax/beat/{process}")
                if last.setdefault(process, (seen, now))[0] != seen:
                    last[process] = (seen, now)
                if now - last[process][1] > SECONDS_OF_SILENCE:
                    self._end(f"{name} died: no sign of life for {SECONDS_OF_SILENCE:.0f} seconds")

    def _noticed(self) -> bool:
        """Whether some process was sent SIGTERM."""
        try:
            return bool(self._store.key_value_try_get(_NOTICE))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return False
            raise

    def fail(self, reason: str) -> None:
        """Tells the others why this process ends, and ends it."""
        line = " ".join(reason.removeprefix("error: ").split())[:1000]
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"msd_jax/failed/{self._me}", line)
        print(f"error: {self.names[self._me]}: {reason.removeprefix('error: ')}", file=sys.stderr)
        self._stop.set()
        self.exit(1)

    def finish(self) -> None:
        """Waits for the others, so that none takes this one for dead, and leaves the run."""
        self._store.wait_at_barrier("msd_jax/finish", 24 * 3600 * 1000)
        self._stop.set()
        self._thread.join()
        jax.distributed.shutdown()

    def _end(self, message: str) -> None:
        if not self._stop.is_set():
            self._stop.set()
            print(f"error: {message}\nRun the same command again to resume from the last checkpoint.", file=sys.stderr)
            self.exit(1)
        threading.Event().wait()  # this process is ending already

    def exit(self, code: int) -> None:
        """Ends the process, after the others can have read why."""
        time.sleep((3 if self.first else 1.5) * SECONDS_BETWEEN_BEATS)  # the store ends with process 0
        _quit(code)


def _index(key: str) -> int:
    return int(key.rpartition("/")[2])

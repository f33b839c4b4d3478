"""SIGTERM: all processes of a run save the same step and end with exit code 143, or end at once between steps.

SIGTERM may reach one process alone, at any moment. After each step every process asks `agreed`, and all must get the
same answer. The nth question starts a sum over the devices of all processes, of those that were told so far, and is
answered by the sum that the question before it started. Then

- all get the same answer to the same question, since a sum is one number on all of them, and end after the same step;
- nobody waits for another: the sum of question n - 1 is complete before step n is, in whose devices' queues it stands
  (processes on CPUs do wait);
- whoever is told before question n ends all of them at question n + 1, one step later than it asked.

No clock, store or order of messages takes part, and one process is the case of one summand. A second sum answers in the
same way whether a checkpoint is to be saved again, which one process alone may know too.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msd_jax.parallel import peers, sharding

EXIT_PREEMPTED = 143  # as a shell reports SIGTERM

_told = threading.Event()  # a process of the run was sent SIGTERM
_ending = threading.Lock()  # taken once by what ends this process without waiting for a step
_finishing = False  # SIGTERM waits for `agreed`
_sums: jax.Array | None = None  # that the last question started


@contextlib.contextmanager
def finishing_steps() -> Iterator[None]:
    """Around steps: SIGTERM waits until `agreed` is asked. Elsewhere it ends the run within seconds."""
    global _finishing
    _finishing = True
    try:
        yield
        if peers.joined:
            peers.joined.meet()  # or one that is done could end at once while another still saves
    finally:
        _finishing = False
    if _told.is_set():
        end_at_once()


def agreed(save_again: bool = False) -> tuple[bool, bool]:
    """What all processes are to do now, since one or more want it. To be asked by all, after each step.

    Args:
      save_again: whether this process wants a checkpoint to be saved again.

    Returns:
      Whether to save and end, for one was sent SIGTERM; and whether some process wanted to save again when the question
      before this one was asked.
    """
    global _sums
    told, wanting = (0, 0) if _sums is None else map(int, sharding.fetch(_sums))
    if told:
        _told.set()  # this process ends by its main thread
        return True, wanting > 0
    mesh, add = _summation()
    one_each_Dx2 = np.full((mesh.size, 2), (_told.is_set(), save_again), np.int32)
    _sums = add(jax.make_array_from_callback((mesh.size, 2), _over(mesh), lambda index: one_each_Dx2[index]))
    if sharding.platform(mesh) == "cpu":
        # A CPU has no queue: the sum could run beside those of the next program, and meet the wrong partner.
        jax.block_until_ready(_sums)
    return False, wanting > 0


@functools.cache
def _summation() -> tuple[Mesh, Any]:
    """(mesh of all devices in a row, the program that adds the two numbers of each)."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    add = functools.partial(jnp.sum, axis=0)
    return mesh, jax.jit(add, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _over(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("device"))


def end_preempted(message: str) -> NoReturn:
    """Ends this process, as it does all others, with the exit code of a preemption."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr)
    sys.exit(EXIT_PREEMPTED)


def listen() -> None:
    """Handles SIGTERM in a thread from now on, since the main one may be waiting for a device."""
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _leave_it_to_the_thread)

    def read_signals() -> None:
        times = 0
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                times += 1
                if times > 1:
                    peers.quit_process(EXIT_PREEMPTED)  # whoever sends it twice does not want to wait
                threading.Thread(target=terminate, daemon=True).start()

    threading.Thread(target=read_signals, daemon=True).start()


def _leave_it_to_the_thread(number: int, frame: Any) -> None:
    """Does nothing: the thread reads the signal's number from the pipe."""


def terminate() -> None:
    """Does what SIGTERM asks for; in no thread that steps or the others of the run depend on."""
    if _told.is_set():
        return
    peers.sign.told = True
    _told.set()
    if not _finishing:
        end_at_once()


def end_at_once() -> NoReturn:
    """Ends this process, and by its sign the others, without finishing a step."""
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # another thread ends this process already
    if peers.joined is None or peers.joined.first:
        print("preempted: nothing finished is lost; run the same command again to resume", file=sys.stderr)
    peers.sign.left = True
    if peers.joined:
        peers.joined.end(EXIT_PREEMPTED)
    peers.quit_process(EXIT_PREEMPTED)

"""The processes of one run: each shows the others that it is alive and moves on, and ends once one of them does not.

They talk through the key-value store of JAX's coordinator, process 0, in threads: a main thread that waits for a device
delays neither a sign of life nor an end. A process that is alone has nobody to talk to, and ends itself where it hangs.
"""

import atexit
import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import jax
from jax._src import distributed as jax_distributed  # there is no other way to the processes' key-value store

EXIT_LOST_PEER = 42  # another process died, cannot be reached, or hangs: the same command resumes
SECONDS_BETWEEN_BEATS = 2.0
# A process that has been silent for this long is dead; compiling and reading weights do not stop the beating thread.
SECONDS_OF_SILENCE = 24.0
_TIMED_OUT = "DEADLINE_EXCEEDED"  # says JAX of a barrier that not all have reached
_RESUME = "Run the same command again to resume from the last checkpoint."


@dataclasses.dataclass
class Sign:
    """What a process tells the others of itself.

    Attributes:
      beat: grows while the process is alive.
      moves: grows while its main thread moves on.
      at: what its main thread began last.
      told: it was sent SIGTERM.
      left: it ends by SIGTERM now, without finishing a step.
      failed: why it ends, if it is for an error.
    """

    beat: int = 0
    moves: int = 0
    at: str = "setting up"
    told: bool = False
    left: bool = False
    failed: str = ""


joined: "Peers | None" = None  # the processes of the run, this one among them; None where it is alone
sign = Sign()  # of this process
_stall_limit = 0.0
_last_acts: list[Callable[[], None]] = []


def join(terminate: Callable[[], None], end_at_once: Callable[[], None]) -> None:
    """Begins to talk to the other processes of the run, if there are any.

    Args:
      terminate: called in a thread once some process was sent SIGTERM.
      end_at_once: called in a thread once some process ends by SIGTERM without finishing a step.
    """
    global joined
    if (jax_distributed.global_state.num_processes or 1) > 1:
        joined = Peers(terminate, end_at_once)


def moved(to: str = "") -> None:
    """The main thread moved on, `to` what it begins now. To be said wherever work goes on for long."""
    sign.moves += 1
    sign.at = to or sign.at


@contextlib.contextmanager
def unhurried(what: str) -> Iterator[None]:
    """Around what may take hours without a sign of progress and is watched by others, such as a download."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(SECONDS_BETWEEN_BEATS):
            moved(what)

    threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def end_when_stalled(seconds: float) -> None:
    """Ends the run, from now on, once no process of it has moved on for `seconds`; 0: never."""
    global _stall_limit
    if joined is None and seconds and not _stall_limit:
        threading.Thread(target=_watch_alone, daemon=True).start()
    _stall_limit = seconds


def at_end(act: Callable[[], None]) -> None:
    """Has `act` done when this process ends, however it does; only SIGKILL and the like prevent it."""
    _last_acts.append(act)


@atexit.register
def do_last_acts() -> None:
    """Does now what `at_end` was given: the interpreter's own end would be too late for what needs threads."""
    while _last_acts:
        _last_acts.pop()()


def quit_process(code: int) -> NoReturn:
    """Ends the process, whatever its main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    do_last_acts()
    os._exit(code)


class _Stall:
    """For how long nobody has moved on: counted, not measured, for this process may have been stopped itself."""

    def __init__(self) -> None:
        self._moves, self._seconds = -1, 0.0

    def found(self, moves: int) -> bool:
        """Whether the limit is reached; to be asked at each beat, with the number of moves so far."""
        self._seconds = 0.0 if moves != self._moves else self._seconds + SECONDS_BETWEEN_BEATS
        self._moves = moves
        return 0 < _stall_limit < self._seconds


def _show_threads() -> None:
    """Prints what each thread of this process does."""
    with contextlib.suppress(OSError, ValueError):  # stderr is no file, as in a notebook
        faulthandler.dump_traceback(sys.stderr)


def _stalled(where: str) -> str:
    return f"no progress for {_stall_limit:.0f} seconds (config.train.stall_limit); {where}"


def _watch_alone() -> None:
    stall = _Stall()
    while not stall.found(sign.moves):
        time.sleep(SECONDS_BETWEEN_BEATS)
    _show_threads()
    print(f"error: {_stalled(f'this process hangs at: {sign.at}')}\n{_RESUME}", file=sys.stderr)
    quit_process(EXIT_LOST_PEER)


class Peers:
    """The processes of the run: tells the others how this one is, and ends it once one of them is lost.

    Attributes:
      names: of the processes, for messages.
      first: whether this is process 0.
      ending: set once a thread ends this process.
    """

    def __init__(self, terminate: Callable[[], None], end_at_once: Callable[[], None]):
        """Waits for the others. See `join`."""
        # Not from jax.process_index(), which would set up the devices before --jax_platforms is read.
        state = jax_distributed.global_state
        self._store = cast(Any, state.client)
        self._me, count = state.process_id, state.num_processes
        self._terminate, self._end_at_once = terminate, end_at_once
        self._stop, self.ending, self._meetings = threading.Event(), threading.Event(), 0
        self._store.key_value_set(f"msd_jax/host/{self._me}", socket.gethostname())
        hosts = [self._store.blocking_key_value_get(f"msd_jax/host/{i}", 60_000) for i in range(count)]
        self.names = [f"process {i} on {host}" for i, host in enumerate(hosts)]
        self._coordinator, self.first = f"{self.names[0]}, which coordinates the run,", self._me == 0
        if self.first:
            print(f"{count} processes: " + ", ".join(f"{i} on {host}" for i, host in enumerate(hosts)), flush=True)
        self._unanswered = 0  # seconds for which the store has not answered
        self._thread = threading.Thread(target=self._exchange, daemon=True)
        self._thread.start()
        threading.Thread(target=self._await_answers, daemon=True).start()

    def _await_answers(self) -> None:
        """Ends this process once the store is silent: a stopped coordinator lets calls hang for minutes."""
        while not self._stop.wait(1.0):
            self._unanswered += 1  # counted, not measured: this process may have been stopped itself
            if self._unanswered > SECONDS_OF_SILENCE:
                self._lose(f"{self._coordinator} is silent for {SECONDS_OF_SILENCE:.0f} seconds")

    def _exchange(self) -> None:
        stall = _Stall()
        last: dict[int, tuple[int | None, float]] = {}  # of each process, its latest beat and when it was first seen
        while not self._stop.wait(SECONDS_BETWEEN_BEATS):
            sign.beat += 1
            try:
                self._publish()
                signs = self._signs()
            except jax.errors.JaxRuntimeError as error:
                self._lose(f"{self._coordinator} cannot be reached: {error}")
            self._unanswered, now = 0, time.monotonic()
            self._obey(signs)
            for process, name in enumerate(self.names):
                beat = signs[process].beat if process in signs else None
                if last.setdefault(process, (beat, now))[0] != beat:
                    last[process] = (beat, now)
                if now - last[process][1] > SECONDS_OF_SILENCE:
                    self._lose(f"{name} died: no sign of life for {SECONDS_OF_SILENCE:.0f} seconds")
            if stall.found(sum(its_sign.moves for its_sign in signs.values())):
                places = (f"{self.names[process]} is at: {its_sign.at}" for process, its_sign in sorted(signs.items()))
                _show_threads()
                self._lose(_stalled("; ".join(places)))

    def _publish(self) -> None:
        text = json.dumps(dataclasses.asdict(sign))
        self._store.key_value_set(f"msd_jax/sign/{self._me}", text, allow_overwrite=True)

    def _publish_if_possible(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._publish()

    def _signs(self) -> dict[int, Sign]:
        """The latest sign of each process that has given one."""
        entries = self._store.key_value_dir_get("msd_jax/sign/")
        return {int(key.rpartition("/")[2]): Sign(**json.loads(text)) for key, text in entries}

    def _obey(self, signs: dict[int, Sign]) -> None:
        """Does what the other processes' ends ask for."""
        for process, its_sign in signs.items():
            if its_sign.failed and process != self._me:
                if _TIMED_OUT in its_sign.failed:
                    _show_threads()
                self._lose(f"{self.names[process]} ended: {its_sign.failed}", code=1)
        for asked, act in (("left", self._end_at_once), ("told", self._terminate)):
            if any(getattr(its_sign, asked) for its_sign in signs.values()):
                threading.Thread(target=act, daemon=True).start()
                break

    def meet(self) -> None:
        """Waits until every process has come here."""
        self._meetings += 1
        a_day = 24 * 3600 * 1000  # in milliseconds; `_exchange` looks for who is lost
        self._store.wait_at_barrier(f"msd_jax/meeting/{self._meetings}", a_day)

    def finish(self) -> None:
        """Waits for the others, so that none takes this one for dead, and leaves the run."""
        self.meet()
        self._stop.set()
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, reason: str) -> NoReturn:
        """Tells the others why this process ends, and ends it."""
        reason = reason.removeprefix("error: ")
        print(f"error: {self.names[self._me]}: {reason}", file=sys.stderr)
        sign.failed = " ".join(reason.split())[:1000] or "an error"
        self.end(1)

    def end(self, code: int) -> NoReturn:
        """Ends this process after the others can have read why, in its sign."""
        self.ending.set()
        self._stop.set()
        threading.Thread(target=self._publish_if_possible, daemon=True).start()  # a stopped coordinator never answers
        time.sleep((3 if self.first else 1.5) * SECONDS_BETWEEN_BEATS)  # the store ends with process 0
        quit_process(code)

    def _lose(self, message: str, code: int = EXIT_LOST_PEER) -> NoReturn:
        """Ends this process because of another, without a word to those that see the same."""
        if not self._stop.is_set():
            self.ending.set()
            self._stop.set()
            print(f"error: {message}\n{_RESUME}", file=sys.stderr)
            time.sleep((3 if self.first else 1.5) * SECONDS_BETWEEN_BEATS)
            quit_process(code)
        threading.Event().wait()  # this process is ending already
        raise AssertionError

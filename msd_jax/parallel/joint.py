"""Saves in the background in which all processes take part: where one fails, all know, and none waits for it."""

import itertools
import threading
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # there is no other way to the processes' barriers

_numbers = itertools.count(1)  # of all saves of this process, whichever run they are part of
_STAGES = ("write_complete", "commit_complete")  # of a save by Orbax, as they are named in the keys of its barriers


class Failed(Exception):
    """Another process could not do its part; why is that one's to tell."""


class Saves:
    """This process's part in the saves, which all processes begin in the same order.

    Between its stages Orbax has the processes wait for each other, and would wait for one that failed until its time is
    up. Here that one leaves a word and passes the other stages too, so that the others pass them and find the word.
    """

    def __init__(self) -> None:
        self._number, self._passed, self._beginner = 0, 0, 0

    def begin(self) -> None:
        """This thread begins the next save."""
        self._number, self._passed, self._beginner = next(_numbers), 0, threading.get_ident()

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes where Orbax asks for it.

        Raises:
          Failed: another process could not write its part.
        """
        stage = next((number for number, name in enumerate(_STAGES, start=1) if name in key), None)
        if stage is None:
            if threading.get_ident() != self._beginner and self._passed < len(_STAGES):
                self._fail(timeout_ms)  # the save ends, in the background, before it passed its stages
            _store().wait_at_barrier(key, timeout_ms)
            return
        self._pass(stage, timeout_ms)
        if _store().key_value_dir_get(self._words()):
            raise Failed("another process could not write its part")

    def _fail(self, timeout_ms: int) -> None:
        _store().key_value_set(f"{self._words()}{jax.process_index()}", "failed", allow_overwrite=True)
        for stage in range(self._passed + 1, len(_STAGES) + 1):
            self._pass(stage, timeout_ms)

    def _pass(self, stage: int, timeout_ms: int) -> None:
        self._passed = stage
        _store().wait_at_barrier(f"msd_jax/save/{self._number}/{stage}", timeout_ms)

    def _words(self) -> str:
        return f"msd_jax/save/{self._number}/failed/"


def _store() -> Any:
    return jax_distributed.global_state.client

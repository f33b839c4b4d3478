"""A window of steps that JAX's profiler traces to WORKDIR/profile, for xprof: `xprof --logdir WORKDIR/profile`."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from msd_jax.io import stores
from msd_jax.io.console import log

AFTER = 2  # steps of this start, which compile


class Window:
    """Traces `config.train.profile_steps` steps of this start, generation included, on every process."""

    def __init__(self, directory: pathlib.Path, steps: int, first: int, last: int):
        """
        Args:
          directory: WORKDIR/profile.
          steps: how many are traced; 0: none.
          first, last: steps that are finished when this start begins, and when it ends.
        """
        self._directory, begin = directory, min(first + AFTER, max(last - steps, first))
        self._steps = range(begin, min(begin + steps, last))

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around what the host does for the step after `step` finished ones."""
        if step not in self._steps:
            yield
            return
        if step == self._steps[0]:
            jax.profiler.start_trace(self._directory)
        with jax.profiler.StepTraceAnnotation("step", step_num=step + 1):
            yield

    def end(self, step: int, results: object) -> None:
        """Ends the trace where `step` finished steps, the last of which gives `results`, are all that it is to hold."""
        if self._steps and step == self._steps[-1] + 1:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            stores.add(self._directory)
            log(f"profile of steps {self._steps[0] + 1} to {step}: {stores.told(self._directory)}")

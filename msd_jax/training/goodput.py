"""Where a run's wall time goes: WORKDIR/goodput.jsonl, one row for each time that the run was started."""

import contextlib
import datetime
import pathlib
import time
from collections.abc import Iterator, Sequence

from msd_jax.io import compilations, jsonl

PRODUCTIVE = ("steps", "generation")
PHASES = (*PRODUCTIVE, "compilation", "checkpoints", "evaluation", "other")
_NAME, _COLUMNS = "goodput.jsonl", {"began": str, "steps": list, "seconds": dict, "compiled": int, "read": int}


class Clock:
    """Gives each second of a start to one of PHASES.

    The phase is what the main thread does, or waits for: while the devices are at a step, the host waits in "steps".
    Compiling counts as "compilation" in whatever phase it is needed. Set-up and export are "other".
    """

    def __init__(self, workdir: pathlib.Path, began: float):
        """`began`: the host's clock when this start began; what is before this call is "other"."""
        self._file = jsonl.JsonLines(workdir / _NAME)
        self._earlier = self._file.read(**_COLUMNS)
        self._before = compilations.so_far()
        now = time.time() - (time.perf_counter() - began)
        self._row: jsonl.Row = {
            "began": datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(timespec="seconds"),
            "steps": [0, 0],
        }
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since, self._compiled = "other", began, self._before.seconds

    def enter(self, phase: str) -> str:
        """Begins a phase, and returns the one that ends by it."""
        now, compiled = time.perf_counter(), compilations.so_far().seconds
        self._seconds["compilation"] += compiled - self._compiled
        self._seconds[self._phase] += now - self._since - (compiled - self._compiled)
        ended, self._phase, self._since, self._compiled = self._phase, phase, now, compiled
        return ended

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within it, time counts as `name`, unless another phase begins inside."""
        outer = self.enter(name)
        try:
            yield
        finally:
            self.enter(outer)

    def resume(self, step: int) -> None:
        """This start goes on from `step`."""
        self._row["steps"] = [step, step]

    def keep(self, step: int) -> jsonl.Row:
        """Writes the row of this start, which has come to `step`, below those of earlier ones; returns it."""
        self.enter(self._phase)
        done = compilations.so_far()
        self._row["steps"][1] = step
        self._row |= {
            "seconds": {name: round(seconds, 3) for name, seconds in self._seconds.items()},
            "compiled": done.compiled - self._before.compiled,
            "read": done.read - self._before.read,
        }
        self._file.replace([*self._earlier, self._row])
        return self._row


def read(workdir: pathlib.Path) -> list[jsonl.Row]:
    """The rows of a workdir, the earliest start first."""
    return jsonl.read(workdir / _NAME, **_COLUMNS)


def describe(rows: Sequence[jsonl.Row]) -> str:
    """One line: the share of the wall time of all starts that went into each phase, the productive ones first."""
    seconds = {name: sum(row["seconds"].get(name, 0.0) for row in rows) for name in PHASES}
    total = sum(seconds.values()) or 1.0
    productive = sum(seconds[name] for name in PRODUCTIVE) / total

    def shares(names: Sequence[str]) -> str:
        return ", ".join(f"{name} {seconds[name] / total:.0%}" for name in names)

    starts = f" in {len(rows)} starts" if len(rows) > 1 else ""
    compiled, read = (sum(row[key] for row in rows) for key in ("compiled", "read"))
    return (
        f"goodput {productive:.0%} of {datetime.timedelta(seconds=round(total))}{starts} ({shares(PRODUCTIVE)}); "
        f"{shares(PHASES[len(PRODUCTIVE) :])}; {compiled} programs compiled, {read} read from the cache"
    )

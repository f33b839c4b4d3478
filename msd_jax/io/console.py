"""What a run shows while it works: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

from msd_jax.parallel import distributed, peers

# Only process 0 of a pod prints. Off a terminal, rich would fold wide tables at 80 columns.
_width = None if rich.console.Console().is_terminal else 140
console = rich.console.Console(width=_width, highlight=False)
SECONDS_BETWEEN_LINES = 10.0


def log(text: str) -> None:
    """One line of plain text, from process 0."""
    peers.moved()
    if distributed.is_first():
        console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Yields advance(done, status): how many of `total` are done, and a few words on how it goes."""

    def note(done: int) -> None:
        peers.moved(f"{what} {done}/{total}")

    note(done)
    with _display(what, total, done, shown) as display:

        def advance(done: int, status: str) -> None:
            note(done)
            display(done, status)

        yield advance


@contextlib.contextmanager
def _display(what: str, total: int, done: int, shown: bool) -> Iterator[Callable[[int, str], None]]:
    """What process 0 shows of a progress; the others show nothing."""
    if not distributed.is_first() or not shown:
        yield _ignore
    elif console.is_terminal:
        with _bar() as bar:
            task = bar.add_task(what, total=total, completed=done, status="")

            def move(done: int, status: str) -> None:
                bar.update(task, completed=done, status=status)

            yield move
    else:
        last = 0.0

        def print_line(done: int, status: str) -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES or done == total:
                last = time.monotonic()
                log(f"{what} {done}/{total}  {status}")

        yield print_line


def _ignore(done: int, status: str) -> None:
    """Shows nothing."""


def _bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=12),  # leaves room for the figures at 80 columns
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[status]}", markup=False),
        console=console,
    )

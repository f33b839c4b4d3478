"""What a run shows while it works: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.measure
import rich.progress
import rich.segment
import rich.table
import rich.text

from msd_jax.io import compilations
from msd_jax.parallel import distributed, peers

console = rich.console.Console(highlight=False)  # only process 0 of a pod prints
SECONDS_BETWEEN_LINES = 10.0
LONGEST_NAME = 40  # of a table's first column, where the table is wider than the terminal


def log(text: str) -> None:
    """One line of plain text, from process 0."""
    peers.moved()
    if distributed.is_first():
        console.print(text, markup=False, soft_wrap=True)


def show_table(table: rich.table.Table) -> None:
    """Prints a table from process 0 without cutting a cell.

    Where it is wider than the terminal, its first column is folded and then the terminal breaks its lines; off a
    terminal nothing is.
    """
    if not distributed.is_first():
        return
    for column in table.columns:
        column.no_wrap = True
    if console.is_terminal and _width(table) > console.width:
        table.columns[0].no_wrap, table.columns[0].max_width = False, LONGEST_NAME
    drawn = console.render(table, console.options.update(width=max(_width(table), 1)))
    console.print(rich.segment.Segments(drawn), soft_wrap=True, end="")


def _width(table: rich.table.Table) -> int:
    return rich.measure.Measurement.get(console, console.options.update(max_width=10_000), table).maximum


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
        compilations.listen()
        with _bar() as bar:
            task = bar.add_task(what, total=total, completed=done, status="")

            def move(done: int, status: str) -> None:
                bar.update(task, completed=done, status=status)

            yield move
    else:
        compilations.listen()
        last, at = 0.0, done

        def print_line(done: int, status: str) -> None:
            nonlocal last, at
            at = done
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES or done == total:
                last = time.monotonic()
                log(f"{what} {done}/{total}  {status}")

        def print_compilation() -> None:
            if text := compilations.current():  # not by log: it is no sign that the run moves on
                console.print(f"{what} {at}/{total}  {text}", markup=False, soft_wrap=True)

        with _repeating(print_compilation):
            yield print_line


@contextlib.contextmanager
def _repeating(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` in a thread, every SECONDS_BETWEEN_LINES."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(SECONDS_BETWEEN_LINES):
            act()

    threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _ignore(done: int, status: str) -> None:
    """Shows nothing."""


def _bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=6),  # leaves room for the figures at 80 columns
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        _Status(),
        console=console,
    )


class _Status(rich.progress.ProgressColumn):
    """How it goes, or what is being compiled meanwhile."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(compilations.current() or task.fields["status"])

"""How far a run has come: bars on a terminal, elsewhere a line every few seconds. Both go to stderr."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import rich.progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from experiments.results import Progress

Update = Callable[[str, Progress], None]
SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def shown(studies: Sequence[str]) -> Iterator[Update]:
    """Yields `update(study, progress)`, to be called as the work goes on."""
    console = Console(stderr=True)
    on_terminal = console.is_terminal and not console.is_dumb_terminal
    with _bars(console, studies) if on_terminal else _lines(console) as update:
        yield update


def time_left(seconds: float, done: float) -> str:
    """The time that is left at the mean speed so far, as h:mm:ss or m:ss.

    >>> time_left(30.0, 0.25)
    '1:30 left'
    """
    if not 0 < done <= 1:
        return ""
    left = round(seconds * (1 - done) / done)
    hours, minutes = divmod(left // 60, 60)
    return f"{hours}:{minutes:02}:{left % 60:02} left" if hours else f"{minutes}:{left % 60:02} left"


class _TimeLeft(rich.progress.ProgressColumn):
    """rich's own column forgets a study's speed after 30 seconds without news; a compilation takes longer."""

    def render(self, task: rich.progress.Task) -> Text:
        return Text("" if task.finished else time_left(task.elapsed or 0.0, float(task.completed)))


@contextlib.contextmanager
def _bars(console: Console, studies: Sequence[str]) -> Iterator[Update]:
    # The message is kept whole. The bar and the note share the remaining room, and the note ends in an ellipsis.
    kept, bar, note = Column(no_wrap=True), Column(ratio=1), Column(ratio=2, no_wrap=True, overflow="ellipsis")
    columns = (
        rich.progress.TextColumn("{task.description}", table_column=kept.copy()),
        rich.progress.TaskProgressColumn(table_column=kept.copy()),
        _TimeLeft(table_column=kept.copy()),
        rich.progress.BarColumn(bar_width=None, table_column=bar),
        rich.progress.TextColumn("{task.fields[note]}", markup=False, table_column=note),
    )
    with rich.progress.Progress(*columns, console=console, expand=True) as bars:
        tasks = {study: bars.add_task(study, start=False, total=1.0, note="") for study in studies}

        def update(study: str, progress: Progress) -> None:
            bars.start_task(tasks[study])  # the clock of a study starts with its first news
            bars.update(tasks[study], completed=progress.done, note=progress.note)

        yield update


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Update]:
    started: dict[str, float] = {}
    latest: list[tuple[str, Progress]] = []
    stop = threading.Event()

    def show() -> None:
        study, progress = latest[-1]
        left = time_left(time.monotonic() - started[study], progress.done)
        parts = [f"{progress.done:.0%}", *([left] if left and progress.done < 1 else []), progress.note]
        console.print(f"{study}: {', '.join(parts)}", markup=False, highlight=False, soft_wrap=True)

    def update(study: str, progress: Progress) -> None:
        is_new = study not in started
        started.setdefault(study, time.monotonic())
        latest[:] = [(study, progress)]
        if is_new or progress.done >= 1:
            show()

    def repeat() -> None:  # in another thread: a study that compiles for a minute has no news to give
        while not stop.wait(SECONDS_BETWEEN_LINES):
            if latest:
                show()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield update
    finally:
        stop.set()
        thread.join()

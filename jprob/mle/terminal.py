"""Messages of `fit` for a person: a bar for a terminal, lines for a log."""

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator

import jax

_SECONDS_BETWEEN_LINES = 5.0


def tell(line: str, *, everywhere: bool = False) -> None:
    """Prints a line on stderr, on process 0 only unless `everywhere`."""
    if everywhere or jax.process_index() == 0:
        print(f"fit: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(num_steps: int, kind: str) -> Iterator[Callable[[int, float, float | None], None]]:
    """Yields `show(step, loss, steps_per_second)`. A terminal without rich gets lines, like a log."""
    if kind == "none" or jax.process_index():
        yield lambda step, loss, speed: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress

        columns = ("fit: step", MofNCompleteColumn(), BarColumn(), "{task.fields[note]}")
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=num_steps, note="compiling")
            yield lambda step, loss, speed: bar.update(task, completed=step, note=_note(num_steps, step, loss, speed))
    else:
        yield _lines(num_steps)


def _lines(num_steps):
    told = time.monotonic()

    def show(step, loss, speed):
        nonlocal told
        if step == num_steps or time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            tell(f"step {step} of {num_steps}, {_note(num_steps, step, loss, speed)}")

    return show


def _note(num_steps, step, loss, speed):
    if speed is None:
        return f"loss {loss:.4g}"
    left = round((num_steps - step) / speed)
    return f"loss {loss:.4g}, {speed:.4g} steps/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"

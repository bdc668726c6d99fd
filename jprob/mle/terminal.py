"""What `fit` tells a person: a bar for a terminal, lines for a log."""

import contextlib
import importlib.util
import os
import sys
import time

import jax

_SECONDS_BETWEEN_LINES = 5.0


def tell(line):
    """Of several processes the first one does."""
    if jax.process_index() == 0:
        print(f"fit: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(plan, kind):
    """Yields `show(step, loss, pace)`. A terminal without rich gets lines, like a log."""
    if kind == "none":
        yield lambda step, loss, pace: None
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and importlib.util.find_spec("rich"):
        with _bar(plan) as show:
            yield show
    else:
        yield _lines(plan)


@contextlib.contextmanager
def _bar(plan):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress

    columns = ("fit: step", MofNCompleteColumn(), BarColumn(), "{task.fields[note]}")
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=plan.num_steps, note="compiling")
        yield lambda step, loss, pace: bar.update(task, completed=step, note=_note(plan, step, loss, pace))


def _lines(plan):
    told = time.monotonic()

    def show(step, loss, pace):
        nonlocal told
        if step == plan.num_steps or time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            tell(f"step {step} of {plan.num_steps}, {_note(plan, step, loss, pace)}")

    return show


def _note(plan, step, loss, pace):
    if not pace.total_rows:
        return f"loss {loss:.4g}"
    speed = pace.total_rows * plan.record_every / pace.total_seconds
    left = round((plan.num_steps - step) / speed)
    return f"loss {loss:.4g}, {speed:.4g} steps/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"

"""Signals to `fit`: noted as they arrive, and acted upon between two chunks of training."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def caught() -> Iterator[list[int]]:
    """Yields a list to which SIGINT and SIGTERM are added as they arrive. A second SIGINT interrupts at once."""
    numbers: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield numbers  # no other thread may have handlers
        return
    process = os.getpid()

    def note(number, frame):
        if os.getpid() != process:  # a forked worker of a data loader, whose signals are its own
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
            return
        numbers.append(number)
        if numbers.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # One that is ignored stays so, as under nohup; one that was set outside of Python could not be set again.
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, note)
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

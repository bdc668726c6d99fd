"""Signals to `fit`: noticed the moment they arrive, and acted upon where training stands still."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def caught() -> Iterator[list[int]]:
    """Yields a list to which SIGINT and SIGTERM are added as they arrive. A second SIGINT ends the process at once.

    A handler in Python waits until the main thread comes back from XLA, which may compile for minutes. So there is a
    thread, at the other end of the descriptor to which the interpreter writes a signal's number the moment it arrives.
    """
    numbers = []
    if threading.current_thread() is not threading.main_thread():
        yield numbers  # no other thread may have handlers
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=_watch, args=(reader, numbers), daemon=True)
    thread.start()
    _open.append((reader, writer, descriptor, handlers))
    try:
        yield numbers
    finally:
        _open.pop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(writer)  # the thread reads the end, and returns
        thread.join()
        os.close(reader)


def _watch(reader, numbers):
    while data := os.read(reader, 1):
        if data[0] in (signal.SIGINT, signal.SIGTERM):
            numbers.append(data[0])
        if numbers.count(signal.SIGINT) == 2:
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a bar hides it
            os.write(2, show_cursor + b"\nfit: ended at once by a second Ctrl-C; what was saved before stays\n")
            os._exit(128 + signal.SIGINT)


_open = []  # of each `caught` that is in use: its pipe, and what signals did before


def _forget():
    """In a forked child, whose signals are its own: it would write them into its parent's pipe, and keep that open."""
    for reader, writer, descriptor, handlers in reversed(_open):
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(reader)
        os.close(writer)
    _open.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forget)

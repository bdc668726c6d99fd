"""Ctrl-C that works at once, also while the main thread sits in a compilation of minutes.

Python runs a signal handler between two bytecodes of the main thread, and a call into XLA is one bytecode. The
interpreter does, however, write the signal's number to a file descriptor the moment the signal arrives; a thread waits
at the other end and ends the process. That is safe at any moment because results are written in whole transactions.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h\n"  # a progress bar hides it


class OnInterrupt:
    """The line to leave behind, and what to end before; a command sets them as it comes to have something to lose."""

    def __init__(self) -> None:
        self.line = "interrupted: nothing was written"
        self.ending: Callable[[], None] = lambda: None


@contextlib.contextmanager
def ending_at_once() -> Iterator[OnInterrupt]:
    """Within, SIGINT ends the process with status 130 and SIGTERM with 143, after the line in the `OnInterrupt`."""
    on_interrupt = OnInterrupt()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A handler in Python has to be there, or the number is not written; to do anything it would come too late.
    handlers = {number: signal.signal(number, lambda number, frame: None) for number in _SIGNALS}
    thread = threading.Thread(target=_wait, args=(reader, on_interrupt), daemon=True)
    thread.start()
    try:
        yield on_interrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.close(writer)  # the thread reads the end of the stream, and returns
        thread.join()
        os.close(reader)


def _wait(reader: int, on_interrupt: OnInterrupt) -> None:
    while data := os.read(reader, 1):
        if data[0] in _SIGNALS:
            try:
                on_interrupt.ending()
                line = (_SHOW_CURSOR if os.isatty(2) else "") + on_interrupt.line + "\n"
                with contextlib.suppress(OSError):  # nobody reads stderr any more
                    os.write(2, line.encode())  # not print: the main thread may hold the lock of sys.stderr
            finally:
                os._exit(128 + data[0])

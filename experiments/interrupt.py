"""Ctrl-C that works at once, also while the main thread sits in a compilation of minutes.

Python runs a signal handler between two bytecodes of the main thread, and a call into XLA is one bytecode. The
interpreter does, however, write the signal's number to a file descriptor the moment the signal arrives; a thread waits
at the other end and ends the process. That is safe at any moment because results are written in whole transactions.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h\n"  # a progress bar hides it


class Farewell:
    """The line to leave behind; the run rewords it as it comes to have something to lose."""

    line = "interrupted: nothing was written"


@contextlib.contextmanager
def ending_at_once() -> Iterator[Farewell]:
    """Within, SIGINT ends the process with status 130 and SIGTERM with 143, after the line in the `Farewell`."""
    farewell = Farewell()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    thread = threading.Thread(target=_wait, args=(reader, farewell), daemon=True)
    thread.start()
    # A handler in Python has to be there, or the number is not written; to do anything it would come too late.
    handlers = {number: signal.signal(number, lambda number, frame: None) for number in _SIGNALS}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield farewell
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()  # the thread reads the end of the stream, and returns
        thread.join()
        reader.close()


def _wait(reader: socket.socket, farewell: Farewell) -> None:
    while data := reader.recv(1):
        if data[0] in _SIGNALS:
            line = (_SHOW_CURSOR if os.isatty(2) else "") + farewell.line + "\n"
            os.write(2, line.encode())  # not print: the main thread may hold the lock of sys.stderr
            os._exit(128 + data[0])

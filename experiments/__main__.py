"""The command line: python -m experiments run | report | compare | results | list.

Status 0: done, under any verdicts. 1: an error in a study, a job that failed, or runs that do not agree. 2: a mistake
in the command, the config or a folder, or a disk that takes no more; one line tells it. 130 and 143: ended by Ctrl-C or
SIGTERM. The finished part is kept then, and the same command does the rest.
"""

try:  # Nothing else is imported up here: these few take 5 ms, the others .4 s, and jax a second more.
    import os
    import signal
    import sys
    from collections.abc import Sequence
except KeyboardInterrupt:
    raise SystemExit(130) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit status."""
    from experiments.interrupt import ending_at_once

    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would be taken for stdout or stderr
            os.open(os.devnull, os.O_RDWR)
    with ending_at_once() as on_interrupt:
        from experiments import commands

        return commands.execute(arguments, on_interrupt)


if __name__ == "__main__":
    # Until the watch stands, and while Python ends, a KeyboardInterrupt would be a traceback from its insides.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.exit(main())

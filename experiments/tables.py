"""Tables for people: drawn by rich on a terminal, as plain columns elsewhere."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED = 100_000
_STYLES = {"holds": "green", "falsified": "bold red", "undecided": "yellow"}


class _Console(Console):
    """rich ends the process with status 1 when `| head` has read enough; what that means is for the caller to say."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, wrapped: bool) -> None:
    """Prints to stdout. Off a terminal it has 100 columns if `wrapped`; if not, a row is a line, for grep and cut."""
    console = _Console()
    if not console.is_terminal:
        console = _Console(width=100 if wrapped else _UNLIMITED)
    table = Table(
        *header,
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        padding=(0, 2, 1 if wrapped else 0, 0),  # a blank line between rows of several lines
    )
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console.print(table)

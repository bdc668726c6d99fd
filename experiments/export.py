"""Results for people and programs: a table, CSV or SQL of a folder, and the answer to any query that only reads."""

import csv
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from experiments import folders
from experiments.errors import InputError, shown

Format = Literal["table", "csv", "sql"]

_SUMMARY = "SELECT run, name, points, first, last FROM summary ORDER BY run, name"
_EVERYTHING = "SELECT run, step, name, value FROM measurements ORDER BY run, name, step"
_UNLIMITED = 100_000
_STYLES = {"holds": "green", "falsified": "bold red", "undecided": "yellow"}
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def show(folder: Path, form: Format, query: str | None) -> None:
    """Prints the measurements of a run, or the answer to `query`.

    As a table a curve is one row with its first and last value; CSV has a row a step; SQL recreates the database.

    Raises:
      InputError: the folder holds no run, or the query is not one that reads.
    """
    if form == "sql" and query is not None:
        raise InputError("--format sql: expected table or csv with --query; sql is the whole database")
    if form == "sql":
        sys.stdout.writelines(f"{line}\n" for line in dump(folder))
    elif form == "csv":
        header, rows = answer(folder, _EVERYTHING if query is None else query)
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerows([header, *([_cell(value, repr) for value in row] for row in rows)])
    else:
        header, rows = answer(folder, _SUMMARY if query is None else query)
        cells = [[_cell(value, "{:.6g}".format) for value in row] for row in rows]
        print_table(header, cells, wrapped=False)


def answer(folder: Path, query: str) -> tuple[list[str], list[Sequence]]:
    """The columns and rows that one reading SQL statement gives."""
    with folders.existing(folder) as run:
        run.store.database.set_authorizer(_permit)
        try:
            cursor = run.store.database.execute(query)
            rows = cursor.fetchall()
        except (sqlite3.Error, sqlite3.Warning) as error:
            if getattr(error, "sqlite_errorcode", None) in folders.TORN:
                raise  # no query's fault
            raise InputError(f"--query: expected one SELECT, got {shown(query, 200)}: {error}") from None
    if cursor.description is None:
        raise InputError(f"--query: expected one SELECT, got {shown(query, 200)}")
    return [column[0] for column in cursor.description], rows


def _permit(action: int, *_: str | None) -> int:
    """Refuses all but reading: a mistyped query must not change, delete or create anything."""
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


def dump(folder: Path) -> Iterator[str]:
    """The SQL statements that make the database again."""
    with folders.existing(folder) as run:
        for line in run.store.database.iterdump():
            # SQLite writes infinity as a word that it cannot read; a number beyond the range it reads as infinity.
            yield re.sub(r",(-?)Inf\);$", r",\g<1>9e999);", line)


def _cell(value: object, number: Callable[[float], str]) -> str:
    if value is None:
        return "nan"  # which SQLite keeps as NULL
    return number(value) if isinstance(value, float) else str(value)


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
        *(Column(Text(name)) for name in header),  # a name is no markup
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        padding=(0, 2, 1 if wrapped else 0, 0),  # a blank line between rows of several lines
    )
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console.print(table)

"""What a results folder holds, as a table, CSV or SQL; and the answer to any query that only reads."""

import csv
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from experiments import folders
from experiments.errors import InputError
from experiments.tables import print_table

Format = Literal["table", "csv", "sql"]

_SUMMARY = "SELECT run, name, points, first, last FROM summary ORDER BY run, name"
_EVERYTHING = "SELECT run, step, name, value FROM measurements ORDER BY run, name, step"
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
            raise InputError(f"--query: expected one SELECT, got {query!r}: {error}") from None
    if cursor.description is None:
        raise InputError(f"--query: expected one SELECT, got {query!r}")
    return [column[0] for column in cursor.description], rows


def _permit(action: int, *_: str | None) -> int:
    """Refuses whatever is not reading: a mistyped query must not change, delete or create anything."""
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


def dump(folder: Path) -> Iterator[str]:
    """The SQL statements that make the database anew."""
    with folders.existing(folder) as run:
        for line in run.store.database.iterdump():
            # SQLite writes infinity as a word that it cannot read; a number beyond the range it reads as infinity.
            yield re.sub(r",(-?)Inf\);$", r",\g<1>9e999);", line)


def _cell(value: object, number: Callable[[float], str]) -> str:
    if value is None:
        return "nan"  # which SQLite keeps as NULL
    return number(value) if isinstance(value, float) else str(value)

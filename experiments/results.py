"""Measured results: records in an SQLite database, one transaction each.

However the process ends, its finished records are there. The database is meant to be queried, with `python -m
experiments results DIR --query ...` or any SQLite client. Its journal is a plain file (`journal_mode=DELETE`). It is
sound on network file systems; a write-ahead log in shared memory is not.
"""

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

_SINGLE = -1  # the step of a value that is one number, not a curve

SCHEMA = """
PRAGMA journal_mode=DELETE;
BEGIN;
CREATE TABLE studies (          -- the studies that are finished
    study TEXT PRIMARY KEY, finished TEXT NOT NULL, seconds REAL NOT NULL,
    sha256 TEXT NOT NULL);                    -- of its records, see Store.digest
CREATE TABLE parts (            -- the parts that are finished, also of studies that are not
    study TEXT NOT NULL, part INTEGER NOT NULL, seconds REAL NOT NULL, records INTEGER NOT NULL,
    PRIMARY KEY (study, part)) WITHOUT ROWID;
CREATE TABLE runs (             -- one row a record: a finished piece of a study
    run TEXT PRIMARY KEY, study TEXT NOT NULL, settings TEXT NOT NULL);  -- settings: a JSON object
CREATE TABLE measurements (     -- step: 0, 1, ... along a curve, -1 for a single number
    run TEXT NOT NULL REFERENCES runs, step INTEGER NOT NULL, name TEXT NOT NULL,
    value REAL,                               -- NULL is not-a-number: SQLite knows no other
    PRIMARY KEY (run, step, name)) WITHOUT ROWID;
CREATE TABLE hypotheses (
    study TEXT NOT NULL, claim TEXT NOT NULL, measured TEXT NOT NULL,
    falsified_if TEXT NOT NULL, verdict TEXT NOT NULL);
CREATE VIEW summary AS          -- one row a value or curve
    SELECT ends.run, ends.name, points, head.value AS first, tail.value AS last
    FROM (SELECT run, name, count(*) AS points, min(step) AS low, max(step) AS high
          FROM measurements GROUP BY run, name) AS ends
    JOIN measurements AS head ON head.run = ends.run AND head.name = ends.name AND head.step = low
    JOIN measurements AS tail ON tail.run = ends.run AND tail.name = ends.name AND tail.step = high;
COMMIT;
"""


Setting = str | int | float | np.number
Value = int | float | np.number | np.ndarray  # a number, or a curve: one value a step


class Record(NamedTuple):
    """A finished piece of a study: what identifies it within the study, and what was measured."""

    settings: dict[str, Setting]  # {"arm": "B", "num_classes": 10}
    values: dict[str, Value]


class Progress(NamedTuple):
    """How far a study has come."""

    done: float  # the fraction of its work that is finished, 0 to 1
    note: str  # what is being done, in a few words


class Store:
    """Records in an open database that has the tables of `SCHEMA`."""

    def __init__(self, database: sqlite3.Connection):
        self.database = database

    def write(self, study: str, record: Record) -> None:
        """Stores a record as a whole, or not at all; one with the same settings is replaced.

        Raises:
          ValueError: a value is neither a number nor a curve with at least one step.
        """
        with self.database:
            self._insert(study, record)

    def _insert(self, study: str, record: Record) -> None:
        run, rows = run_key(study, record.settings), list(_rows(record.values))
        settings = json.dumps(record.settings, sort_keys=True, default=_plain)
        self.database.execute("DELETE FROM measurements WHERE run = ?", [run])
        self.database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?)", [run, study, settings])
        self.database.executemany("INSERT INTO measurements VALUES (?, ?, ?, ?)", [(run, *row) for row in rows])

    def records(self, study: str) -> list[Record]:
        """The records of a study, in the order of writing. Each equals the one written: nan, infinity and all."""
        runs = self.database.execute("SELECT run, settings FROM runs WHERE study = ? ORDER BY rowid", [study])
        return [Record(json.loads(stored), self._values(run)) for run, stored in runs.fetchall()]

    def _values(self, run: str) -> dict[str, Value]:
        rows = self.database.execute("SELECT name, step, value FROM measurements WHERE run = ? ORDER BY step", [run])
        values: dict[str, Value] = {}
        curves: dict[str, list[float]] = {}
        for name, step, stored in rows:
            value = float("nan") if stored is None else stored
            if step == _SINGLE:
                values[name] = value
            else:
                curves.setdefault(name, []).append(value)
        return values | {name: np.array(curve) for name, curve in curves.items()}

    def finish_part(self, study: str, part: int, seconds: float, records: int) -> None:
        """Marks a part of a study as finished: so many records are its own, and all are written."""
        with self.database as database:
            database.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?)", [study, part, seconds, records])

    def finished_parts(self, study: str) -> dict[int, tuple[float, int]]:
        """The numbers of the finished parts, with the seconds and the records of each."""
        rows = self.database.execute("SELECT part, seconds, records FROM parts WHERE study = ?", [study])
        return {part: (seconds, records) for part, seconds, records in rows}

    def finish(self, study: str, seconds: float, records: Iterable[Record] = ()) -> None:
        """Stores records that were measured elsewhere and marks their study as finished: all of it, or nothing.

        The same command leaves a finished study as it is.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self.database as database:
            for record in records:
                self._insert(study, record)
            row = [study, now, seconds, self.digest(study)]
            database.execute("INSERT OR REPLACE INTO studies VALUES (?, ?, ?, ?)", row)

    def digest(self, study: str) -> str:
        """SHA-256 over the records of a study: settings and values as they are stored, in the order of writing."""
        digest = hashlib.sha256()
        query = (
            "SELECT run, settings, step, name, value FROM runs LEFT JOIN measurements USING (run) WHERE study = ? "
            "ORDER BY runs.rowid, step, name"
        )
        for row in self.database.execute(query, [study]):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def changed(self) -> list[str]:
        """The finished studies whose records are not those that were measured."""
        rows = self.database.execute("SELECT study, sha256 FROM studies").fetchall()
        return [str(study) for study, stored in rows if self.digest(study) != stored]

    def finished(self) -> dict[str, float]:
        """The finished studies, and the seconds that each took."""
        return dict(self.database.execute("SELECT study, seconds FROM studies"))

    def verdicts(self) -> dict[str, list[tuple[str, str]]]:
        """Claim and verdict of each hypothesis, by study."""
        found: dict[str, list[tuple[str, str]]] = {}
        for study, claim, verdict in self.database.execute("SELECT study, claim, verdict FROM hypotheses"):
            found.setdefault(study, []).append((claim, verdict))
        return found

    def write_hypotheses(self, rows: Iterable[Sequence[str]]) -> None:
        """Replaces all hypotheses by rows of (study, claim, measured, falsified_if, verdict)."""
        with self.database as database:
            database.execute("DELETE FROM hypotheses")
            database.executemany("INSERT INTO hypotheses VALUES (?, ?, ?, ?, ?)", rows)


def run_key(study: str, settings: dict[str, Setting]) -> str:
    """The legible primary key of a record; different settings have different keys.

    >>> run_key("gradient_law", {"num_classes": 10, "arm": "B", "start": "far off"})
    'gradient_law/arm=B,num_classes=10,start="far off"'
    """
    parts = (f"{name}={_key_part(settings[name])}" for name in sorted(settings))
    return f"{study}/{','.join(parts)}"


def _key_part(value: Setting) -> str:
    # Bare words read best. Whatever could be taken for a number or for the next setting stands in quotes.
    is_word = isinstance(value, str) and re.fullmatch(r"[^\W\d][\w'+-]*", value)
    return str(value) if is_word else json.dumps(value, default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's, for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a setting is a string or a number, got {value!r}")


def _rows(values: dict[str, Value]) -> Iterator[tuple[int, str, float]]:
    for name, value in values.items():
        array = np.asarray(value, dtype=np.float64)
        if array.ndim > 1 or array.size == 0:
            raise ValueError(f"{name}: expected a number or a curve of at least one step, got shape {array.shape}")
        first = _SINGLE if array.ndim == 0 else 0
        yield from ((step, name, number) for step, number in enumerate(array.reshape(-1).tolist(), start=first))

"""A run's folder: made once, opened again by the same command, and never mixed with another run's.

The files of a folder:

    manifest.json    how the numbers came about, see `experiments.manifest`
    results.sqlite   the numbers, see `experiments.results`
    report.html      made from the two, see `experiments.report`; also as report.md, with each figure in figures/
    parts/, jobs/    of a run that was spread over jobs, see `experiments.launch`
"""

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from experiments.errors import InputError, shown
from experiments.results import SCHEMA, Store

DATABASE, MANIFEST = "results.sqlite", "manifest.json"
TORN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)  # the codes of a file that is no database, or part of one


class Run:
    """An open results folder. Made by `create` or `existing`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], store: Store):
        self.folder, self.manifest, self.store = folder, manifest, store

    def update_manifest(self, **entries: Any) -> None:
        self.manifest |= entries
        with writing(self.folder):
            replace(self.folder / MANIFEST, _json(self.manifest))


def default(manifest: dict[str, Any]) -> Path:
    """The folder of a run that nobody named: results/<config>-<identity>."""
    return Path("results") / f"{Path(manifest['config']['file']).stem}-{manifest['identity'][:8]}"


@contextlib.contextmanager
def create(folder: Path, manifest: dict[str, Any]) -> Iterator[Run]:
    """Opens the folder of the run that `manifest` describes: a new one, or one that an earlier command began.

    Raises:
      InputError: the folder holds something else, is being written by another process, or cannot be written.
        Nothing has been touched then.
    """
    with contextlib.ExitStack() as stack:
        with writing(folder):  # around the opening alone: what fails later is no mistake in the folder's name
            stored = _stored_manifest(folder)
            if stored is None and _is_occupied(folder):
                raise InputError(f"{folder}: expected a new or empty folder, got one that holds other files")
            if stored is not None and stored["identity"] != manifest["identity"]:
                want, got = (each["identity"][:8] for each in (manifest, stored))
                raise InputError(
                    f"{folder}: expected a new folder or run {want}, got run {got} ({differences(stored, manifest)}); "
                    f"python -m experiments report {folder} redraws that one"
                )
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder))
            if stored is None:
                replace(folder / MANIFEST, _json(manifest))  # before the database: it makes the folder a run's
        database = stack.enter_context(_database(folder / DATABASE, new=True))
        yield Run(folder, stored or manifest, Store(database))


@contextlib.contextmanager
def existing(folder: Path) -> Iterator[Run]:
    """Opens the folder of a run that is there, finished or not.

    Raises:
      InputError: there is no run in it, it cannot be read, or its numbers are not those that were measured.
    """
    manifest, path = _stored_manifest(folder), folder / DATABASE
    if manifest is None or not path.is_file():  # sqlite3 would make an empty one
        missing = MANIFEST if manifest is None else DATABASE
        raise InputError(f"{folder}: expected the folder of a run, got one without {missing}")
    # Not opened read-only: after a kill the first to come must roll the unfinished transaction back.
    with _database(path) as database:
        yield Run(folder, manifest, Store(database))


@contextlib.contextmanager
def _database(path: Path, *, new: bool = False) -> Iterator[sqlite3.Connection]:
    """Opens a database. Whatever SQLite reports from then on (a full disk, a torn file) is told in one line: nobody
    else within has a database.
    """
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            if new and not _tables(database):
                database.executescript(SCHEMA)
            _check(path, database)
            yield database
    except sqlite3.ProgrammingError:
        raise  # a mistake of ours
    except sqlite3.Error as error:
        foreign = getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_ERROR, *TORN)
        problem = "expected the database of a run" if foreign else "cannot be used"  # no space, no permission
        raise InputError(f"{path}: {problem}: {error}") from error


def _check(path: Path, database: sqlite3.Connection) -> None:
    """Whether the file is sound, has our tables, and holds the values that were measured."""
    if (problem := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise InputError(f"{path}: expected the database of a run, got a damaged one: {problem.splitlines()[-1]}")
    there = _tables(database)
    with contextlib.closing(sqlite3.connect(":memory:")) as empty:
        empty.executescript(SCHEMA)
        for name, statement in _tables(empty).items():
            if there.get(name) != statement:
                problem = f"with another {name}" if name in there else f"without {name}"
                raise InputError(f"{path}: expected the database of a run, got one {problem}")
    if changed := Store(database).changed():
        problem = "expected the records that were measured, got others; remove the folder to measure them again"
        raise InputError(f"{path}: {', '.join(changed)}: {problem}")


def _tables(database: sqlite3.Connection) -> dict[str, str]:
    """The statement that made each table and view."""
    return dict(database.execute("SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view')"))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Says in one line why writing a file fails, if the reason is outside the program."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or folder
        raise InputError(f"{place}: cannot be written: {error.strerror}") from error


class _Config(msgspec.Struct):
    file: str
    title: str
    studies: dict[str, dict[str, Any]]


class _Device(msgspec.Struct):
    kind: str
    backend: str


class _Manifest(msgspec.Struct):
    """The part of a manifest that other modules rely on, see `experiments.manifest`."""

    identity: str
    started: str
    config: _Config
    source: str
    versions: dict[str, str | None]
    device: _Device | None  # not known before the first job of a launched run ends
    numerics: dict[str, Any] | None
    git: dict[str, Any]
    data: dict[str, str]
    seconds: dict[str, float]


def _stored_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: expected a folder, got a file")
        if not path.is_file():
            return None
        manifest = json.loads(path.read_bytes())
        msgspec.convert(manifest, _Manifest)
        json.dumps(manifest, ensure_ascii=False).encode()  # half a character, as JSON can spell, is in no UTF-8
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: expected the manifest of a run: {error}") from None
    except (ValueError, RecursionError) as error:  # of json
        raise InputError(f"{path}: expected the manifest of a run, got another file: {error}") from None
    return manifest


def flat(entries: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as pairs of (dotted name, value)."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The differences that make two runs different ones: the first few keys that differ."""
    names = ("source", "versions", "device", "numerics")
    old, new = (
        dict(flat(manifest["config"]["studies"] | {name: manifest[name] for name in names}))
        for manifest in (there, here)
    )
    said = [
        "source: other code" if key == "source" else f"{key}: {shown(old.get(key))} there, {shown(new.get(key))} here"
        for key in old | new
        if old.get(key) != new.get(key)
    ]
    return "; ".join([*said[:3], *([f"and {len(said) - 3} more"] if len(said) > 3 else [])])


def _is_occupied(folder: Path) -> bool:
    # A process that was killed in its first moment leaves an unfinished manifest, and nothing else.
    return folder.is_dir() and not all(path.match(f"{MANIFEST}.*.tmp") for path in folder.iterdir())


def replace(path: Path, content: str | bytes) -> None:
    """Writes a file as a whole: a reader meanwhile, or after a crash, finds the old text or the new one.

    Several processes may do so at once: each writes to a separate name, and the last to rename it counts.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("xb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())  # or after a crash the new name may stand for an empty file
        os.replace(unfinished, path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # a full disk wants the half back
            unfinished.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def _sync(folder: Path) -> None:
    """Has the names in a folder on the disk, where its file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _json(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second process with the same command out. The system drops the lock however this process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"{folder}: another process is writing this run") from None
    except OSError:  # a file system without locks: the second process is then up to the person
        pass
    try:
        yield
    finally:
        os.close(handle)

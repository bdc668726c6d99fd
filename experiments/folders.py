"""A run's folder: made once, opened again by the same command, and never mixed with another run's.

manifest.json    how the numbers came about, see `experiments.manifest`
results.sqlite   the numbers, see `experiments.results`
report.html      made from the two, see `experiments.report`, and its figures one by one in figures/
parts/, jobs/    of a run that was spread over jobs, see `experiments.launch`
"""

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from experiments.errors import InputError
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
                raise InputError(
                    f"{folder}: expected a new folder or run {manifest['identity'][:8]}, got run"
                    f" {stored['identity'][:8]} (another config, other code, or another device)"
                )
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder))
            if stored is None:
                replace(folder / MANIFEST, _json(manifest))  # before the database: it makes the folder a run's
        yield Run(folder, stored or manifest, Store(stack.enter_context(_database(folder / DATABASE, SCHEMA))))


@contextlib.contextmanager
def existing(folder: Path) -> Iterator[Run]:
    """Opens the folder of a run that is there, finished or not.

    Raises:
      InputError: there is no run in it, or it cannot be read.
    """
    manifest, path = _stored_manifest(folder), folder / DATABASE
    if manifest is None or not path.is_file():  # sqlite3 would make an empty one
        missing = MANIFEST if manifest is None else DATABASE
        raise InputError(f"{folder}: expected the folder of a run, got one without {missing}")
    # Not opened read-only: after a kill the first to come must roll the unfinished transaction back.
    with _database(path, "SELECT run FROM runs LIMIT 1") as database:
        yield Run(folder, manifest, Store(database))


@contextlib.contextmanager
def _database(path: Path, first: str) -> Iterator[sqlite3.Connection]:
    """Opens a database and executes `first`. Whatever SQLite reports from then on (a full disk, a torn file) is told in
    one line: nobody else within has a database.
    """
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(first)
            yield database
    except sqlite3.ProgrammingError:
        raise  # a mistake of ours
    except sqlite3.Error as error:
        foreign = getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_ERROR, *TORN)
        problem = "expected the database of a run" if foreign else "cannot be used"  # no space, no permission
        raise InputError(f"{path}: {problem}: {error}") from error


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Where writing a file fails for a reason outside the program, says so in one line."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or folder
        raise InputError(f"{place}: cannot be written: {error.strerror}") from error


class _Manifest(msgspec.Struct):
    identity: str


def _stored_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: expected a folder, got a file")
        if not path.is_file():
            return None
        manifest = json.loads(path.read_bytes())
        msgspec.convert(manifest, _Manifest)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of json, or msgspec's
        raise InputError(f"{path}: expected the manifest of a run, got another file: {error}") from None
    return manifest


def _is_occupied(folder: Path) -> bool:
    # A process that was killed in its first moment leaves an unfinished manifest, and nothing else.
    return folder.is_dir() and any(path.name != _unfinished(folder / MANIFEST).name for path in folder.iterdir())


def replace(path: Path, text: str) -> None:
    """Writes a file as a whole: whoever reads it meanwhile, or after a crash, finds the old text or the new one."""
    unfinished = _unfinished(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):  # a full disk wants the half back
            unfinished.unlink()
        raise


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


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

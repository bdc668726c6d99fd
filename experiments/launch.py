"""A run spread over jobs, each of which measures one piece of it.

A piece is a study, or a part of one that offers `parts(config)`. That function cuts its config into several; their
records one after the other are those of the whole. A piece is a separate run with its own folder and database: machines
cannot share an SQLite file.

    RUN/parts/<piece>/   the measurements of a piece; a study whose pieces are all there is copied into RUN as a whole
    RUN/jobs/<time>/     the logs of the jobs, and the files that submitit keeps of them

Each job finds its own device, so a machine without one can launch. All jobs have to find the same.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from experiments import folders, jobs, studies
from experiments.config import Config
from experiments.errors import InputError, UnfinishedError
from experiments.folders import Run
from experiments.interrupt import OnInterrupt

# Modules that load jax (manifest, runner) are imported on use: a mistyped config should be answered at once.

PARTS, JOBS = "parts", "jobs"
_REST = "the same command does the rest"


class Piece(NamedTuple):
    """The piece of a run that one job measures."""

    name: str  # of its folder, and for people
    study: str
    config: Config  # of this piece alone
    determinants: dict[str, Any]  # of its numbers, as of the launch; None where only the job can know


def run(config: Config, out: Path | None, where: jobs.Target, on_interrupt: OnInterrupt) -> Path:
    """Measures in jobs the pieces that are not measured yet; returns the folder, as `runner.run` does.

    Raises:
      UnfinishedError: a job failed. The records of the others are kept.
    """
    from experiments import manifest

    described = manifest.describe(config, None)
    folder = out or folders.default(described)
    if "%" in str(folder.absolute()):
        raise InputError(f"{folder}: expected a path without %, which submitit takes for the number of a job")
    with folders.create(folder, described) as run:
        on_interrupt.line = f"interrupted: the jobs are ended, what is finished is in {folder}; {_REST}"
        pieces = [piece for piece in _pieces(config) if piece.study not in run.store.finished()]
        finished = [piece for piece in pieces if _is_finished(run, piece)]
        if kept := [*run.store.finished(), *(piece.name for piece in finished)]:
            print(f"finished before, kept as it is: {', '.join(kept)}", file=sys.stderr)
        for piece in finished:
            _accept(run, piece)
        missing = [piece for piece in pieces if piece not in finished]
        failed = _measure(run, missing, where, on_interrupt) if missing else []
        for study, parts in itertools.groupby(pieces, key=lambda piece: piece.study):
            _merge(run, study, list(parts), failed)
    if failed:
        names = [piece.name for piece in pieces if piece.name in failed]
        raise UnfinishedError(f"{folder}: {', '.join(names)} failed, all else is kept; {_REST}")
    return folder


def _pieces(config: Config) -> Iterator[Piece]:
    """The pieces in the order of their records."""
    from experiments import manifest

    for study, settings in config.studies.items():
        parts = studies.parts(studies.load(study), settings)
        for i, part in enumerate(parts, start=1):
            alone = msgspec.structs.replace(config, studies={study: part})
            name = study if len(parts) == 1 else f"{study}-{i}"
            yield Piece(name, study, alone, manifest.determinants(alone, None))


def _folder(run: Run, piece: Piece) -> Path:
    return run.folder / PARTS / piece.name


def _is_finished(run: Run, piece: Piece) -> bool:
    try:
        with folders.existing(_folder(run, piece)) as part:
            return piece.study in part.store.finished()
    except InputError:  # not begun, or killed in its first moment
        return False


def _accept(run: Run, piece: Piece) -> str:
    """Takes a finished piece up, and says what it was.

    Raises:
      InputError: the code or the device that it was measured with is not that of the others.
    """
    with folders.existing(_folder(run, piece)) as part:
        for name, launched in piece.determinants.items():
            want, got = launched or run.manifest[name], part.manifest[name]
            if want not in (None, got):
                raise InputError(
                    f"{part.folder}: expected {name} {want}, got {got}; remove the folder to measure it again"
                )
        run.update_manifest(device=part.manifest["device"], numerics=part.manifest["numerics"])
        seconds, count = part.manifest["seconds"][piece.study], len(part.store.records(piece.study))
    return f"finished in {seconds:.1f} s, {count} records"


def _measure(run: Run, pieces: Sequence[Piece], where: jobs.Target, on_interrupt: OnInterrupt) -> list[str]:
    """Has the pieces measured, and accepts each as its job ends; returns the names of those that failed."""
    for piece in pieces:
        with folders.writing(run.folder):  # here and now: of a new folder no file system remembers what it lacked
            _folder(run, piece).mkdir(parents=True, exist_ok=True)
    named, failed = {piece.name: piece for piece in pieces}, []
    calls = {piece.name: functools.partial(_work, piece.config, _folder(run, piece).absolute()) for piece in pieces}
    logs = run.folder / JOBS / f"{datetime.now(UTC):%Y%m%dT%H%M%S}"  # for each launch, since the numbers of jobs recur
    with contextlib.closing(jobs.ended(calls, logs, where, on_interrupt)) as ended:
        for name, job in ended:
            try:
                if not _is_finished(run, named[name]):
                    raise InputError(f"job {job.job_id} failed: {job.paths.stderr}")
                note = _accept(run, named[name])
            except InputError as error:  # the others go on
                note = str(error)
                failed.append(name)
            print(f"{name}: {note}", file=sys.stderr)
    return failed


def _work(config: Config, folder: Path) -> None:
    """Measures one piece, in the job."""
    from experiments import runner

    runner.run(config, folder, OnInterrupt())


def _merge(run: Run, study: str, parts: Sequence[Piece], failed: Sequence[str]) -> None:
    """Copies a study in one transaction, unless a part of it failed."""
    from experiments import runner

    if any(piece.name in failed for piece in parts):
        return
    records, seconds = [], 0.0
    for piece in parts:
        with folders.existing(_folder(run, piece)) as part:
            records += part.store.records(study)
            seconds += part.manifest["seconds"][study]
            run.update_manifest(data=runner.same_data(run, part.manifest["data"]))
    run.update_manifest(seconds=run.manifest["seconds"] | {study: seconds})
    run.store.finish(study, seconds, runner.without_repetition(records))

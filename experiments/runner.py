"""Runs the studies of a config, in order, into a results folder."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from experiments import data, folders, progress, results, studies
from experiments.config import Config
from experiments.errors import InputError
from experiments.folders import Run
from experiments.interrupt import OnInterrupt
from experiments.manifest import Device, describe
from experiments.results import Progress, Record

Item = TypeVar("Item", bound=Record | Progress)


def run(config: Config, out: Path | None, on_interrupt: OnInterrupt) -> Path:
    """Runs what is not finished yet; returns the folder, by default results/<config>-<identity>."""
    device = choose_device(config)
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        manifest = describe(config, device)
        folder = out or folders.default(manifest)
        with folders.create(folder, manifest) as run:
            kept = f"what is measured is in {folder}"
            on_interrupt.line = f"interrupted: {kept}; the same command does the rest"
            _run_studies(config, run)
    return folder


def choose_device(config: Config) -> Device:
    """The first device of the config's backend; "auto" leaves the choice to jax."""
    try:
        return jax.devices(None if config.backend == "auto" else config.backend)[0]
    except (RuntimeError, AssertionError):  # jax asserts where JAX_PLATFORMS names nothing that is there
        problem = f'"{config.backend}" is not available here: jax finds {_platform()}'
        raise InputError(f"{config.backend_from}: backend: {problem}") from None


def _platform() -> str:
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError):
        return f"none (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')})"


def _run_studies(config: Config, run: Run) -> None:
    finished = run.store.finished()
    if kept := [name for name in config.studies if name in finished]:
        print(f"finished before, kept as it is: {', '.join(kept)}", file=sys.stderr)
    unfinished = {name: settings for name, settings in config.studies.items() if name not in finished}
    with progress.shown(list(unfinished)) as update:
        for name, settings in unfinished.items():
            _run_study(name, settings, run, update)


def _run_study(name: str, settings: Any, run: Run, update: progress.Update) -> None:
    update(name, Progress(0.0, "starting"))
    kept = sum(records for _, records in run.store.finished_parts(name).values())  # the first ones, in their order
    before = run.store.records(name)[:kept]
    try:
        for item in without_repetition(_measured(name, studies.load(name), settings, run), before):
            if isinstance(item, Progress):
                # The end is announced below, when everything is stored.
                update(name, item._replace(done=min(item.done, 0.999)))
            else:
                run.store.write(name, item)
    except Exception as error:  # a traceback ends in these words
        place = f"{run.manifest['config']['file']}: {name}"
        error.add_note(f"{place}: an error in the study; what is measured is in {run.folder}")
        raise
    seconds, count = map(sum, zip(*run.store.finished_parts(name).values(), strict=True))
    run.update_manifest(seconds=run.manifest["seconds"] | {name: seconds})
    run.store.finish(name, seconds)  # last: a kill before it and the study, manifest and all, is done again
    update(name, Progress(1.0, f"finished in {seconds:.1f} s, {count} records"))


def _measured(name: str, study: studies.Study, settings: Any, run: Run) -> Iterator[Record | Progress]:
    """The items of the parts that are not finished. A part is, when its last item has been taken."""
    parts, finished = studies.parts(study, settings), run.store.finished_parts(name)
    for i, part in enumerate(parts):
        if i in finished:
            continue
        start, count = time.perf_counter(), 0
        for item in study.run(part):
            count += isinstance(item, Record)
            yield item._replace(done=(i + item.done) / len(parts)) if isinstance(item, Progress) else item
        run.update_manifest(data=same_data(run, data.digests()))
        run.store.finish_part(name, i, time.perf_counter() - start, count)


def same_data(run: Run, digests: dict[str, str]) -> dict[str, str]:
    """The digests of the run with these.

    Raises:
      InputError: a data set is not the one that an earlier part was measured on.
    """
    known = run.manifest["data"]
    for name in digests.keys() & known.keys():
        if digests[name] != known[name]:
            problem = f"{name}: expected the data of what is measured, got others; remove the folder to measure again"
            raise InputError(f"{run.folder}: {problem}")
    return known | digests


def without_repetition(items: Iterable[Item], before: Sequence[Record] = ()) -> Iterator[Item]:
    """Passes the items on; a study that describes two records alike would lose the first without a word."""
    seen = {results.run_key("", record.settings) for record in before}
    for item in items:
        if isinstance(item, Record):
            key = results.run_key("", item.settings)
            if key in seen:
                raise ValueError(f"two records have the settings {item.settings}")
            seen.add(key)
        yield item

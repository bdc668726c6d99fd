"""Checkpoints of `fit` on disk; the only file that knows orbax.

A checkpoint is a folder named after its step. It is written aside and renamed at the end, so that it is there as a
whole or not at all. In it lie the arrays of state and history, by orbax, a description of the run that they belong to,
and a seal, the sums of all files, by which a checkpoint that was damaged later is known before it is read.

Of several processes each writes its share of the arrays, and the first all else. They go from one part of that to the
next together: one that fails alone would leave the others waiting for it. So what orbax does about that, in managers
and checkpointers that meet within, is not used.
"""

import contextlib
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from .. import _checks
from . import terminal
from .loop import History, State

_ARRAYS, _DESCRIPTION, _SEAL = _PARTS = "arrays", "description.json", "seal.json"
_UNFINISHED, _LOCK = ".unfinished", ".lock"


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: `state.step` as a number.
      state: all that training carries.
      history: what was measured up to there, in numpy arrays.
      position: where the iterator of batches stands, in values of JSON; None where the data are no such iterator.
    """

    step: int
    state: State
    history: History
    position: Any


class Store(NamedTuple):
    """An open folder of checkpoints; made by `opened`.

    Attributes:
      directory: the folder.
      handler: orbax's own, of arrays.
      run: names and values of JSON that describe this run. A checkpoint of another run is refused.
      keep: how many of the newest checkpoints to keep, beside the best.
      found: the steps of the checkpoints that were there, sound or not.
      scores: the last validation score of each checkpoint that is sound as far as is known; inf where there is none.
    """

    directory: Path
    handler: Any
    run: Mapping[str, Any]
    keep: int
    found: list[int]
    scores: dict[int, float]


def describe(name: str, tree: Any) -> dict[str, str]:
    """The path, dtype and shape of each array of a tree.

    >>> describe("data", (np.zeros((100, 8)), np.zeros(100, np.int32)))
    {'data[0]': 'float64[100, 8]', 'data[1]': 'int32[100]'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {(name + jax.tree_util.keystr(path)).lstrip("."): _checks.describe(leaf) for path, leaf in leaves}


@contextlib.contextmanager
def opened(directory: str | os.PathLike[str], run: Mapping[str, Any], keep: int) -> Iterator[Store]:
    """Opens a folder, made if need be, for this run alone; all its processes open it together.

    Checkpoints that cannot be read are named on stderr.

    Raises:
      ValueError: it is no local folder.
      ImportError: orbax is not installed.
      OSError: the folder cannot be written, or another process trains there.
    """
    if "://" in os.fspath(directory):
        raise ValueError(f"fit: checkpoint_dir must be a folder that this machine has mounted, got {directory}")
    ocp = _orbax()
    directory = Path(directory).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        with _together():
            _check_writable(directory)
            if jax.process_index() == 0:
                stack.enter_context(_locked(directory))
                _remove_unfinished(directory)
        handler = stack.enter_context(contextlib.closing(ocp.StandardCheckpointHandler()))
        found = _of_the_first(_steps(directory))
        store = Store(directory, handler, run, keep, found, dict.fromkeys(found, math.inf))
        for step in found:
            description = _attempt(store, step, _description)
            if description is not None:
                store.scores[step] = description["score"]
        yield store


def latest(store: Store, template: State) -> Saved | None:
    """The newest checkpoint that can be read. Those that cannot are named on stderr.

    Args:
      store: the open folder.
      template: a state of this run: it says which arrays to expect, and on which devices to put them.

    Returns:
      What was saved, bit for bit; None where the folder holds no checkpoint.

    Raises:
      ValueError: the checkpoint belongs to another run; the message names the first difference.
      OSError: there are checkpoints, and none can be read.
    """
    for step in sorted(store.scores, reverse=True):
        description = _attempt(store, step, _check_seal) and _attempt(store, step, _description)
        if description is None:
            continue
        with _together():
            _refuse_another_run(store, step, description["run"])
        arrays = _attempt(store, step, _arrays, template, description["history"])
        if arrays is not None:
            state, history = arrays
            return Saved(step, state, history, description["position"])
    if store.found:
        tried = ", ".join(map(str, reversed(store.found)))
        raise OSError(f"fit: no checkpoint in {store.directory} can be read; tried {tried}")
    return None


def save(store: Store, saved: Saved) -> None:
    """Writes a checkpoint as a whole, then deletes those that need not be kept.

    Raises:
      OSError: the disk does not take it. The checkpoints that were there are there still.
    """
    scores = saved.history.validation
    score = float(scores[-1]) if scores.size and np.isfinite(scores[-1]) else math.inf
    reason = None
    with _quiet():
        try:
            _write(store, saved, score)
        except Exception as error:  # of any class: each of orbax's storage layers has its own
            reason = _reason(error)
        if reason is not None:
            gc.collect()  # what orbax had begun would complain when it is collected later
            if jax.process_index() == 0:
                _remove_unfinished(store.directory)  # a full disk wants it back
    if reason is not None:
        good = f"the last good one is {_folder(store, max(store.scores))}" if store.scores else "there is none"
        raise OSError(f"fit: checkpoint {_folder(store, saved.step)} cannot be written: {reason}; {good}")
    store.scores[saved.step] = score
    _drop_old(store)


def _folder(store, step):
    return store.directory / str(step)


def _arrays_of(folder):
    from etils import epath  # orbax bears no other kind of path

    return epath.Path(folder / _ARRAYS)


def _orbax():
    try:
        import orbax.checkpoint
    except ImportError:
        raise ImportError('fit: checkpoint_dir needs orbax: pip install "jprob[checkpoint]"') from None
    return orbax.checkpoint


def _check_writable(directory):
    """Now rather than after an hour of training."""
    probe = directory / f"probe-{jax.process_index()}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"fit: checkpoint_dir {directory} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _together():
    """What fails in one process fails in all of them, rather than leaving the others to wait for it."""
    if jax.process_count() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
    if failed.size:
        raise error or OSError(f"fit: process {failed[0]} of {jax.process_count()} could not go on")


def _of_the_first(steps):
    """A list as the first process has it: others may look at a folder that their file system remembers."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    return multihost_utils.broadcast_one_to_all(np.resize(np.array(steps, np.int32), count)).tolist()


@contextlib.contextmanager
def _locked(directory):
    """Keeps a second process with the same call out. The system drops the lock however this process ends."""
    import fcntl  # no part of Python on Windows

    # A file, opened to be written: on NFS the lock of a folder would be known to this machine alone.
    handle = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OSError(f"fit: another process is training in {directory}") from None
    except OSError as error:
        reason = f"cannot be locked, {error.strerror}"
        terminal.tell(f"{directory} {reason}: see to it that no other process trains there")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process forked meanwhile may have the file open still
        os.close(handle)


@contextlib.contextmanager
def _quiet():
    """What fails is raised here, in one line.

    orbax logs it too; and it closes its event loop when one array has failed, of which the others, still being written
    or read, complain by way of the hook.
    """
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda fault: None if "Event loop is closed" in str(fault.exc_value) else hook(fault)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook


def _attempt(store, step, read, *arguments):
    """What `read` gives; None where it fails, whatever with, and then this checkpoint does not count as sound."""
    try:
        with _quiet(), _together():
            return read(store, step, *arguments)
    except Exception as error:
        del store.scores[step]
        terminal.tell(f"checkpoint {_folder(store, step)} cannot be read: {_reason(error)}")
        return None


def _check_seal(store, step):
    if jax.process_index() == 0:
        folder = _folder(store, step)
        sums, wanted = _sums(folder), json.loads((folder / _SEAL).read_bytes())
        for name in wanted | sums:
            if wanted.get(name) != sums.get(name):
                raise ValueError(f"{name} is {'damaged' if name in sums else 'missing'}")
    return True


def _description(store, step):
    description = json.loads((_folder(store, step) / _DESCRIPTION).read_bytes())
    return {name: description[name] for name in ("run", "score", "position", "history")}


def _refuse_another_run(store, step, there):
    for name in {**store.run, **there}:
        got, wanted = (json.dumps(run[name]) if name in run else "nothing" for run in (there, store.run))
        if got != wanted:
            message = f"was made with {name} = {got}, this run has {wanted}"
            raise ValueError(f"fit: checkpoint {_folder(store, step)} {message}")


def _arrays(store, step, template, lengths):
    ocp = _orbax()
    targets = {
        "state": {name: _target(leaf) for name, leaf in _leaves(template).items()},
        "history": {name: np.empty(length, dtype) for name, (length, dtype) in lengths.items() if length},
    }
    arrays = store.handler.restore(_arrays_of(_folder(store, step)), args=ocp.args.StandardRestore(targets))
    leaves, treedef = jax.tree.flatten(template)
    leaves = [_like(leaf, arrays["state"].get(str(i))) for i, leaf in enumerate(leaves)]
    empty = {name: np.empty(0, dtype) for name, (_, dtype) in lengths.items()}
    return treedef.unflatten(leaves), History(**(empty | arrays.get("history", {})))


def _leaves(state):
    """The arrays of a state by their number. orbax knows neither typed keys nor arrays without elements."""
    leaves = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]
    return {str(i): leaf for i, leaf in enumerate(leaves) if leaf.size}


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _target(leaf):
    """An array that is committed to no device stays so: it comes back through numpy, and goes where the data are."""
    if leaf.committed:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty(leaf.shape, leaf.dtype)


def _like(leaf, restored):
    if restored is None:
        return leaf  # without elements
    restored = jnp.asarray(restored)
    return jax.random.wrap_key_data(restored, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else restored


def _write(store, saved, score):
    ocp, folder, history = _orbax(), _folder(store, saved.step), saved.history._asdict()
    description = {
        "run": store.run,
        "score": score,
        "position": saved.position,
        "history": {name: (len(values), values.dtype.name) for name, values in history.items()},
    }
    arrays = {"state": _leaves(saved.state), "history": {name: x for name, x in history.items() if x.size}}
    unfinished = folder.with_name(f"{folder.name}{_UNFINISHED}")
    is_first = jax.process_index() == 0
    with _together():
        if is_first:
            (unfinished / _ARRAYS).mkdir(parents=True)
    with _together():
        store.handler.save(_arrays_of(unfinished), args=ocp.args.StandardSave(arrays))
    with _together():
        if is_first:
            store.handler.finalize(_arrays_of(unfinished))
            (unfinished / _DESCRIPTION).write_text(json.dumps(description))
            (unfinished / _SEAL).write_text(json.dumps(_sums(unfinished)))
            _sync(unfinished / _DESCRIPTION, unfinished / _SEAL, unfinished)  # orbax does so with the arrays
            if saved.step in _steps(store.directory):
                _remove(folder)  # it could not be read
            unfinished.rename(folder)
            _sync(store.directory)


def _sync(*paths):
    """Onto the disk, so that it is there after the machine went down, and before an older checkpoint is deleted."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _steps(directory):
    """Those of folders that are named like a checkpoint and hold some of one. All else is somebody else's."""
    named = (path for path in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))
    return sorted(int(path.name) for path in named if any((path / part).exists() for part in _PARTS))


def _remove(folder):
    """What is left of it, when the process is killed meanwhile or the system keeps it, goes at the next start."""
    leaving = folder.with_name(f"{folder.name}-removed{_UNFINISHED}")
    folder.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _remove_unfinished(directory):
    for _ in range(20):
        left = list(directory.glob(f"*{_UNFINISHED}"))
        if not left:
            return
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)  # some of orbax's threads may still be writing


def _sums(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _SEAL)
    return {str(path.relative_to(folder)): _sum(path) for path in files}


def _sum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _drop_old(store):
    kept = {*sorted(store.scores)[-store.keep :], min(store.scores, key=lambda step: (store.scores[step], -step))}
    for step in store.scores.keys() - kept:
        del store.scores[step]
    if jax.process_index() == 0:
        for step in _steps(store.directory):
            if step not in kept:
                with contextlib.suppress(OSError):  # one more than need be is no reason to end the training
                    _remove(_folder(store, step))


def _reason(error):
    """One line: the system's own words, also where orbax quotes no more than an error's number."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    if isinstance(error, OSError):
        return error.strerror or str(error).removeprefix("fit: ")
    return f"{type(error).__name__}: {error}".splitlines()[0]

"""Checkpoints of `fit` on disk; the only file that knows orbax.

A checkpoint is a folder named after its step. orbax writes it aside and renames it at the end, so that it is there as a
whole or not at all. In it lie the arrays of state and history and a description of the run that they belong to. Last
comes a seal, the sums of all files, by which a checkpoint that was damaged later is known before it is read.
"""

import contextlib
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
from .loop import History, State

_SEAL = "seal.json"


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
      manager: orbax's own.
      run: names and values of JSON that describe this run. A checkpoint of another run is refused.
      keep: how many of the newest checkpoints to keep, beside the best.
      scores: the last validation score of each checkpoint that is sound as far as is known; inf where there is none.
    """

    directory: Path
    manager: Any
    run: Mapping[str, Any]
    keep: int
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

    Raises:
      ImportError: orbax is not installed.
      OSError: the folder cannot be written, or another process trains there.
    """
    ocp = _orbax()
    directory = Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False,  # what `save` returns from is on disk: a kill takes nothing from it
        cleanup_tmp_directories=True,  # left by a process that was killed
    )
    with contextlib.ExitStack() as stack:
        with _together():
            _check_writable(directory)
            if jax.process_index() == 0:
                stack.enter_context(_locked(directory))
        with _quiet():
            store = Store(directory, ocp.CheckpointManager(directory, options=options), run, keep, {})
            store.scores.update({step: _score(store, step) for step in store.manager.all_steps()})
        stack.enter_context(contextlib.closing(store.manager))
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
    steps = sorted(store.scores, reverse=True)
    for step in steps:
        description = _attempt(store, step, _check_seal) and _attempt(store, step, _description)
        if description is None:
            continue
        _refuse_another_run(store, step, description["run"])
        arrays = _attempt(store, step, _arrays, template, description["history"])
        if arrays is not None:
            state, history = arrays
            return Saved(step, state, history, description["position"])
    if steps:
        raise OSError(f"fit: no checkpoint in {store.directory} can be read; tried {', '.join(map(str, steps))}")
    return None


def save(store: Store, saved: Saved) -> None:
    """Writes a checkpoint as a whole, then deletes those that need not be kept.

    Raises:
      OSError: the disk does not take it. The checkpoints that were there are there still.
    """
    scores = saved.history.validation
    score = float(scores[-1]) if scores.size and np.isfinite(scores[-1]) else math.inf
    with _quiet():
        try:
            with _together():
                _write(store, saved, score)
        except Exception as error:  # of any class: each of orbax's storage layers has its own
            _remove_unfinished(store.directory)  # a full disk wants it back
            good = f"the last good one is {_folder(store, max(store.scores))}" if store.scores else "there is none"
            message = f"fit: checkpoint {_folder(store, saved.step)} cannot be written: {_reason(error)}; {good}"
            raise OSError(message) from error
        store.scores[saved.step] = score
        _drop_old(store)


def _folder(store, step):
    return store.directory / str(step)


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


@contextlib.contextmanager
def _locked(directory):
    """Keeps a second process with the same call out. The system drops the lock however this process ends."""
    import fcntl  # no part of Python on Windows

    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OSError(f"fit: another process is training in {directory}") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _quiet():
    """What fails is raised here, in one line.

    orbax logs it too; and it closes its event loop when one array has failed, of which the others, still being written
    or read, complain by way of the hook.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda fault: None if "Event loop is closed" in str(fault.exc_value) else hook(fault)
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _attempt(store, step, read, *arguments):
    """What `read` gives; None where it fails, whatever with, and then this checkpoint does not count as sound."""
    try:
        with _quiet(), _together():
            return read(store, step, *arguments)
    except Exception as error:
        del store.scores[step]
        if jax.process_index() == 0:
            print(f"fit: checkpoint {_folder(store, step)} cannot be read: {_reason(error)}", file=sys.stderr)
        return None


def _check_seal(store, step):
    """It is unbroken, or there is none: then the checkpoint was written just before its process was killed."""
    folder = _folder(store, step)
    seal = folder / _SEAL
    if jax.process_index() == 0 and seal.exists():
        sums, wanted = _sums(folder), json.loads(seal.read_bytes())
        for name in wanted | sums:
            if wanted.get(name) != sums.get(name):
                raise ValueError(f"{name} is {'damaged' if name in sums else 'missing'}")
    return True


def _description(store, step):
    ocp = _orbax()
    items = store.manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
    return {name: items.description[name] for name in ("run", "score", "position", "history")}


def _score(store, step):
    ocp = _orbax()
    try:
        items = store.manager.restore(step, args=ocp.args.Composite(description=ocp.args.JsonRestore()))
        return float(items.description["score"])
    except Exception:  # `latest` tells of it, should it come to that
        return math.inf


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
    items = store.manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(targets)))
    leaves, treedef = jax.tree.flatten(template)
    leaves = [_like(leaf, items.arrays["state"].get(str(i))) for i, leaf in enumerate(leaves)]
    empty = {name: np.empty(0, dtype) for name, (_, dtype) in lengths.items()}
    return treedef.unflatten(leaves), History(**(empty | items.arrays.get("history", {})))


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
    ocp, folder = _orbax(), _folder(store, saved.step)
    history = saved.history._asdict()
    description = {
        "run": store.run,
        "score": score,
        "position": saved.position,
        "history": {name: (len(values), values.dtype.name) for name, values in history.items()},
    }
    arrays = {"state": _leaves(saved.state), "history": {name: x for name, x in history.items() if x.size}}
    if saved.step in store.manager.all_steps():
        store.manager.delete(saved.step)  # it could not be read
    items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), description=ocp.args.JsonSave(description))
    store.manager.save(saved.step, args=items, force=True)  # also before a later one that cannot be read
    if jax.process_index() == 0:
        _seal(folder)


def _seal(folder):
    unfinished = folder / f"{_SEAL}.tmp"
    unfinished.write_text(json.dumps(_sums(folder)))
    unfinished.replace(folder / _SEAL)


def _remove_unfinished(directory):
    for _ in range(20):
        left = list(directory.glob("*.orbax-checkpoint-tmp*"))
        if not left:
            return
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)  # some of orbax's threads may still be writing


def _sums(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(_SEAL))
    return {str(path.relative_to(folder)): _sum(path) for path in files}


def _sum(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _drop_old(store):
    kept = {*sorted(store.scores)[-store.keep :], min(store.scores, key=lambda step: (store.scores[step], -step))}
    for step in store.manager.all_steps():
        if step not in kept:
            store.manager.delete(step)
            store.scores.pop(step, None)


def _reason(error):
    """One line, and the system's own words where orbax quotes no more than an error's number."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else f"{type(error).__name__}: {error}".splitlines()[0]

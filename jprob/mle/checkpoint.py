"""Checkpoints of `fit` on disk; the only file that knows orbax.

A checkpoint is a folder named after its step. The folder is written under another name and renamed at the end. So a
checkpoint is there as a whole or not at all. The folder holds the arrays of state and history, by orbax, and a
description of their run. Its seal holds the sums of all files. A checkpoint that was damaged later is known by its seal
before it is read.

Each of several processes writes its share of the arrays, and the first all else. They go from one part of that to the
next together: one that fails alone would leave the others waiting for it. So the managers and checkpointers of orbax,
which meet within, are not used.
"""

import contextlib
import gc
import hashlib
import json
import logging
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
from jaxtyping import PyTree

from .. import _checks
from . import _order, processes, terminal
from .state import History, State, is_key

_ARRAYS, _DESCRIPTION, _SEAL = _PARTS = "arrays", "description.json", "seal.json"
_ASK = 'nothing was validated, or all scores were NaN; ask for "last"'
_UNFINISHED, _LOCK = ".unfinished", ".lock"


class Saved(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      step: `state.step` as a number.
      state: all that training carries.
      history: what was measured up to there, in numpy arrays.
      position: where the source of batches stands, in values of JSON; None if it cannot tell.
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
      versions: names and values that may differ. A checkpoint with others is used, and that is told.
      max_to_keep: how many of the newest checkpoints to keep. Each holds the best params so far.
      found: the steps of the checkpoints that were there, sound or not.
      sound: the steps of the checkpoints that are sound as far as is known.
    """

    directory: Path
    handler: Any
    run: Mapping[str, Any]
    versions: Mapping[str, str]
    max_to_keep: int
    found: list[int]
    sound: set[int]


def describe(name: str, tree: Any, *, fingerprint: bool = False) -> dict[str, str]:
    """The path, dtype and shape of each array of a tree, and a fingerprint of its bits if asked for.

    >>> describe("data", (np.zeros((100, 8)), np.zeros(100, np.int32)))
    {'data[0]': 'float64[100, 8]', 'data[1]': 'int32[100]'}
    """

    def of(leaf):
        return _checks.describe(leaf) + (f", fingerprint {int(_fingerprint(leaf)):08x}" if fingerprint else "")

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {(name + jax.tree_util.keystr(path)).lstrip("."): of(leaf) for path, leaf in leaves}


@jax.jit
def _fingerprint(x):
    """A hash of all bits and their places. It is a sum of integers, which no placement on devices changes."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
        x = x.astype(jnp.int8)
    size = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
    return jnp.sum(_order.mixed(bits ^ _order.mixed(place + jnp.uint32(1))), dtype=jnp.uint32)


def load_params(
    checkpoint_dir: str | os.PathLike[str],
    like: PyTree,
    which: str = "best",
    *,
    model_state: PyTree = None,
) -> PyTree:
    """The params of the newest checkpoint in a folder that `fit` has written, without optimizer, data or nll.

    Args:
      checkpoint_dir: the folder that was given to `fit`.
      like: params of the same structure, shapes and dtypes; their values do not matter.
      which: "best" for those with the best validation score, "last" for those after the last step.
      model_state: a model state of the same structure; given, the saved one is returned too.

    Returns:
      The params, bit for bit and in their dtypes (at least as precise as u asks: nothing is rounded), on the default
      device; or the pair of params and model state, if `model_state` is given.

    Raises:
      ValueError: `which` is none of the two, the checkpoint has no best, or `like` does not fit; the first leaf that
        differs is named.
      OSError: the folder holds no checkpoint that can be read.

    >>> import tempfile, optax
    >>> from jprob import mle
    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = mle.fit(nll, optax.sgd(0.5), 0.0, jnp.array([1.0, 3.0]), jax.random.key(0), num_steps=9,
    ...                      batch_size=2, checkpoint_dir=folder, progress="none")
    ...     print(load_params(folder, jnp.array(0.0), "last") == result.state.params)
    True
    """
    if which not in ("best", "last"):
        raise ValueError(f'load_params: which must be "best" or "last", got {which!r}')
    directory = Path(checkpoint_dir).expanduser().absolute()
    found = _found(directory) if directory.is_dir() else []
    store = Store(directory, _orbax().StandardCheckpointHandler(), {}, {}, 1, found, set(found))
    prefix = "best." if which == "best" else ""
    wanted = {"params": like} if model_state is None else {"params": like, "model_state": model_state}
    with contextlib.closing(store.handler):
        for step, description in _sealed_ones(store):
            there = dict(description["leaves"])
            _refuse_other_params(_folder(store, step), there, prefix, wanted)
            arrays = _attempt(store, step, _named_arrays, there)
            if arrays is not None:
                if prefix and not np.isfinite(arrays["best.score"]):
                    raise ValueError(f"load_params: {_folder(store, step)} has no best params yet; {_ASK}")
                loaded = [_filled(tree, arrays, describe(prefix + part, tree)) for part, tree in wanted.items()]
                return loaded[0] if model_state is None else tuple(loaded)
    raise OSError(f"load_params: no checkpoint in {directory} can be read")


def _refuse_other_params(folder, there, prefix, wanted):
    """Each of these trees must be in the checkpoint, with leaves of the same names and types."""
    if prefix and "best.score" not in there:
        raise ValueError(f"load_params: {folder} has no best params; {_ASK}")
    for part, tree in wanted.items():
        asked = describe(prefix + part, tree)
        for name, what in asked.items():
            if (got := there.get(name, "nothing")) != what:
                raise ValueError(f"load_params: {name} of {folder} is {got}, like has {what}")
        of_part = [name for name in there if name.startswith(prefix + part)]
        if len(of_part) != len(asked):
            raise ValueError(f"load_params: {folder} has {len(of_part)} arrays of these, like has {len(asked)}")


def _named_arrays(store, step, names):
    """The arrays of the state by these names, of which one without elements has none."""
    arrays = store.handler.restore(_arrays_of(_folder(store, step)))["state"]
    return {name: arrays.get(str(number)) for number, name in enumerate(names)}


@contextlib.contextmanager
def opened(
    directory: str | os.PathLike[str],
    run: Mapping[str, Any],
    max_to_keep: int,
    versions: Mapping[str, str] | None = None,
) -> Iterator[Store]:
    """Opens a folder, made if need be, for this run alone; all its processes open it together.

    Checkpoints that cannot be read are named on stderr.

    Raises:
      ValueError: it is no local folder.
      ImportError: orbax is not installed.
      OSError: the folder cannot be written, or another process trains there.
    """
    if "://" in os.fspath(directory):
        raise ValueError(f"fit: checkpoint_dir must be a folder that this machine has mounted, got {directory}")
    directory = Path(directory).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        handler = stack.enter_context(contextlib.closing(_orbax().StandardCheckpointHandler()))
        with processes.together():
            _check_writable(directory)
            if jax.process_index() == 0:
                stack.enter_context(_locked(directory))
                _remove_unfinished(directory)
        found = processes.steps_of_the_first(_found(directory))
        store = Store(directory, handler, run, versions or {}, max_to_keep, found, set(found))
        for step in found:
            _attempt(store, step, _description)
        yield store


def latest(store: Store, template: State) -> Saved | None:
    """The newest checkpoint that can be read. Those that cannot are named on stderr.

    Args:
      store: the open folder.
      template: a state of this run: it says which arrays to expect, and on which devices to put them.

    Returns:
      The `Saved` checkpoint, bit for bit; None if the folder holds no checkpoint.

    Raises:
      ValueError: the checkpoint belongs to another run; the message names the first difference.
      OSError: there are checkpoints, and none can be read.
    """
    for step, description in _sealed_ones(store):
        with processes.together():
            _refuse_another_run(store, step, description["run"])
        arrays = _attempt(store, step, _arrays, template, description["history"])
        if arrays is not None:
            _tell_of_versions(store, step, description["versions"])
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
    reason = None
    with _quiet():
        try:
            _write(store, saved)
        except Exception as error:  # of any class: each of orbax's storage layers has its own
            reason = _reason(error)
        if reason is not None:
            gc.collect()  # what orbax had begun would complain when it is collected later
            if jax.process_index() == 0:
                _remove_unfinished(store.directory)  # a full disk wants it back
            good = f"the last good one is {_folder(store, max(store.sound))}" if store.sound else "there is none"
            raise OSError(f"fit: checkpoint {_folder(store, saved.step)} cannot be written: {reason}; {good}")
    store.sound.add(saved.step)
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
def _locked(directory):
    """Keeps a second process with the same call out. The system drops the lock however this process ends."""
    import fcntl  # no part of Python on Windows

    # A file, opened to be written: on NFS the lock of a folder would be known to this machine alone.
    with (directory / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"fit: another process is training in {directory}") from None
        except OSError as error:
            reason = f"cannot be locked, {error.strerror}"
            terminal.tell(f"{directory} {reason}: see to it that no other process trains there")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile may have the file open still


@contextlib.contextmanager
def _quiet():
    """Silences orbax: its failures are raised here, in one line.

    orbax logs them too, and closes its event loop when one array has failed. The other arrays are still being written
    or read, and complain by way of the hook.
    """
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, ("absl", "asyncio")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        hook = sys.unraisablehook
        stack.callback(setattr, sys, "unraisablehook", hook)
        sys.unraisablehook = lambda fault: None if "Event loop is closed" in str(fault.exc_value) else hook(fault)
        yield


def _attempt(store, step, read, *arguments):
    """The result of `read`; None if it fails, with any error. The checkpoint then does not count as sound."""
    try:
        with _quiet(), processes.together():
            return read(store, step, *arguments)
    except Exception as error:
        store.sound.discard(step)
        terminal.tell(f"checkpoint {_folder(store, step)} cannot be read: {_reason(error)}")
        return None


def _sealed_ones(store):
    """The checkpoints whose files are all as they were, the newest first: their steps and descriptions."""
    for step in sorted(store.sound, reverse=True):
        description = _attempt(store, step, _sealed)
        if description is not None:
            yield step, description


def _sealed(store, step):
    """The description of a checkpoint whose files are all as they were."""
    if jax.process_index() == 0:
        folder = _folder(store, step)
        sums, wanted = _sums(folder), json.loads((folder / _SEAL).read_bytes())
        for name in wanted | sums:
            if wanted.get(name) != sums.get(name):
                raise ValueError(f"{name} is {'damaged' if name in sums else 'missing'}")
    return _description(store, step)


def _description(store, step):
    description = json.loads((_folder(store, step) / _DESCRIPTION).read_bytes())
    return {name: description[name] for name in ("run", "versions", "leaves", "position", "history")}


def _refuse_another_run(store, step, there):
    for name in {**store.run, **there}:
        got, wanted = (json.dumps(run[name]) if name in run else "nothing" for run in (there, store.run))
        if got != wanted:
            message = f"was made with {name} = {got}, this run has {wanted}"
            raise ValueError(f"fit: checkpoint {_folder(store, step)} {message}")


def _arrays(store, step, template, lengths):
    """The state and the history. The description has the length and the dtype of each array of the history."""
    history = jax.tree.map(lambda x: np.empty(*x), History(**lengths), is_leaf=lambda x: isinstance(x, list))
    targets = {"state": jax.tree.map(_target, _leaves(template)), "history": _leaves(history)}
    args = _orbax().args.StandardRestore(targets)
    arrays = store.handler.restore(_arrays_of(_folder(store, step)), args=args)
    state, history = _filled(template, arrays["state"]), _filled(history, arrays.get("history", {}))
    return _with_hyperparams_of(template, state), history


def _filled(template, arrays, names=None):
    leaves, treedef = jax.tree.flatten(template)
    names = map(str, range(len(leaves))) if names is None else names
    return treedef.unflatten([_like(leaf, arrays.get(name)) for leaf, name in zip(leaves, names, strict=True)])


def _with_hyperparams_of(template, state):
    """Hyperparameters that are injected come from the call, not from the checkpoint."""

    def injected(node):
        return hasattr(node, "hyperparams") and hasattr(node, "_replace")

    def one(new, old):
        if not injected(new):
            return old
        scheduled = getattr(old, "hyperparams_states", {})
        return old._replace(hyperparams={n: (old if n in scheduled else new).hyperparams[n] for n in old.hyperparams})

    optimizer_state = jax.tree.map(one, template.optimizer_state, state.optimizer_state, is_leaf=injected)
    return state._replace(optimizer_state=optimizer_state)


def _tell_of_versions(store, step, there):
    for name, wanted in store.versions.items():
        if (got := there.get(name, "nothing")) != wanted:
            what = f"by another {name}" if " " in name else f"with {name} {got}, this run has {wanted}"
            terminal.tell(f"checkpoint {_folder(store, step)} was made {what}; training goes on")


def _leaves(tree):
    """The arrays of a tree by their number. orbax knows neither typed keys nor arrays without elements."""
    leaves = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]
    return {str(i): leaf for i, leaf in enumerate(leaves) if leaf.size}


def _target(leaf):
    """An array that is committed to no device stays so: it comes back through numpy, and goes where the data are."""
    if leaf.committed:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.empty(leaf.shape, leaf.dtype)


def _like(leaf, restored):
    if restored is None:
        return leaf  # without elements
    if isinstance(leaf, np.ndarray):
        return np.asarray(restored)
    restored = jnp.asarray(restored)
    return jax.random.wrap_key_data(restored, impl=jax.random.key_impl(leaf)) if is_key(leaf) else restored


def _write(store, saved):
    folder, history = _folder(store, saved.step), saved.history
    description = {
        "run": store.run,
        "versions": store.versions,
        "leaves": list(describe("", saved.state).items()),
        "position": saved.position,
        "history": jax.tree.map(lambda x: [len(x), x.dtype.name], history)._asdict(),
    }
    arrays = {"state": _leaves(saved.state), "history": _leaves(history)}
    unfinished = folder.with_name(f"{folder.name}{_UNFINISHED}")
    is_first = jax.process_index() == 0
    with processes.together():
        if is_first:
            (unfinished / _ARRAYS).mkdir(parents=True)
    with processes.together():
        store.handler.save(_arrays_of(unfinished), args=_orbax().args.StandardSave(arrays))
    with processes.together():
        if is_first:
            store.handler.finalize(_arrays_of(unfinished))
            (unfinished / _DESCRIPTION).write_text(json.dumps(description))
            (unfinished / _SEAL).write_text(json.dumps(_sums(unfinished)))
            _sync(unfinished / _DESCRIPTION, unfinished / _SEAL, unfinished)  # orbax does so with the arrays
            if _holds_some(folder):
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


def _found(directory):
    """The steps of folders that are named like a checkpoint and hold some of one. All else is somebody else's.

    A folder that is named like one and holds nothing of one is named on stderr.
    """
    for path in sorted(_named(directory)):
        if path.is_dir() and not _holds_some(path):
            terminal.tell(f"checkpoint {path} cannot be read: the folder holds nothing of a checkpoint")
    return sorted(int(path.name) for path in _named(directory) if _holds_some(path))


def _named(directory):
    return [path for path in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)]


def _holds_some(folder):
    return any((folder / part).exists() for part in _PARTS)


def _remove(folder):
    """Removes a folder. A rest stays if the process is killed or the system keeps it; it goes at the next start."""
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
    kept = set(sorted(store.sound)[-store.max_to_keep :])
    store.sound.intersection_update(kept)
    if jax.process_index() == 0:
        for path in _named(store.directory):
            if int(path.name) not in kept and _holds_some(path):
                with contextlib.suppress(OSError):  # one more than need be is no reason to end the training
                    _remove(path)


def _reason(error):
    """One line: the system's own words, also where orbax quotes no more than an error's number."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    if isinstance(error, OSError):
        return error.strerror or str(error).removeprefix("fit: ")
    return f"{type(error).__name__}: {error}".splitlines()[0]

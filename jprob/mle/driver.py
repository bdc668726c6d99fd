"""`fit`, for a person at a terminal: `run` in chunks, with progress, checkpoints, and an orderly end on Ctrl-C.

What it tells is in `terminal`, what it hears in `signals`, what it keeps in `checkpoint`. The host asks the device for
the next chunk before it waits for the last one, so that the device never waits for the host.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jaxtyping import Float, Key, PyTree

from .. import _checks
from . import _arguments, _order, checkpoint, sharding, signals, terminal
from .loop import (
    History,
    Losses,
    Metrics,
    Nll,
    State,
    _average_params,
    _begin,
    _judge,
    _keys,
    _num_examples,
    _score,
    _spread_as,
    _summary,
    init,
    run,
    step,
)

_SECONDS_OF_A_CHUNK = 0.3


class Result(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: where training ended.
      history: what was measured from the first step on, also where it took several calls.
      reason: why training ended: "num_steps" or "patience".
    """

    state: State
    history: History
    reason: str


def fit(
    nll: Nll,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    data: PyTree,
    key: Key[Array, ""],
    *,
    num_steps: int,
    batch_size: int,
    record_every: int = 1,
    validation: PyTree | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    micro_batches: int = 1,
    average_decay: float | None = None,
    max_skipped: int = 20,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    save_every_seconds: float = 60.0,
    keep: int = 3,
    config: Mapping[str, Any] | None = None,
    progress: str = "auto",
) -> Result:
    """`run` with what a long training needs besides: progress, checkpoints, and an orderly end.

    With `checkpoint_dir` the same call goes on from the newest checkpoint there, however the last one ended, and comes
    to the bits of a run that was never stopped; `num_steps` and `patience` may have changed. SIGTERM and Ctrl-C end
    the process after the current chunk of training, with all that it reached saved; a second Ctrl-C ends it at once.

    What was placed on devices stays there, spread as it was, on axes of either kind as for `run`; an array that `nll`
    closes over must not lie on explicit ones. Where `jax.distributed` joins several processes, all of them make the
    same call, with params or data on a mesh over all devices and one `checkpoint_dir` that all see: the first prints,
    and a signal to any one ends all. A checkpoint goes on in any placement, and any number of processes.

    Args:
      nll: `nll(params, batch, key) -> Array[batch]`, the negative log-likelihood of each example, in nats.
      optimizer: an optax gradient transformation.
      params: initial parameters, any pytree of floating-point arrays.
      data: all examples, as for `run`. Or, where they are too many for the device, batches: a function
        `batch_at(step) -> batch`, or an iterable with `state_dict()`, in values of JSON, and `load_state_dict(it)`,
        which is iterated anew at its end. Of several processes each gives its share of a batch, as
        `jax.make_array_from_process_local_data` takes it.
      key: random key of the run.
      num_steps: steps from the first one on, a multiple of `record_every` and of `validate_every`.
      batch_size: examples per step; where `data` are batches, it is for validation alone.
      record_every: steps that make a row of history. Only between rows is training shown, saved and stopped.
      validation: examples to validate with, as for `run`.
      validate_every: steps from one validation to the next, a multiple of `record_every`.
      patience: training ends after so many validations in a row that are not better than the best.
      micro_batches: parts to cut each batch into, as for `run`.
      average_decay: decay of the average of the params, as for `run`.
      max_skipped: steps in a row, counted in whole rows, whose loss or gradient may not be finite.
      checkpoint_dir: folder for checkpoints of this run alone, on a disk that is mounted here; needs the extra
        `checkpoint`.
      save_every_seconds: time between checkpoints. There is one more at the end.
      keep: how many checkpoints stay: the last ones, and beside them the one with the lowest validation score.
      config: what else tells this run from others, in values of JSON. A checkpoint with other ones is refused.
      progress: "auto" for a bar where stderr is a terminal and rich is installed, and elsewhere a line every few
        seconds; "none" for neither. Where training resumes and why it stops is told on stderr in either case.

    Returns:
      A `Result`. Its state is that of `run`; so is its history, which ends where patience does.

    Raises:
      ValueError: a fault of the arguments, or a checkpoint of another run, whose first difference is named.
      FloatingPointError: `max_skipped` is reached. The step and the leaf of the gradient where it began are named; the
        state before is saved.
      OSError: the folder cannot be written, its disk is full, be it for one process of several, or no checkpoint in it
        can be read.
      ImportError: `checkpoint_dir` is given and orbax is not installed.
      SystemExit: with code 143 on SIGTERM and 130 on Ctrl-C, where `fit` is called in the main thread.

    >>> x = jnp.array([1.0, 2.0, 6.0])
    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> result = fit(nll, optax.sgd(0.5), 0.0, x, jax.random.key(0), num_steps=20, batch_size=3, progress="none")
    >>> print(f"{result.state.params:.3f}", result.history.loss.shape, result.reason)
    3.000 (20,) num_steps
    """
    plan = _Plan(Losses("fit", nll), optimizer, num_steps, batch_size, record_every, validation, validate_every,
                 patience, micro_batches, average_decay, max_skipped, save_every_seconds)  # fmt: skip
    _check(plan, data, key, keep, progress)
    given = _begin(init(params, optimizer, key), average_decay, validates=validation is not None)
    given = jax.tree.map(_strong, given)
    arrays = None if _is_source(data) else data
    outer = jax.sharding.get_abstract_mesh()
    mesh = sharding.explicit_mesh((given, arrays, validation))
    with sharding.automatic_axes(mesh), contextlib.ExitStack() as stack:
        plan = plan._replace(validation=sharding.automatic(_on_device(validation), mesh))
        feed = _feed(plan, data, mesh, outer)
        state = sharding.in_one_place(*sharding.automatic((given, arrays), mesh))
        caught = stack.enter_context(signals.caught())
        store, saved = None, None
        if checkpoint_dir is not None:
            description = _description(plan, state, data, config)
            store = stack.enter_context(checkpoint.opened(checkpoint_dir, description, keep))
            saved = _resumed(plan, feed, store, state)
        start = saved or checkpoint.Saved(0, state, History._make([np.zeros(0, np.float32)] * 5), feed.position())
        show = stack.enter_context(terminal.progress(plan, "none" if jax.process_index() else progress))
        try:
            result = _train(plan, feed, store, start, caught, show)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:
                _tell_of_the_others(error, store)
            raise
    state, history = sharding.explicit((result.state, result.history), mesh or feed.mesh())
    return Result(state, history, result.reason)


class _Plan(NamedTuple):
    """The arguments of `fit` that its parts share."""

    nll: Nll
    optimizer: optax.GradientTransformation
    num_steps: int
    batch_size: int
    record_every: int
    validation: PyTree | None
    validate_every: int | None
    patience: int | None
    micro_batches: int
    average_decay: float | None
    max_skipped: int
    save_every_seconds: float


class _Feed(NamedTuple):
    """The data, as functions: all in which arrays and batches differ.

    Attributes:
      advance: takes a number of steps from a state; gives the new state, and rows of metrics in pieces.
      batch: the next batch from a state, and its weights.
      position: where the next batch comes from, in values of JSON.
      seek: goes to such a position, which was reached after a number of steps.
      mesh: that of the batches so far, if its axes are explicit.
    """

    advance: Callable[[State, int], tuple[State, list[Metrics]]]
    batch: Callable[[State], tuple[PyTree, Array | None]]
    position: Callable[[], Any] = lambda: None
    seek: Callable[[Any, int], None] = lambda position, step: None
    mesh: Callable[[], Any] = lambda: None


class _Chunk(NamedTuple):
    """What the device has been asked for: some rows, and what there is after them."""

    num_rows: int
    rows: list[Metrics]
    score: Float[Array, ""] | None
    step: int
    state: State
    position: Any


@dataclass
class _Pace:
    """How fast training is, from which follows how long the next chunk is.

    Attributes:
      seconds: time of a row; None while it is unknown.
      since: when the last chunk was done; None if something else took time after it, a compilation or a checkpoint.
      sizes: numbers of rows that there are programs for.
      total_rows, total_seconds: all rows whose time is known, and that time.
    """

    seconds: float | None = None
    since: float | None = None
    sizes: set[int] = field(default_factory=set)
    total_rows: int = 0
    total_seconds: float = 0.0


def _resumed(plan, feed, store, state):
    saved = checkpoint.latest(store, state)
    if saved is not None:
        if saved.step > plan.num_steps:
            raise ValueError(f"fit: {store.directory} has a checkpoint of step {saved.step}, past {plan.num_steps}")
        words = "ended before, at" if _end(plan, saved.step, saved.state) else "going on from"
        terminal.tell(f"{words} step {saved.step} of {plan.num_steps}, saved in {store.directory}")
        feed.seek(saved.position, saved.step)
    return saved


def _train(plan, feed, store, start, caught, show):
    edge, num_pieces = start, 1  # where training may be taken up again, and how many pieces its history has
    pieces, pace, failing, saved_at = [start.history], _Pace(), 0, time.monotonic()
    reason = _end(plan, start.step, start.state)
    for chunk in () if reason else _one_in_flight(_chunks(plan, feed, start, pace)):
        pieces.append(_piece(chunk))
        _keep_time(pace, chunk.num_rows)
        failed, failing = _failing_rows(pieces[-1].skipped == plan.record_every, failing, plan)
        if failed is not None:
            where = _save(store, edge, pieces[:num_pieces])
            blame = _blame(plan, feed, edge, chunk.step - (chunk.num_rows - failed) * plan.record_every)
            raise FloatingPointError(f"fit: {blame}; the state of step {edge.step} is {where}")
        reason = _end(plan, chunk.step, chunk.state)
        if reason or not failing:
            edge, num_pieces = chunk, len(pieces)
        show(chunk.step, pieces[-1].loss[-1], pace)
        if reason or _caught_by_any(caught):
            break
        if _of_the_first(time.monotonic() - saved_at) >= plan.save_every_seconds:
            _save(store, edge, pieces[:num_pieces])
            pace.since, saved_at = None, time.monotonic()
    where = _save(store, edge, pieces[:num_pieces])
    if number := _caught_by_any(caught):
        advice = "; the same call goes on from there" if store else ""
        name = signal.Signals(number).name
        terminal.tell(f"stopped by {name} at step {edge.step} of {plan.num_steps}; {where}{advice}")
        raise SystemExit(128 + number)
    return Result(edge.state, jax.tree.map(jnp.asarray, _joined(pieces)), reason)


def _caught_by_any(caught):
    """The number of a signal that any process caught, or 0: one that ended alone would leave the others waiting."""
    number = caught[0] if caught else 0
    return number if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(number))))


def _of_the_first(seconds):
    """A time as the first process has it: all must ask for the same chunks, and save them together."""
    if jax.process_count() == 1:
        return seconds
    return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


def _end(plan, step, state):
    if plan.patience is not None and state.stale >= plan.patience:
        return "patience"
    return "num_steps" if step == plan.num_steps else ""


def _save(store, edge, pieces):
    """Saves what is not saved yet; says in words where it is."""
    if store is None:
        return "not saved: there is no checkpoint_dir"
    if edge.step not in store.scores:
        checkpoint.save(store, checkpoint.Saved(edge.step, edge.state, _joined(pieces), edge.position))
    return f"saved in {store.directory}"


def _one_in_flight(chunks):
    """Each chunk, but only after the next one has been asked for."""
    last = next(chunks)
    for chunk in chunks:
        yield last
        last = chunk
    yield last


def _chunks(plan, feed, start, pace):
    step, state = start.step, start.state
    interval = plan.validate_every or plan.num_steps
    while step < plan.num_steps:
        room = min(interval - step % interval, plan.num_steps - step)
        size, calls = _size(pace, room // plan.record_every, interval // plan.record_every)
        rows, score = [], None
        for _ in range(calls):
            state, more = feed.advance(state, size * plan.record_every)
            rows += more
        step += size * calls * plan.record_every
        if plan.validation is not None and step % interval == 0:
            places, length = sharding.places(plan.validation), plan.batch_size // plan.micro_batches
            state, score = _validate(plan.nll, state, plan.validation, places, length)
        state = sharding.put_back(_spread_as(start.state, state), state)
        if size not in pace.sizes:
            pace.sizes.add(size)
            pace.since = None
        yield _Chunk(size * calls, rows, score, step, state, feed.position())


def _size(pace, room, interval):
    """Rows of a program, and how often to call it for a chunk. A new size costs a compilation, so there are few."""
    wanted = 1 if pace.seconds is None else max(1, int(_SECONDS_OF_A_CHUNK / pace.seconds))
    if room == interval <= wanted:
        return interval, 1
    num_rows = min(room, wanted)
    size = 8 ** ((num_rows.bit_length() - 1) // 3)
    return size, num_rows // size


def _keep_time(pace, num_rows):
    now = time.monotonic()
    if pace.since is not None:
        seconds = _of_the_first(max(now - pace.since, 1e-6))
        pace.seconds = seconds / num_rows
        pace.total_rows += num_rows
        pace.total_seconds += seconds
    pace.since = now


@partial(jax.jit, static_argnames=("nll", "places", "batch_size"))
def _validate(nll, state, validation, places, batch_size):
    scored = state.params if state.average is None else _average_params(state)
    score = _score(nll, scored, validation, places, state.key, batch_size)
    return _judge(state, scored, score), score


def _piece(chunk):
    """The history of a chunk, once the device has it."""
    rows, score = jax.device_get((chunk.rows, chunk.score))
    columns = [np.concatenate([np.atleast_1d(x) for x in column]) for column in zip(*rows, strict=True)]
    return History._make([*columns, np.zeros(0, np.float32) if score is None else np.atleast_1d(score)])


def _joined(pieces):
    def join(*parts):
        return np.concatenate([x for x in parts if x.size] or parts[:1])  # an empty one has no say in the dtype

    return jax.tree.map(join, *pieces)


def _failing_rows(fails, before, plan):
    """The first row of the first series of failing ones that is too long, or None; and how many fail at the end.

    The last `before` rows before these failed too, so that a series may begin at a negative number.
    """
    sound = np.concatenate([[-1 - before], np.flatnonzero(~fails), [fails.size]])
    lengths = np.diff(sound) - 1
    too_long = np.flatnonzero(lengths * plan.record_every >= plan.max_skipped)
    return (int(sound[too_long[0]]) + 1 if too_long.size else None), int(lengths[-1])


def _blame(plan, feed, edge, first):
    """What was not finite in step `first`, up to which the steps are taken once more."""
    feed.seek(edge.position, edge.step)
    state = edge.state
    for _ in range(edge.step, first, plan.record_every):
        state, _ = feed.advance(state, plan.record_every)
    metrics, gradient = _metrics_and_gradient(plan, state, *feed.batch(state))
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    names = [jax.tree_util.keystr(path) for path, leaf in leaves if not jnp.all(jnp.isfinite(leaf))]
    if names:
        where = f"the gradient is not finite in params{names[0]}"
    elif jnp.isfinite(metrics.loss) and jnp.isfinite(metrics.gradient_norm):
        where = "the gradient is finite, but not the update"
    else:
        where = f"the gradient is finite, of norm {metrics.gradient_norm}"
    return f"{plan.max_skipped} steps in a row failed, from step {first} on: loss {metrics.loss}, {where}"


def _metrics_and_gradient(plan, state, batch, weights):
    """As `step` has them, by way of an optimizer that looks at the gradient."""
    options = {"micro_batches": plan.micro_batches, "average_decay": plan.average_decay}

    @jax.jit
    def looked_at(state, batch, weights):
        seen = []

        def look(updates, state, params=None):
            seen.append(updates)
            return updates, state

        looking = optax.GradientTransformation(lambda params: (), look)
        _, metrics = step(plan.nll, looking, state._replace(optimizer_state=()), batch, weights=weights, **options)
        return metrics, seen[0]

    return looked_at(state, batch, weights)


def _feed(plan, data, mesh, outer):
    if callable(data):
        return _batch_feed(plan, lambda position, step: map(data, itertools.count(step)), lambda: None, outer)
    if hasattr(data, "state_dict"):

        def position():
            return _json("state_dict() of data", data.state_dict())

        return _batch_feed(plan, partial(_endless, data), position, outer)
    return _array_feed(plan, sharding.automatic(_on_device(data), mesh))


def _array_feed(plan, data):
    size = _num_examples("fit", "data", data)
    options = {"micro_batches": plan.micro_batches, "average_decay": plan.average_decay}
    take = partial(run, plan.nll, plan.optimizer, data=data, batch_size=plan.batch_size, **options)

    def advance(state, num_steps):
        state, history = take(state, num_steps=num_steps, record_every=plan.record_every)
        return state, [Metrics(*history[:4])]

    def batch(state):
        numbers = _order.batches(_keys(state.key)[0], state.step, size, 1, plan.batch_size)[0]
        weights = None if size % plan.batch_size == 0 else (numbers < size).astype(jnp.float32)
        return jax.tree.map(lambda x: x[jnp.minimum(numbers, size - 1)], data), weights

    return _Feed(advance, batch)


def _batch_feed(plan, batches, position, outer):
    """The source of the batches is called for the mesh that the caller of `fit` set: it may compute as he does."""
    coming, mesh = batches(None, 0), None

    def seek(position, step):
        nonlocal coming
        coming = batches(position, step)

    def fetched():
        nonlocal mesh
        with jax.sharding.use_abstract_mesh(outer):
            batch = next(coming)
        mesh = sharding.explicit_mesh(batch)
        return sharding.automatic(_on_device(batch), mesh)

    def placed():
        with jax.sharding.use_abstract_mesh(outer):
            return position()

    def advance(state, num_steps):
        rows = []
        for _ in range(num_steps // plan.record_every):
            state, row = _row(plan, state, (fetched() for _ in range(plan.record_every)))
            rows.append(row)
        return state, rows

    return _Feed(advance, lambda state: (fetched(), None), placed, seek, lambda: mesh)


def _row(plan, state, batches):
    """The steps of a row. While the device takes one, the host fetches the batch of the next, and no more."""
    metrics, sizes = None, []
    for number, batch in enumerate(batches):
        sizes.append(_num_examples("fit", "a batch of data", batch))
        before = state.step
        state, row = _step(plan.nll, plan.optimizer, state, batch, plan.micro_batches, plan.average_decay)
        if metrics is None:
            metrics = jax.tree.map(lambda x: jnp.zeros(plan.record_every, x.dtype), row)
        metrics = _put(metrics, row, number)
        jax.block_until_ready(before)
    return state, metrics if plan.record_every == 1 else _summarised(metrics, np.array(sizes))


@partial(jax.jit, static_argnames=("nll", "optimizer", "micro_batches", "average_decay"))
def _step(nll, optimizer, state, batch, micro_batches, average_decay):
    return step(nll, optimizer, state, batch, micro_batches=micro_batches, average_decay=average_decay)


@jax.jit
def _put(rows, row, number):
    return jax.tree.map(lambda all, x: all.at[number].set(x), rows, row)


_summarised = jax.jit(_summary)


def _endless(data, position, step):
    if position is not None:
        data.load_state_dict(position)
    for epoch in itertools.count():
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty and epoch:  # the first is empty where the position is the end of an epoch
            raise ValueError("fit: data must give batches each time they are iterated, got none")


def _check(plan, data, key, keep, progress):
    counts = ("num_steps", "batch_size", "record_every", "validate_every", "patience", "micro_batches", "max_skipped")
    given = {name: getattr(plan, name) for name in (*counts, "validation", "average_decay")}
    _arguments.options("fit", keep=keep, **given)
    leaves = jax.tree.leaves(data, is_leaf=lambda x: isinstance(x, Iterator))
    if not _is_source(data) and not all(hasattr(x, "shape") for x in leaves):
        expected = "arrays, a function of the step, or an iterable with state_dict and load_state_dict"
        raise ValueError(f"fit: data must be {expected}, got {_checks.describe(data)}")
    if not hasattr(key, "dtype") or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"fit: key must be made by jax.random.key, got {_checks.describe(key)}")
    if progress not in ("auto", "none"):
        raise ValueError(f'fit: progress must be "auto" or "none", got {progress!r}')


def _strong(x):
    """Without a weak type, which no checkpoint would bring back."""
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.asarray(x, x.dtype)


def _is_source(data):
    """Of batches, rather than arrays."""
    return callable(data) or hasattr(data, "state_dict")


def _on_device(data):
    """What lies on devices stays where it is."""
    return jax.tree.map(lambda x: x if isinstance(x, Array) else jax.device_put(x), data)


def _description(plan, state, data, config):
    """What a checkpoint must have in common with the run that goes on from it."""
    names = ("batch_size", "record_every", "validate_every", "micro_batches", "average_decay")
    return {
        "jprob": importlib.metadata.version("jprob"),
        **_flat("config", _json("config", config or {})),
        **{name: getattr(plan, name) for name in names},
        **({"data": "batches"} if _is_source(data) else checkpoint.describe("data", data)),
        **checkpoint.describe("validation", plan.validation),
        **checkpoint.describe("", state),
        "key": f"{jax.random.key_impl(state.key)} {jax.random.key_data(state.key).tolist()}",  # its value, too
    }


def _flat(name, value):
    if not isinstance(value, dict):
        return {name: value}
    return {key: x for part, inner in value.items() for key, x in _flat(f"{name}.{part}", inner).items()}


def _json(name, value):
    """A copy, so that nobody changes it later."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"fit: {name} must be made of values of JSON: {error}") from None


def _tell_of_the_others(error, store):
    """What can be done, before jax, in many words, ends those that are left once one has gone."""
    saved = "nothing is saved"
    if store and store.scores:
        saved = f"they go on from step {max(store.scores)}, saved in {store.directory}"
    reason = str(error).splitlines()[0]
    print(f"fit: {reason}; if another process has gone, start all again: {saved}", file=sys.stderr, flush=True)

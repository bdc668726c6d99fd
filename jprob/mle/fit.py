"""`fit`, for a person at a terminal: training in chunks, with progress, checkpoints, and clean interruption."""

import contextlib
import hashlib
import importlib.metadata
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jaxtyping import Bool, Key, PyTree, Real

from .. import _checks, _placement
from . import _arguments, _order, checkpoint, loop, objective, sharding, signals, terminal
from . import data as sources
from .loop import Evaluation
from .objective import Nll, Objective
from .state import (
    History,
    Metrics,
    State,
    averaged_params,
    fast,
    flat_history,
    init,
    key_for_nll,
    nested_history,
    strong,
)

_SECONDS_OF_A_CHUNK = 0.3
_MOST_ROWS = 1024  # of a chunk: the length of the buffers of its program
_NUMBERS = 2**16  # of examples, whose order is computed at a time


class Result(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: where training ended.
      history: what was measured from the first step on, also if several calls took it.
      reason: why training ended: "num_steps", "patience", "data" at the end of an iterator, or "log" if the log asked.
      skipped: how many steps were skipped and why, as far as it is known; empty if none was.
    """

    state: State
    history: History
    reason: str
    skipped: str


class Report(NamedTuple):
    """What `log` is given.

    Attributes:
      step: steps taken.
      history: the rows and scores since the last report, in numpy arrays.
      state: the state after them.
    """

    step: int
    history: History
    state: State


def fit(
    nll: Nll,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    data: PyTree,
    key: Key[Array, ""],
    *,
    num_steps: int,
    batch_size: int,
    model_state: PyTree = None,
    weights: Real[Array, " n"] | Bool[Array, " n"] | None = None,
    log_every: int = 1,
    validation: PyTree | None = None,
    validation_weights: Real[Array, " m"] | Bool[Array, " m"] | None = None,
    validation_nll: Nll | None = None,
    validate_every: int | None = None,
    evaluation_params: Callable[[State], PyTree] = averaged_params,
    monitor: str = "loss",
    monitor_mode: str = "min",
    patience: int | None = None,
    micro_batches: int = 1,
    ema_decay: float | None = None,
    max_skipped: int = 20,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    save_every_seconds: float = 60.0,
    max_to_keep: int = 3,
    config: Mapping[str, Any] | None = None,
    log: Callable[[Report], bool | None] | None = None,
    progress: str = "auto",
) -> Result:
    """Trains like `run`, with progress, checkpoints and clean interruption.

    With `checkpoint_dir` the same call goes on from the newest checkpoint there, however the last one ended, and comes
    to the bits of a run that was never stopped; `num_steps` and `patience` may have changed. Ctrl-C ends training after
    the current chunk, saves, and raises KeyboardInterrupt with the `Result` as its attribute `result`; a second Ctrl-C
    interrupts at once.
    SIGTERM ends training likewise, saves, and exits with code 143.

    What was placed on devices stays there, spread as it was, on axes of either kind as for `run`; an array that `nll`
    closes over must not lie on explicit ones. If `jax.distributed` joins several processes, all of them make the same
    call, with params or data on a mesh over all devices and one `checkpoint_dir` that all see: the first prints, and a
    signal to any one ends all. A checkpoint goes on in any placement, and any number of processes.

    Args:
      nll: `nll(params, batch, key) -> losses`, as for `step`, or returning an `Output`.
      optimizer: an optax gradient transformation.
      params: initial parameters, any pytree of floating-point arrays.
      data: all examples, as for `run`. Or batches, if the examples are too many for the device: a function
        `batch_at(step) -> batch`, an iterable of batches, which is iterated again at its end, or an iterator, at whose
        end training ends. Arrays of other libraries are converted. A source with `state_dict` and `load_state_dict`
        (torchdata), or whose iterator has `get_state` and `set_state` (Grain), is resumed at the next batch. Of several
        processes each gives its share of a batch, as `jax.make_array_from_process_local_data` takes it.
      key: random key of the run.
      num_steps: steps from the first one on, a multiple of `log_every` and of `validate_every`.
      batch_size: examples per step; if `data` are batches, it is for validation alone.
      model_state: what the model updates itself, as for `init`.
      weights: how much each example of arrays counts, as for `run`.
      log_every: steps that make a row of history. Only between rows is training shown, saved and stopped.
      validation: examples to validate with, as for `run`.
      validation_weights: how much each of them counts.
      validation_nll: what to validate, as for `run`: with dropout off and running statistics in use.
      validate_every: steps from one validation to the next, a multiple of `log_every`.
      evaluation_params: from a state to the params to score, as for `run`.
      monitor: what the best params and `patience` follow, as for `run`.
      monitor_mode: "min" or "max", as for `run`.
      patience: training ends after so many validations in a row that are not better than the best.
      micro_batches: parts to cut each batch into, as for `run`.
      ema_decay: decay of the average of the params, as for `run`.
      max_skipped: steps in a row, counted in whole rows, whose loss or gradient may not be finite.
      checkpoint_dir: folder for checkpoints of this run alone, on a disk that is mounted here; needs the extra
        `checkpoint`. `load_params` reads it.
      save_every_seconds: time between checkpoints. There is one more at the end.
      max_to_keep: how many checkpoints stay: the last ones, and the one with the best validation score.
      config: what else tells this run from others, in values of JSON. A checkpoint with other ones is refused.
      log: called with a `Report` after each chunk, about three times a second, on process 0. A bool that is true ends
        training in order; an error ends it with what was reached saved.
      progress: "auto" for a bar if stderr is a terminal and rich is installed, else a line every few seconds; "none"
        for neither. Where training resumes, what it skips and why it stops is told on stderr in either case.

    Returns:
      A `Result`. Its state is that of `run`; so is its history, which ends where patience does.

    Raises:
      ValueError: a fault of the arguments, or a checkpoint of another run, whose first difference is named.
      FloatingPointError: `max_skipped` is reached. The step and the leaf of the gradient are named; the state before
        is saved, and is the attribute `result`.
      RuntimeError: the source of batches failed. What was reached is saved, and is the attribute `result`.
      OSError: the folder cannot be written, its disk is full, be it for one process of several, or no checkpoint in it
        can be read.
      ImportError: `checkpoint_dir` is given and orbax is not installed.
      KeyboardInterrupt: Ctrl-C, if `fit` is called in the main thread. Its attribute `result` is what was reached.
      SystemExit: with code 143 on SIGTERM, likewise.

    >>> x = jnp.array([1.0, 2.0, 6.0])
    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> result = fit(nll, optax.sgd(0.5), 0.0, x, jax.random.key(0), num_steps=20, batch_size=3, progress="none")
    >>> print(f"{result.state.params:.3f}", result.history.loss.shape, result.reason)
    3.000 (20,) num_steps
    """
    _arguments.functions("fit", nll=nll, optimizer=optimizer, validation_nll=validation_nll or nll,
                         evaluation_params=evaluation_params, log=log or print)  # fmt: skip
    _arguments.options("fit", num_steps=num_steps, batch_size=batch_size, log_every=log_every,
                       validation=validation, validate_every=validate_every, patience=patience,
                       micro_batches=micro_batches, ema_decay=ema_decay, max_skipped=max_skipped,
                       max_to_keep=max_to_keep)  # fmt: skip
    _arguments.of_validation("fit", validation, validation_weights, validation_nll, monitor, monitor_mode)
    config = sources.json_copy("config", config or {})
    if progress not in ("auto", "none"):
        raise ValueError(f'fit: progress must be "auto" or "none", got {progress!r}')
    evaluation = Evaluation(Objective("fit", validation_nll or nll), evaluation_params, monitor, monitor_mode,
                            batch_size // micro_batches) if validation is not None else None  # fmt: skip
    plan = _Plan(Objective("fit", nll), optimizer, num_steps, batch_size, log_every, evaluation, validate_every,
                 patience, micro_batches, ema_decay, max_skipped, save_every_seconds)  # fmt: skip
    given = loop.begin(init(params, optimizer, key, model_state=model_state), ema_decay, evaluation)
    given = jax.tree.map(strong, given)
    has_source, outer = sources.is_source(data), jax.sharding.get_abstract_mesh()
    if has_source and weights is not None:
        raise ValueError("fit: weights are for arrays; let nll return those of a batch in an mle.Output")
    arrays = (None, None) if has_source else (data, loop.example_weights("fit", "data", data, weights))
    held_out = None
    if validation is not None:
        held_out = validation, loop.example_weights("fit", "validation", validation, validation_weights)
    mesh = _placement.explicit_mesh((given, arrays, held_out))
    with _placement.automatic_axes(mesh), contextlib.ExitStack() as stack:
        held_out = _placement.to_automatic(sources.on_device(held_out), mesh)
        arrays = _placement.to_automatic(sources.on_device(arrays), mesh)
        feed = _Batches(plan, data, outer) if has_source else _Arrays(plan, arrays)
        state = sharding.in_one_place(_placement.to_automatic(given, mesh), arrays)
        caught = stack.enter_context(signals.caught())
        store, saved = None, None
        if checkpoint_dir is not None:
            description, versions = _description(plan, state, arrays, held_out, config), _versions(optimizer, state)
            store = stack.enter_context(checkpoint.opened(checkpoint_dir, description, max_to_keep, versions))
            saved = _resumed(plan, feed, store, state)
        start = [saved or checkpoint.Saved(0, state, _NO_HISTORY, feed.position())]
        del given, state, saved
        show = stack.enter_context(terminal.progress(num_steps, progress))
        try:
            result = _train(plan, feed, held_out, store, start, caught, log, show)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:
                _tell_of_the_others(error, store)
            raise
    state, history = _placement.to_explicit((result.state, result.history), mesh or feed.mesh)
    return result._replace(state=state, history=history)


class _Plan(NamedTuple):
    """The arguments of `fit` that its parts share."""

    nll: Objective
    optimizer: optax.GradientTransformation
    num_steps: int
    batch_size: int
    log_every: int
    evaluation: Evaluation | None
    validate_every: int | None
    patience: int | None
    micro_batches: int
    ema_decay: float | None
    max_skipped: int
    save_every_seconds: float

    def update(self) -> tuple[Any, ...]:
        """The arguments of a step, static."""
        return self.nll, self.optimizer, self.micro_batches, self.ema_decay


_NO_HISTORY: dict[str, Any] = {
    name: np.zeros(0, np.int32 if name == "skipped" else np.float32)
    for name in ("loss", "gradient_norm", "update_norm", "skipped", "validation")
}


class _Arrays:
    """Data that lie on the device: minibatches of them, by one program for chunks of any length."""

    mesh = None

    def __init__(self, plan: _Plan, data: Any) -> None:
        self.plan, self.data = plan, data
        self.size = objective.num_examples("fit", "data", data)
        self.places = sharding.places(data[0])

    def advance(self, state: State, num_rows: int, stop: Callable[[], bool]) -> tuple[State, list[Metrics]]:
        """The state after some rows of steps, and what they measured; at most `_MOST_ROWS`."""
        plan = self.plan
        static = plan.update(), plan.log_every, plan.batch_size, self.places
        state, buffers = _rows(*static, state, self.data, jnp.int32(num_rows))
        return state, [jax.tree.map(lambda x: x[:num_rows], jax.device_get(buffers))]

    def batch(self, state: State, step: int, last_good: Any = None) -> tuple[PyTree, Array | None] | None:
        """The batch of a step, and its weights."""
        row = _order.batches(state.key, jnp.int32(step), self.size, 1, self.plan.batch_size)[0]
        return loop.take(self.data, row, self.size)

    def position(self) -> Any:
        """None: the step says it."""

    def seek(self, position: Any, step: int) -> None:
        """Nothing: the state says it."""


@partial(jax.jit, static_argnums=range(4))
def _rows(update, log_every, batch_size, places, state, data, num_rows):
    """Some rows of steps, at most `_MOST_ROWS`, by a loop of that length: one program serves all."""
    size = objective.num_examples("fit", "data", data)
    row_of = loop.row(update, log_every, batch_size, places, data)
    block = max(1, min(_MOST_ROWS, _NUMBERS // (log_every * batch_size)))

    def numbers(state):
        order = _order.batches(state.key, state.step, size, block * log_every, batch_size)
        return order.reshape(block, log_every, batch_size)

    measured = jax.eval_shape(lambda state: row_of(state, numbers(state)[0])[1], state)
    buffers = jax.tree.map(lambda x: jnp.zeros((_MOST_ROWS, *x.shape), x.dtype), measured)

    def one_block(carry):
        done, state, buffers = carry
        rows = numbers(state)

        def one(number, carry):
            state, buffers = carry
            state, metrics = row_of(state, rows[number])
            return state, jax.tree.map(lambda all, x: all.at[done + number].set(x), buffers, metrics)

        count = jnp.minimum(block, num_rows - done)
        return done + count, *jax.lax.fori_loop(0, count, one, (state, buffers))

    _, state, buffers = jax.lax.while_loop(lambda carry: carry[0] < num_rows, one_block, (0 * num_rows, state, buffers))
    return state, buffers


class _Batches:
    """Data that come as batches from the host: while the device takes a step, the host fetches the next batch."""

    def __init__(self, plan: _Plan, data: Any, outer: Any) -> None:
        # The source is called for the mesh that the caller of `fit` set: it may compute on explicit axes.
        with jax.sharding.use_abstract_mesh(outer):
            self.source = sources.opened(data)
        self.plan, self.outer, self.mesh = plan, outer, None

    def advance(self, state: State, num_rows: int, stop: Callable[[], bool]) -> tuple[State, list[Metrics]]:
        """The state after some rows of steps, and what they measured; fewer if `stop` says so, or the source ends."""
        state = jax.tree.map(jnp.copy, state)  # each step is given its state
        rows, steps, before = [], [], None
        while len(rows) < num_rows and not (rows and not steps and stop()):
            try:
                batch = self._fetched()
            except sources.EndedError:
                if steps or not rows:
                    raise
                break  # what was reached counts; the next call meets the end again
            size = objective.num_examples("fit", "a batch of data", batch)
            _arguments.options("fit", batch_size=size, micro_batches=self.plan.micro_batches)
            state, metrics = _given_step(*self.plan.update(), state, batch, None)
            steps.append(metrics)
            jax.block_until_ready(before)  # the host is one batch ahead, and no more
            before = metrics.loss
            if len(steps) == self.plan.log_every:
                rows.append(steps[0] if len(steps) == 1 else _summed_up(steps))
                steps = []
        return state, [jax.tree.map(np.atleast_1d, row) for row in jax.device_get(rows)]

    def batch(self, state: State, step: int, last_good: Any = None) -> tuple[PyTree, Array | None] | None:
        """The batch of a step: of a function, or of a source that may go back to the last_good, since training ends."""
        if isinstance(self.source, sources.Function):
            there = self.source.step
            self.source.seek(None, step)
            try:
                return self._fetched(), None
            finally:
                self.source.seek(None, there)
        if last_good is None or not self.source.has_position:
            return None
        self.seek(last_good.position, last_good.step)
        for _ in range(last_good.step, step):
            self._fetched()
        return self._fetched(), None

    def position(self) -> Any:
        """Where the next batch comes from."""
        with jax.sharding.use_abstract_mesh(self.outer):
            return self.source.position()

    def seek(self, position: Any, step: int) -> None:
        """Goes to such a position, reached after so many steps."""
        with jax.sharding.use_abstract_mesh(self.outer):
            self.source.seek(position, step)

    def _fetched(self):
        with jax.sharding.use_abstract_mesh(self.outer):
            batch = self.source.next()
        self.mesh = _placement.explicit_mesh(batch)
        return _placement.to_automatic(sources.on_device(batch), self.mesh)


@partial(jax.jit, static_argnums=range(4), donate_argnums=4)
def _given_step(nll, optimizer, micro_batches, ema_decay, state, batch, weights):
    return loop.one_step(nll, optimizer, micro_batches, ema_decay, state, batch, weights)


@jax.jit
def _summed_up(steps):
    return loop.summary(jax.tree.map(lambda *x: jnp.stack(x), *steps))


@partial(jax.jit, static_argnums=(0, 3))
def _validated(evaluation, state, held_out, places):
    state, means = loop.validate(evaluation, state, held_out, places)
    return state.best, state.validations_since_best, means


class _Pace:
    """How long the next chunk is: so many rows that it takes `_SECONDS_OF_A_CHUNK`."""

    def __init__(self) -> None:
        self.seconds_of_a_row, self.since, self.rows, self.seconds = None, None, 0, 0.0

    def num_rows(self, room: int) -> int:
        """Rows of the next chunk."""
        wanted = 1 if self.seconds_of_a_row is None else int(_SECONDS_OF_A_CHUNK / self.seconds_of_a_row)
        return max(1, min(wanted, room, _MOST_ROWS))

    def done(self, num_rows: int) -> None:
        """A chunk is done. The time of the first one is not known: it was compiled."""
        now = time.monotonic()
        if self.since is not None:
            seconds = _of_the_first(max(now - self.since, 1e-6))
            self.seconds_of_a_row = seconds / num_rows
            self.rows, self.seconds = self.rows + num_rows, self.seconds + seconds
        self.since = now

    def paused(self) -> None:
        """Something else takes time: the next chunk is measured from its own start."""
        self.since = self.since and time.monotonic()

    @property
    def rows_per_second(self) -> float | None:
        """Of all chunks whose time is known."""
        return self.rows / self.seconds if self.rows else None


def _resumed(plan, feed, store, state):
    saved = checkpoint.latest(store, state)
    if saved is not None:
        if saved.step > plan.num_steps:
            raise ValueError(f"fit: {store.directory} has a checkpoint of step {saved.step}, past {plan.num_steps}")
        ended = _end(plan, saved.step, saved.state)
        words = "ended before, at" if ended else "going on from"
        terminal.tell(f"{words} step {saved.step} of {plan.num_steps}, saved in {store.directory}")
        if isinstance(feed, _Batches) and not ended and not feed.source.has_position:
            which = "goes on from where it is" if feed.source.once else "begins again with its first batch"
            terminal.tell(f"data cannot tell their position: the source {which}")
        feed.seek(saved.position, saved.step)
    return saved


def _train(plan, feed, held_out, store, start, caught, log, show):
    """Trains from the start, which it takes out of its list, so that no state is kept alive but two."""
    last_good = start.pop()  # the last state that training may be taken up from
    like, pieces, of_last_good = sharding.layout(last_good.state), [last_good.history], 1
    step, pace, failing, saved_at, told = last_good.step, _Pace(), 0, time.monotonic(), ""
    interval, reason = plan.validate_every or plan.num_steps, _end(plan, last_good.step, last_good.state)
    places, state = sharding.places(held_out and held_out[0]), last_good.state

    def reached(reason):
        history = jax.tree.map(jnp.asarray, nested_history(_joined(pieces[:of_last_good])))
        return Result(last_good.state, history, reason, _skipped_in_words(last_good, told))

    def ended(kind, message, reason):
        """An error that says what is saved, with the result as its attribute."""
        error = kind(message + _save(store, last_good, pieces[:of_last_good]))
        setattr(error, "result", reached(reason))  # noqa: B010, which no class of Python's has a field for
        return error

    while not reason:
        num_rows = pace.num_rows(min(interval - step % interval, plan.num_steps - step) // plan.log_every)
        try:
            state, rows = feed.advance(state, num_rows, partial(_stops, caught, time.monotonic()))
        except sources.EndedError as error:
            if error.__cause__ is not None:
                message = f"fit: {error}, at step {last_good.step} of {plan.num_steps}; "
                raise ended(RuntimeError, message, "data") from error.__cause__
            terminal.tell(f"{error}, at step {last_good.step} of {plan.num_steps}")
            reason = "data"
            break
        piece = _piece(rows)
        num_rows = piece["loss"].size
        pace.done(num_rows)
        first, step = step, step + num_rows * plan.log_every
        if plan.evaluation and step % interval == 0:
            best, validations_since_best, means = _validated(plan.evaluation, state, held_out, places)
            state = state._replace(best=best, validations_since_best=validations_since_best)
            piece |= _scores(plan, means, step)
            pace.paused()
        state = sharding.put_back(loop.spread_as(like, state), state)
        pieces.append(piece)
        if not told and piece["skipped"].any():
            row = int(np.argmax(piece["skipped"] > 0))
            at = first + row * plan.log_every
            plain = f"loss {piece['loss'][row]}, gradient norm {piece['gradient_norm'][row]}"
            told = _diagnosis(plan, feed, state, range(at, at + plan.log_every)) or plain
            which = f"step {at}" if plan.log_every == 1 else f"a step in the row from {at} on"
            terminal.tell(f"{which} is skipped: {told}")
            pace.paused()
        failed, failing = _failing_rows(piece["skipped"] == plan.log_every, failing, plan)
        if failed is not None:
            at = first + failed * plan.log_every
            why = _diagnosis(plan, feed, state, range(at, at + 1), last_good) or "the batches cannot be had again"
            message = f"fit: {plan.max_skipped} steps in a row failed, from step {at} on: {why}"
            raise ended(FloatingPointError, f"{message}; the state of step {last_good.step} is ", "skipped")
        reason = _end(plan, step, state)
        if reason or not failing:
            last_good, of_last_good = checkpoint.Saved(step, state, {}, feed.position()), len(pieces)
        speed = pace.rows_per_second
        show(step, piece["loss"][-1], speed and speed * plan.log_every)
        try:
            asked = _logged(log, step, piece, state)
            reason = reason or ("log" if asked else "")
        except BaseException:
            _save(store, last_good, pieces[:of_last_good])
            raise
        if reason or _caught_by_any(caught):
            break
        if _of_the_first(time.monotonic() - saved_at) >= plan.save_every_seconds:
            _save(store, last_good, pieces[:of_last_good])
            saved_at = time.monotonic()
            pace.paused()
    where, result = _save(store, last_good, pieces[:of_last_good]), reached(reason)
    if result.skipped:
        terminal.tell(result.skipped)
    if number := _caught_by_any(caught):
        advice = "; the same call goes on from there" if store else ""
        name = signal.Signals(number).name
        stopped = f"stopped by {name} at step {last_good.step} of {plan.num_steps}"
        terminal.tell(f"{stopped}; {where}{advice}")
        if number == signal.SIGINT:  # no subclass: Python ends a script with 130 for this class alone
            raise ended(KeyboardInterrupt, f"{stopped}; ", name)
        raise SystemExit(128 + number)
    return result


def _stops(caught, began):
    """Whether a chunk ends early: for a signal, or since its source has become slow. Several processes go by count."""
    return jax.process_count() == 1 and (bool(caught) or time.monotonic() - began > 4 * _SECONDS_OF_A_CHUNK)


def _logged(log, step, piece, state):
    """Whether the log asks for the end, by a bool, on process 0."""
    if log is None:
        return False
    asked = jax.process_index() == 0 and log(Report(step, nested_history(_NO_HISTORY | piece), state))
    wanted = getattr(asked, "dtype", np.dtype(type(asked) if isinstance(asked, bool) else object)) == np.bool_
    return bool(_of_the_first(float(wanted and bool(asked))))


def _caught_by_any(caught):
    """The number of a signal that any process caught, or 0: one that ended alone would leave the others waiting."""
    number = caught[0] if caught else 0
    return number if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(number))))


def _of_the_first(number):
    """A number as the first process has it: all must ask for the same chunks, and save them together."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def _end(plan, step, state):
    if plan.patience is not None and state.validations_since_best >= plan.patience:
        return "patience"
    return "num_steps" if step == plan.num_steps else ""


def _save(store, last_good, pieces):
    """Saves what is not saved yet; says in words where it is."""
    if store is None:
        return "not saved: there is no checkpoint_dir"
    if last_good.step not in store.sound:
        checkpoint.save(store, last_good._replace(history=_joined(pieces)))
    return f"saved in {store.directory}"


def _piece(rows):
    """The columns of these rows, in numpy arrays."""
    metrics = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    columns = flat_history(loop.history_of(metrics, None))
    return {name: x for name, x in columns.items() if x.size}


def _scores(plan, means, step):
    means = jax.device_get(means)
    for name, value in ({"loss": means.loss} | means.metrics).items():
        if not np.isfinite(value) and name in ("loss", plan.evaluation.monitor):
            terminal.tell(f"the validation {name} is {value} at step {step}")
    columns = {"validation": means.loss} | {f"validation_metrics/{name}": x for name, x in means.metrics.items()}
    return {name: np.atleast_1d(x) for name, x in columns.items()}


def _joined(pieces):
    names = list(dict.fromkeys(name for piece in pieces for name in piece))
    columns = {name: [piece[name] for piece in pieces if name in piece and piece[name].size] for name in names}
    return _NO_HISTORY | {name: np.concatenate(parts) for name, parts in columns.items() if parts}


def _failing_rows(fails, before, plan):
    """The first row of the first series of failing ones that is too long, or None; and how many fail at the end.

    The last `before` rows before these failed too, so that a series may begin at a negative number.
    """
    sound = np.concatenate([[-1 - before], np.flatnonzero(~fails), [fails.size]])
    lengths = np.diff(sound) - 1
    too_long = np.flatnonzero(lengths * plan.log_every >= plan.max_skipped)
    return (int(sound[too_long[0]]) + 1 if too_long.size else None), int(lengths[-1])


def _diagnosis(plan, feed, state, steps, last_good=None):
    """What is not finite in the first of these steps where something is, by the params of the state, or nothing.

    A step that is skipped changes no params, so that these are those of the step. Its batch is asked for again.
    """
    try:
        for step in steps:
            examples = feed.batch(state, step, last_good)
            found = examples and _diagnose_non_finite(plan, state._replace(step=jnp.int32(step)), *examples)
            if found:
                return found
    except Exception:  # of any class: the source is the caller's, and its fault here must end nothing
        return ""
    return ""


def _diagnose_non_finite(plan, state, batch, weights):
    means, gradient, update_norm, message = _step_seen(plan, state, batch, weights)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    names = [jax.tree_util.keystr(path) for path, leaf in leaves if not jnp.all(jnp.isfinite(leaf))]
    if names:
        what = f"the gradient is not finite in params{names[0]}"
    elif not jnp.isfinite(means.loss):
        what = "the gradient is finite"
    elif not jnp.isfinite(update_norm):
        what = "the gradient is finite, but not the update"
    else:
        return ""
    return f"loss {means.loss}, {what}" + (f": {message}" if message else "")


def _step_seen(plan, state, batch, weights):
    """Loss, gradient and norm of the update of a step, and what the checks of jprob say of its batch."""
    if weights is not None:
        batch = objective.without_weightless(batch, weights)
    key = key_for_nll(state.key, state.step)
    arguments = state.model_state, batch, key, weights
    seen = jax.jit(objective.loss_and_gradient, static_argnums=(0, 6))
    means, gradient, _ = seen(plan.nll, fast(state.params), *arguments, plan.micro_batches)
    _, metrics = loop.step(plan.nll.nll, plan.optimizer, state, batch, weights=weights,
                           micro_batches=plan.micro_batches, ema_decay=plan.ema_decay)  # fmt: skip
    error, _ = _checks.checkify(plan.nll.mean)(fast(state.params), *arguments)
    message = (error.get() or "").split(" (`check` failed)")[0]
    return means, gradient, metrics.update_norm, message


def _skipped_in_words(last_good, told):
    number = int(last_good.state.skipped)
    return f"{number} of {last_good.step} steps skipped" + (f": {told}" if told else "") if number else ""


def _description(plan, state, arrays, held_out, config):
    """What a checkpoint must have in common with the run that goes on from it."""
    marked = partial(checkpoint.describe, fingerprint=True)
    names = ("batch_size", "log_every", "validate_every", "micro_batches", "ema_decay")
    return {
        **_flat("config", config),
        **{name: getattr(plan, name) for name in names},
        **({"monitor": plan.evaluation.monitor, "monitor_mode": plan.evaluation.mode} if plan.evaluation else {}),
        **({"data": "batches"} if arrays[0] is None else marked("data", arrays[0]) | marked("weights", arrays[1])),
        **(marked("validation", held_out[0]) | marked("validation_weights", held_out[1]) if held_out else {}),
        **checkpoint.describe("", state),
        "key": f"{jax.random.key_impl(state.key)} {jax.random.key_data(state.key).tolist()}",  # its value, too
    }


def _versions(optimizer, state):
    """What may differ from the run before, and is told: the packages, and the program of the optimizer's update."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.optimizer_state, state.params))

    def update(optimizer_state, params):
        gradient = fast(params)
        value = optax.tree.sum(gradient)
        every = optax.with_extra_args_support(optimizer).update
        return every(gradient, optimizer_state, params, value=value, grad=gradient, value_fn=optax.tree.sum)

    program = jax.make_jaxpr(update)(*shapes)
    text = re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr)) + "".join(str(np.asarray(x)) for x in program.consts)
    packages = {name: importlib.metadata.version(name) for name in ("jprob", "jax", "jaxlib", "optax", "numpy")}
    return packages | {"update of the optimizer": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _flat(name, value):
    if not isinstance(value, dict):
        return {name: value}
    return {key: x for part, inner in value.items() for key, x in _flat(f"{name}.{part}", inner).items()}


def _tell_of_the_others(error, store):
    """What can be done, before jax, in many words, ends those that are left once one has gone."""
    saved = "nothing is saved"
    if store and store.sound:
        saved = f"they go on from step {max(store.sound)}, saved in {store.directory}"
    reason = str(error).splitlines()[0]
    print(f"fit: {reason}; if another process has gone, start all again: {saved}", file=sys.stderr, flush=True)

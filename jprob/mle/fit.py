"""`fit`, for a person at a terminal: training in chunks, with progress, checkpoints, and clean interruption."""

import contextlib
import hashlib
import importlib.metadata
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Key, PyTree, Real

from .. import _checks, _placement
from . import _arguments, _order, checkpoint, loop, objective, processes, sharding, signals, terminal
from . import data as sources
from .loop import Training
from .objective import Nll
from .state import NO_HISTORY, History, Metrics, State, averaged_params, fast, init, joined, key_for_nll, strong

_SECONDS_OF_A_CHUNK = 0.3
_MOST_ROWS = 1024  # of a chunk: the length of the buffers of its program
_NUMBERS = 2**16  # of examples, whose order is computed at a time


class Result(NamedTuple):
    """The result of `fit`.

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
    """The argument of `log`.

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
    monitor_mode: str | None = None,
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

    The same call with `checkpoint_dir` resumes from the newest checkpoint there, however the last call ended. The
    result is that of a run that was never stopped, bit for bit. `num_steps` and `patience` may have changed. Ctrl-C
    ends training after the current chunk, saves, and raises KeyboardInterrupt with the `Result` as its attribute
    `result`. A second Ctrl-C interrupts at once. SIGTERM ends training likewise, saves, and exits with code 143.

    Arrays that were placed on devices stay there, spread as they were, on axes of either kind as for `run`. An array
    that `nll` closes over must not lie on explicit ones. If `jax.distributed` joins several processes, all of them make
    the same call. The params or the data are then on a mesh over all devices, and all see one `checkpoint_dir`. The
    first process prints, and a signal to any one ends all. A checkpoint resumes in any placement, and with any number
    of processes.

    Args:
      nll: `nll(params, batch, key) -> losses`, as for `step`, or returning an `Output`.
      optimizer: an optax gradient transformation.
      params: initial parameters, any pytree of floating-point arrays.
      data: all examples, as for `run`. Use batches if the examples are too many for the device: a function
        `batch_at(step) -> batch`, an iterable or an iterator. An iterable is iterated again at its end. The end of an
        iterator ends training. Arrays of other libraries are converted. A source is resumed at the next batch if it has
        `state_dict` and `load_state_dict` (torchdata). So is one whose iterator has `get_state` and `set_state`
        (Grain). Each of several processes gives its share of a batch, as for
        `jax.make_array_from_process_local_data`.
      key: random key of the run.
      num_steps: steps from the first one on, a multiple of `log_every` and of `validate_every`.
      batch_size: examples per step; if `data` are batches, it is for validation alone.
      model_state: state that the model updates itself, as for `init`.
      weights: how much each example of arrays counts, as for `run`.
      log_every: steps that make a row of history. Only between rows is training shown, saved and stopped.
      validation: examples to validate with, as for `run`.
      validation_weights: how much each of them counts.
      validation_nll: function to validate, as for `run`: with dropout off and running statistics in use.
      validate_every: steps from one validation to the next, a multiple of `log_every`.
      evaluation_params: from a state to the params to score, as for `run`.
      monitor: value that the best params and `patience` follow, as for `run`.
      monitor_mode: "min" or "max", as for `run`. A metric needs it.
      patience: training ends after so many validations in a row that are not better than the best.
      micro_batches: parts to cut each batch into, as for `run`.
      ema_decay: decay of the average of the params, as for `run`.
      max_skipped: steps in a row, counted in whole rows, whose loss or gradient may not be finite.
      checkpoint_dir: folder for checkpoints of this run alone, on a disk that is mounted here; needs the extra
        `checkpoint`. `load_params` reads it.
      save_every_seconds: time between checkpoints. There is one more at the end.
      max_to_keep: how many checkpoints stay: the last ones, and the one with the best validation score.
      config: further values that tell this run from others, in JSON. A checkpoint with other ones is refused.
      log: called with a `Report` after each chunk, about three times a second, on process 0. A bool that is true ends
        training in order; an error ends it with the result so far saved.
      progress: "auto" for a bar if stderr is a terminal and rich is installed, else a line every few seconds; "none"
        for neither. Messages on resuming, skipping and stopping go to stderr in either case.

    Returns:
      A `Result`. Its state is that of `run`; so is its history, which ends where patience does.

    Raises:
      ValueError: a fault of the arguments, or a checkpoint of another run, whose first difference is named.
      FloatingPointError: `max_skipped` is reached. The step and the leaf of the gradient are named; the state before
        is saved, and is the attribute `result`.
      RuntimeError: the source of batches failed. The result so far is saved, and is the attribute `result`.
      OSError: the folder cannot be written, its disk is full, or no checkpoint in it can be read. The first two may
        happen to one process of several.
      ImportError: `checkpoint_dir` is given and orbax is not installed.
      KeyboardInterrupt: Ctrl-C, if `fit` is called in the main thread. Its attribute `result` is the result so far.
      SystemExit: with code 143 on SIGTERM, likewise.

    >>> x = jnp.array([1.0, 2.0, 6.0])
    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> result = fit(nll, optax.sgd(0.5), 0.0, x, jax.random.key(0), num_steps=20, batch_size=3, progress="none")
    >>> print(f"{result.state.params:.3f}", result.history.loss.shape, result.reason)
    3.000 (20,) num_steps
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((jnp.zeros(()), params, key))):
        raise ValueError("fit: expected a call outside of jit, vmap and checkify, which take mle.run and mle.step")
    numbers = batch_size, micro_batches, ema_decay, log_every, validate_every, patience
    training = Training("fit", nll, optimizer, *numbers, validation_nll, evaluation_params, monitor, monitor_mode)
    counts = {"num_steps": num_steps, "max_skipped": max_skipped, "max_to_keep": max_to_keep}
    _arguments.training(training, validation, validation_weights, **counts)
    _arguments.functions("fit", log=log or print)
    config = sources.json_copy("config", config or {})
    if progress not in ("auto", "none"):
        raise ValueError(f'fit: progress must be "auto" or "none", got {progress!r}')
    given = jax.tree.map(strong, loop.begin(training, init(params, optimizer, key, model_state=model_state)))
    # The source is called for the mesh that the caller set: it may compute on explicit axes.
    source, outer = sources.opened(data), jax.sharding.get_abstract_mesh()
    if source and weights is not None:
        raise ValueError("fit: weights are for arrays; let nll return those of a batch in an mle.Output")
    arrays = (None, None) if source else loop.examples("fit", "data", data, weights)
    held_out = loop.held_out(training, validation, validation_weights)
    mesh = _placement.explicit_mesh((given, arrays, held_out))
    with _placement.automatic_axes(mesh), contextlib.ExitStack() as stack:
        arrays, held_out = _placement.to_automatic(sources.on_device((arrays, held_out)), mesh)
        of_validation = sharding.places(held_out and held_out[0])
        training = training._replace(places=sharding.places(arrays[0]), validation_places=of_validation)
        feed = _Batches(training, source, outer) if source else _Arrays(training, arrays)
        state = sharding.in_one_place(_placement.to_automatic(given, mesh), arrays)
        caught = stack.enter_context(signals.caught())
        store, saved, plan = None, None, _Plan(training, num_steps, max_skipped, save_every_seconds)
        if checkpoint_dir is not None:
            description, versions = _description(training, state, arrays, held_out, config), _versions(optimizer, state)
            store = stack.enter_context(checkpoint.opened(checkpoint_dir, description, max_to_keep, versions))
            saved = _resumed(plan, feed, store, state)
        reached = _Reached(store, saved or checkpoint.Saved(0, state, NO_HISTORY, feed.position()))
        del given, state, saved
        show = stack.enter_context(terminal.progress(num_steps, progress))
        try:
            result = _train(plan, feed, held_out, reached, caught, log, show)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:
                _tell_of_the_others(error, store)
            raise
    state, history = _placement.to_explicit((result.state, result.history), mesh or feed.mesh)
    return result._replace(state=state, history=history)


class _Plan(NamedTuple):
    """A training, and where it ends and is saved."""

    training: Training
    num_steps: int
    max_skipped: int
    save_every_seconds: float


class _Arrays:
    """Data that lie on the device: minibatches of them, by one program for chunks of any length."""

    mesh = None

    def __init__(self, training: Training, data: Any) -> None:
        self.training, self.data = training, data
        self.size = objective.num_examples("fit", "data", data)

    def advance(self, state: State, step: int, num_rows: int, stop: Callable[[], bool]) -> tuple[State, Metrics]:
        """The state after some rows of steps, and what they measured; at most `_MOST_ROWS`."""
        state, buffers = _rows(self.training, state, self.data, jnp.int32(num_rows))
        return state, jax.tree.map(lambda x: x[:num_rows], jax.device_get(buffers))

    def batch(self, state: State, step: int, last_good: Any = None) -> tuple[PyTree, Array | None] | None:
        """The batch of a step, and its weights."""
        row = _order.batches(state.key, jnp.int32(step), self.size, 1, self.training.batch_size)[0]
        return loop.take(self.data, row, self.size)

    def position(self) -> Any:
        """None: the step says it."""

    def seek(self, position: Any) -> None:
        """Nothing: the state says it."""


@partial(jax.jit, static_argnums=0)
def _rows(training, state, data, num_rows):
    """Some rows of steps, at most `_MOST_ROWS`, by a loop of that length: one program serves all."""
    size, row_of = objective.num_examples("fit", "data", data), partial(loop.row, training, data)
    log_every, batch_size = training.log_every, training.batch_size
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

    def __init__(self, training: Training, source: Any, outer: Any) -> None:
        self.training, self.source, self.outer, self.mesh, self.ended = training, source, outer, None, None

    def advance(self, state: State, step: int, num_rows: int, stop: Callable[[], bool]) -> tuple[State, Metrics]:
        """The state after some rows of steps, and what they measured; fewer if `stop` says so, or the source ends."""
        state = jax.tree.map(jnp.copy, state)  # each step is given its state
        rows, steps, before = [], [], None
        if self.ended:
            raise self.ended
        while len(rows) < num_rows and not (rows and not steps and stop()):
            try:
                batch = self._fetched(step)
            except sources.EndedError as error:
                self.ended = error
                if steps or not rows:
                    raise
                break  # what was reached counts; the next call tells the end: a source that failed may go on as if new
            size = objective.num_examples("fit", "a batch of data", batch)
            _arguments.options("fit", batch_size=size, micro_batches=self.training.micro_batches)
            state, metrics = _given_step(self.training, state, batch, None)
            steps.append(metrics)
            step += 1
            jax.block_until_ready(before)  # the host is one batch ahead, and no more
            before = metrics.loss
            if len(steps) == self.training.log_every:
                rows.append(steps[0] if len(steps) == 1 else _summed_up(steps))
                steps = []
        return state, jax.tree.map(lambda *x: np.stack(x), *jax.device_get(rows))

    def batch(self, state: State, step: int, last_good: Any = None) -> tuple[PyTree, Array | None] | None:
        """The batch of a step: of a function, or of a source that may go back to the last_good, since training ends."""
        if isinstance(self.source, sources.Function):
            return self._fetched(step), None
        if last_good is None or not self.source.has_position:
            return None
        self.seek(last_good.position)
        for number in range(last_good.step, step):
            self._fetched(number)
        return self._fetched(step), None

    def position(self) -> Any:
        """The position in the source of the next batch."""
        with jax.sharding.use_abstract_mesh(self.outer):
            return self.source.position()

    def seek(self, position: Any) -> None:
        """Goes to such a position."""
        with jax.sharding.use_abstract_mesh(self.outer):
            self.source.seek(position)

    def _fetched(self, step):
        with jax.sharding.use_abstract_mesh(self.outer):
            batch = self.source.next(step)
        self.mesh = _placement.explicit_mesh(batch)
        return _placement.to_automatic(sources.on_device(batch), self.mesh)


_given_step = jax.jit(loop.one_step, static_argnums=0, donate_argnums=1)


@jax.jit
def _summed_up(steps):
    return loop.summary(jax.tree.map(lambda *x: jnp.stack(x), *steps))


@partial(jax.jit, static_argnums=0)
def _validated(training, state, held_out):
    state, means = loop.validate(training, state, held_out)
    return state.best, state.validations_since_best, jax.tree.map(jnp.atleast_1d, means)


class _Pace:
    """How long the next chunk is: so many rows that it takes `_SECONDS_OF_A_CHUNK`."""

    def __init__(self) -> None:
        self.seconds_of_a_row = self.rows_per_second = self.since = None
        self.rows, self.seconds = 0, 0.0

    def num_rows(self, room: int) -> int:
        """Rows of the next chunk."""
        wanted = 1 if self.seconds_of_a_row is None else int(_SECONDS_OF_A_CHUNK / self.seconds_of_a_row)
        return max(1, min(wanted, room, _MOST_ROWS))

    def done(self, num_rows: int) -> None:
        """A chunk is done. The time of the first one is not known: it was compiled."""
        now = time.monotonic()
        if self.since is not None:
            seconds = processes.number_of_the_first(max(now - self.since, 1e-6))
            self.seconds_of_a_row = seconds / num_rows
            self.rows, self.seconds = self.rows + num_rows, self.seconds + seconds
            self.rows_per_second = self.rows / self.seconds
        self.since = now

    def paused(self) -> None:
        """Something else takes time: the next chunk is measured from its own start."""
        self.since = self.since and time.monotonic()


def _resumed(plan, feed, store, state):
    saved = checkpoint.latest(store, state)
    if saved is not None:
        if saved.step > plan.num_steps:
            raise ValueError(f"fit: {store.directory} has a checkpoint of step {saved.step}, past {plan.num_steps}")
        ended = _end(plan, saved.step, saved.state)
        words = "ended before, at" if ended else "going on from"
        terminal.tell(f"{words} step {saved.step} of {plan.num_steps}, saved in {store.directory}")
        source = getattr(feed, "source", None)
        known = saved.position is not None and getattr(source, "has_position", False)
        if isinstance(source, sources.Iterated) and not known and not ended:
            which = "goes on from where it is" if source.once else "begins again with its first batch"
            terminal.tell(f"data cannot tell their position: the source {which}")
        feed.seek(saved.position)
    return saved


class _Reached:
    """The result so far: the last state from which training may resume, and the history up to it."""

    def __init__(self, store: checkpoint.Store | None, saved: checkpoint.Saved) -> None:
        self.store, self.saved, self.told = store, saved, ""
        self.pieces = [saved.history]
        self.num_good = 1  # pieces of the history up to that state

    def moves(self, step: int, state: State, position: Any) -> None:
        """Training may be taken up from this state, too."""
        self.saved, self.num_good = checkpoint.Saved(step, state, NO_HISTORY, position), len(self.pieces)

    def save(self) -> str:
        """Saves what is not saved yet; says in words where it is."""
        if self.store is None:
            return "not saved: there is no checkpoint_dir"
        if self.saved.step not in self.store.sound:
            checkpoint.save(self.store, self.saved._replace(history=joined(self.pieces[: self.num_good])))
        return f"saved in {self.store.directory}"

    def result(self, reason: str) -> Result:
        """The `Result` that `fit` returns, or that an error has as its attribute."""
        history, state = jax.tree.map(jnp.asarray, joined(self.pieces[: self.num_good])), self.saved.state
        why = f": {self.told}" if self.told else ""
        skipped = f"{state.skipped} of {self.saved.step} steps skipped{why}" if state.skipped else ""
        return Result(state, history, reason, skipped)

    def error(self, kind: type[BaseException], message: str, reason: str) -> BaseException:
        """An error that says what is saved, with the result as its attribute."""
        error = kind(message + self.save())
        setattr(error, "result", self.result(reason))  # noqa: B010, which no class of Python's has a field for
        return error


def _train(plan, feed, held_out, reached, caught, log, show):
    """Trains from what was reached, of which no more states are kept alive than two."""
    training, num_steps, log_every = plan.training, plan.num_steps, plan.training.log_every
    step, state, pace, failing, saved_at = reached.saved.step, reached.saved.state, _Pace(), 0, time.monotonic()
    interval, like, reason = training.validate_every or num_steps, sharding.layout(state), _end(plan, step, state)
    while not reason:
        num_rows = pace.num_rows(min(interval - step % interval, num_steps - step) // log_every)
        try:
            state, metrics = feed.advance(state, step, num_rows, partial(_stops, caught, time.monotonic()))
        except sources.EndedError as error:
            ended = f"{error}, at step {reached.saved.step} of {num_steps}"
            if error.__cause__ is not None:
                raise reached.error(RuntimeError, f"fit: {ended}; ", "data") from error.__cause__
            terminal.tell(ended)
            reason = "data"
            break
        pace.done(metrics.loss.size)
        first, step, means = step, step + metrics.loss.size * log_every, None
        if held_out and step % interval == 0:
            best, validations_since_best, means = _validated(training, state, held_out)
            state = state._replace(best=best, validations_since_best=validations_since_best)
            _tell_of_scores(training, means, step)
            pace.paused()
        state = sharding.put_back(loop.spread_as(like, state), state)
        piece = jax.device_get(loop.history_of(metrics, means))
        reached.pieces.append(piece)
        if not reached.told and piece.skipped.any():
            reached.told = _first_skipped(training, feed, state, piece, first)
            pace.paused()
        failed, failing = _failing_rows(piece.skipped == log_every, failing, -(-plan.max_skipped // log_every))
        if failed is not None:
            at = first + failed * log_every
            why = _diagnosis(training, feed, state, [at], reached.saved) or "the batches cannot be had again"
            message = f"fit: {plan.max_skipped} steps in a row failed, from step {at} on: {why}"
            message = f"{message}; the state of step {reached.saved.step} is "
            raise reached.error(FloatingPointError, message, "skipped")
        reason = _end(plan, step, state)
        if reason or not failing:
            reached.moves(step, state, feed.position())
        speed = pace.rows_per_second
        show(step, piece.loss[-1], speed and speed * log_every)
        try:
            asked = log is not None and _asked(log, Report(step, piece, state))
        except BaseException:
            reached.save()
            raise
        pace.paused()
        reason = reason or ("log" if asked else "")
        if reason or _signal(caught):
            break
        if processes.number_of_the_first(time.monotonic() - saved_at) >= plan.save_every_seconds:
            reached.save()
            saved_at = time.monotonic()
            pace.paused()
    where, result = reached.save(), reached.result(reason)
    if result.skipped:
        terminal.tell(result.skipped)
    if number := _signal(caught):
        name = signal.Signals(number).name
        stopped = f"stopped by {name} at step {reached.saved.step} of {num_steps}"
        terminal.tell(f"{stopped}; {where}" + ("; the same call goes on from there" if reached.store else ""))
        if number == signal.SIGINT:  # no subclass: Python ends a script with 130 for this class alone
            raise reached.error(KeyboardInterrupt, f"{stopped}; ", name)
        raise SystemExit(128 + number)
    return result


def _stops(caught, began):
    """Whether a chunk ends early: for a signal, or since its source has become slow. Several processes go by count."""
    return jax.process_count() == 1 and (bool(caught) or time.monotonic() - began > 4 * _SECONDS_OF_A_CHUNK)


def _asked(log, report):
    """Whether the log asks for the end, by a bool, on process 0."""
    with processes.together():
        asked = jax.process_index() == 0 and log(report)
    asks = isinstance(asked, bool) or getattr(asked, "dtype", None) == np.bool_
    return bool(processes.number_of_the_first(float(asks and bool(asked))))


def _signal(caught):
    """The number of a signal that any process caught, or 0: one that ended alone would leave the others waiting."""
    return processes.largest(caught[0] if caught else 0)


def _end(plan, step, state):
    patience = plan.training.patience
    if patience is not None and state.validations_since_best >= patience:
        return "patience"
    return "num_steps" if step == plan.num_steps else ""


def _tell_of_scores(training, means, step):
    for name, value in ({"loss": means.loss} | means.metrics).items():
        if name in ("loss", training.monitor) and not np.isfinite(value[0]):
            terminal.tell(f"the validation {name} is {value[0]} at step {step}")


def _failing_rows(fails, before, too_many):
    """The first row of the first series of so many failing ones, or None; and how many fail at the end.

    The last `before` rows before these failed too, so that a series may begin at a negative number.
    """
    sound = np.concatenate([[-1 - before], np.flatnonzero(~fails), [fails.size]])
    lengths = np.diff(sound) - 1
    too_long = np.flatnonzero(lengths >= too_many)
    return (int(sound[too_long[0]]) + 1 if too_long.size else None), int(lengths[-1])


def _first_skipped(training, feed, state, piece, first):
    """Why the first skipped step of these rows was skipped, which is told."""
    row = int(np.argmax(piece.skipped > 0))
    at = first + row * training.log_every
    plain = f"loss {piece.loss[row]}, gradient norm {piece.gradient_norm[row]}"
    why = _diagnosis(training, feed, state, range(at, at + training.log_every)) or plain
    which = f"step {at}" if training.log_every == 1 else f"a step in the row from {at} on"
    terminal.tell(f"{which} is skipped: {why}")
    return why


def _diagnosis(training, feed, state, steps, last_good=None):
    """The names of what is not finite, in the first of these steps that has any; empty if none has.

    The params are those of the state. A step that is skipped changes none, so these are those of the step. Its batch is
    asked for again.
    """
    with contextlib.suppress(Exception):  # of any class: a fault of the caller's source must end nothing here
        for step in steps:
            batch = feed.batch(state, step, last_good)
            if batch and (found := _not_finite(training, state._replace(step=jnp.int32(step)), *batch)):
                return found
    return ""


def _not_finite(training, state, batch, weights):
    """The names of what is not finite in a step, and the faults that jprob's checks find; else nothing."""
    _, metrics = _given_step(training, jax.tree.map(jnp.copy, state), batch, weights)
    given = fast(state.params), state.model_state, batch, key_for_nll(state.key, state.step), weights
    gradient_of = jax.jit(objective.loss_and_gradient, static_argnums=(0, 2))
    gradient = gradient_of(training.objective, given, training.micro_batches)[1]
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    names = [jax.tree_util.keystr(path) for path, leaf in leaves if not jnp.all(jnp.isfinite(leaf))]
    what = f"loss {metrics.loss}, the gradient is"
    if names:  # labels and scales out of range leave it finite
        return f"{what} not finite in params{names[0]}"
    if jnp.isfinite(metrics.loss):
        return "" if jnp.isfinite(metrics.update_norm) else f"{what} finite, but not the update"
    error, _ = _checks.checkify(training.objective.mean)(*given)
    message = (error.get() or "").split(" (`check` failed)")[0]
    return f"{what} finite" + (f": {message}" if message else "")


def _description(training, state, arrays, held_out, config):
    """The properties that a checkpoint must have in common with the run that resumes from it."""
    marked = partial(checkpoint.describe, fingerprint=True)
    names = ("batch_size", "log_every", "validate_every", "micro_batches", "ema_decay")
    parts = jax.tree_util.tree_leaves_with_path(config, is_leaf=lambda x: not isinstance(x, dict))
    return {
        **{f"config.{jax.tree_util.keystr(path, simple=True, separator='.')}": value for path, value in parts},
        **{name: getattr(training, name) for name in names},
        **({"monitor": training.monitor, "monitor_mode": training.monitor_mode or "min"} if held_out else {}),
        **({"data": "batches"} if arrays[0] is None else marked("data", arrays[0]) | marked("weights", arrays[1])),
        **(marked("validation", held_out[0]) | marked("validation_weights", held_out[1]) if held_out else {}),
        **checkpoint.describe("", state),
        "key": f"{jax.random.key_impl(state.key)} {jax.random.key_data(state.key).tolist()}",  # its value, too
    }


def _versions(optimizer, state):
    """Differences that are allowed but told: the packages, and the program of the optimizer's update."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.optimizer_state, state.params))

    def update(optimizer_state, params):
        gradient = fast(params)
        extra = dict.fromkeys(("value_fn", "obj_fn"), lambda tree, grad_fn=None, obj_fn=None: optax.tree.sum(tree))
        extra |= {"value": optax.tree.sum(gradient), "grad": gradient, "grad_fn": lambda params, *_: params}
        return loop.update_of(optimizer)(gradient, optimizer_state, params, **extra)

    program = jax.make_jaxpr(update)(*shapes)
    text = re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr)) + "".join(str(np.asarray(x)) for x in program.consts)
    packages = {name: importlib.metadata.version(name) for name in ("jprob", "jax", "jaxlib", "optax", "numpy")}
    return packages | {"update of the optimizer": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _tell_of_the_others(error, store):
    """Tells about the other processes, before jax ends those that are left once one has gone."""
    saved = "nothing is saved"
    if store and store.sound:
        saved = f"they go on from step {max(store.sound)}, saved in {store.directory}"
    reason = str(error).splitlines()[0]
    terminal.tell(f"{reason}; if another process has gone, start all again: {saved}", everywhere=True)

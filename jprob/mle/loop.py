"""The training loop as pure functions: no input or output, no callbacks, nothing but arrays in and arrays out.

`step` takes one step and `run` takes many; all that they carry is a `State`. A step is skipped if its loss, gradient or
update is not finite. A skipped step is counted, and changes no number of the params, the model state, the optimizer or
the average. The program holds only what is asked for: validation, averaging, micro-batches, weights, a short last
batch.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.core import subjaxprs
from jaxtyping import Bool, Int, PyTree, Real

from .. import _checks, _placement
from . import _arguments, _order, objective, sharding
from .objective import Nll, Objective
from .state import Best, History, Metrics, State, averaged_params, fast, key_for_nll, slow, wide, with_average

_SMALL = 2**14  # numbers of a leaf


class Training(NamedTuple):
    """The arguments of `step`, `run` and `fit` besides their arrays; static, a part of the key of their programs.

    Attributes:
      function: which of them it is, for messages.
      nll: the function of the caller.
      optimizer: an optax gradient transformation.
      batch_size: examples per step.
      micro_batches: parts of a batch.
      ema_decay: decay of the average of the params, or None.
      log_every: steps that make a row of history.
      validate_every: steps from one validation to the next; None without validation.
      patience: validations in a row that may be no better than the best, or None.
      validation_nll: function that is validated; None for `nll`.
      evaluation_params: from a state to the params that are scored.
      monitor: "loss" or the name of a metric, which the best params and patience follow.
      monitor_mode: "min" if lower is better, "max" if higher is.
      places: how the data lie, as `sharding.places` has it.
      validation_places: how the validation data lie.
    """

    function: str
    nll: Nll
    optimizer: optax.GradientTransformation
    batch_size: int
    micro_batches: int = 1
    ema_decay: float | None = None
    log_every: int = 1
    validate_every: int | None = None
    patience: int | None = None
    validation_nll: Nll | None = None
    evaluation_params: Callable[[State], PyTree] = averaged_params
    monitor: str = "loss"
    monitor_mode: str | None = None
    places: tuple[Any, ...] = ()
    validation_places: tuple[Any, ...] = ()

    @property
    def objective(self) -> Objective:
        """`nll`, whose results are checked."""
        return Objective(self.function, self.nll)


def step(
    nll: Nll,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: PyTree,
    *,
    weights: Real[Array, " batch"] | Bool[Array, " batch"] | None = None,
    micro_batches: int = 1,
    ema_decay: float | None = None,
) -> tuple[State, Metrics]:
    """One step of the optimizer down the mean negative log-likelihood of a batch.

    Compiled once for each `nll`, `optimizer` and shape: define both once, outside of any loop.

    Args:
      nll: `nll(params, batch, key) -> losses`, the negative log-likelihood of each example, in nats, or an `Output`.
        `key` is a fresh one for each step, for dropout and the like. If the state has a model state, `nll` receives it
        as a fourth argument.
      optimizer: an optax gradient transformation, the one that `init` was given. One that asks for `value`, `grad` or
        `value_fn` gets them.
      state: where training stands.
      batch: the examples, a pytree of arrays with the batch as leading axis.
      weights: how much each example counts, not negative; a mask is one. Examples of weight 0 are ignored. They are
        replaced before `nll` runs, so NaN padding is safe. If all are 0, loss and gradient are 0. A negative weight
        makes the loss NaN.
      micro_batches: number of equal parts of the batch, which run one after the other to save memory. Loss, metrics
        and gradient stay those of the whole batch, to rounding. Each part has another key.
      ema_decay: decay d of the exponential average of the params, 0 < d < 1; it reaches back 1 / (1 - d) steps.
        None keeps none.

    Returns:
      The state after the step, and the `Metrics` that led to it. If loss, gradient norm or update norm is not finite,
      the step counts as taken and as skipped; params, model state, optimizer state and average keep their bits.

    Raises:
      ValueError: the arrays of `batch` differ in their leading axis or hold no example; `weights` is not one number per
        example; `nll` or `optimizer` is not hashable; `nll` does not return losses or an `Output`; `micro_batches` does
        not divide the batch; `ema_decay` is out of range, or missing though the state has an average; the state is not
        one of this optimizer, or the optimizer changes the types of it.

    >>> from jprob.mle import init
    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> optimizer = optax.sgd(0.5)
    >>> state, metrics = step(nll, optimizer, init(jnp.array(0.0), optimizer, jax.random.key(0)), jnp.array([1.0, 3.0]))
    >>> print(state.params, metrics.loss)
    1.0 2.5
    """
    size = objective.num_examples("step", "batch", batch)
    training = Training("step", nll, optimizer, size, micro_batches, ema_decay)
    _arguments.training(training)
    _arguments.state("step", state)
    if weights is not None:
        weights = _checks.weights("step", "the examples", (size,), jnp.asarray(weights))
    state = begin(training, state)
    mesh = _placement.explicit_mesh((state, batch, weights))
    with _placement.automatic_axes(mesh):
        after, metrics = _step(training, *_placement.to_automatic((state, batch, weights), mesh))
    return sharding.put_back(state, after, mesh), _placement.to_explicit(metrics, mesh)


def one_step(training: Training, state: State, batch: PyTree, weights: Array | None) -> tuple[State, Metrics]:
    """A step, counted."""
    _arguments.optimizer_state(training, state)
    if weights is not None:
        batch = objective.without_weightless(batch, weights)
    return _count(*_update(training, state, batch, weights))


_step = jax.jit(one_step, static_argnums=0)


def run(
    nll: Nll,
    optimizer: optax.GradientTransformation,
    state: State,
    data: PyTree,
    *,
    num_steps: int,
    batch_size: int,
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
) -> tuple[State, History]:
    """Takes `num_steps` steps over minibatches of `data`, as a `lax.scan` on the device.

    Every example comes once an epoch, in an order that follows from the key and the number of the epoch. An epoch ends
    with a short batch if `batch_size` does not divide the data; that batch counts its own examples alone. The position
    in the epoch follows from `state.step`. So a run of a steps and then of b steps is that of a + b, bit for bit.
    `jax.vmap` trains many members at once, over keys, params, injected hyperparameters or data; each has its own order
    and its own early stop.

    A run is one program, which runs where its arguments lie. Data may be spread over a mesh by their leading axis.
    Batches are then spread alike, if `batch_size` is a multiple of the devices there. Params may be spread, too, and
    keys under `vmap`. Nothing else changes but roundings. If the axes of the mesh are explicit, `nll` sees them as
    automatic, as in `step`. Use `jax.sharding.explicit_axes` to let it see them as they are. Results have them
    explicit. An array that `nll` closes over must not lie on explicit axes: leave it unplaced, place it on automatic
    ones, or make it a part of the params or the data.

    Args:
      nll: `nll(params, batch, key) -> losses`, as for `step`. It is static like the optimizer: the same function again
        is no new compilation, a new lambda is one.
      optimizer: an optax gradient transformation, the one that `init` was given. To vary its hyperparameters under
        `vmap`, use `optax.inject_hyperparams` and set them in the state: `optax.tree.set(state, learning_rate=rate)`.
      state: where training stands: from `init`, or from an earlier `run` with the same data and batch size. The first
        run with validation adds `State.best` to it, the first with an average `State.average`.
      data: all examples, a pytree of arrays with the same leading axis. They stay on their device.
      num_steps: how many steps to take, static; a multiple of `log_every` and `validate_every`. The numbers of their
        examples take 4 bytes each; to save that memory, run in pieces, which costs no more.
      batch_size: examples per step, static.
      weights: how much each example counts, as for `step`. A model that mixes examples, as batch norm does, sees those
        that replace the ones of weight 0; a short batch it sees as it is.
      log_every: steps that make a row of the history, static.
      validation: examples to validate with, a pytree like `data`. They are scored in batches of
        `batch_size / micro_batches`, with the same key each time.
      validation_weights: how much each of them counts.
      validation_nll: function to validate, static: one like `nll`, with dropout off and running statistics in use.
        Its new model state is dropped. None validates `nll` itself.
      validate_every: steps from one validation to the next, counted from the start of this run, static; a multiple of
        `log_every`.
      evaluation_params: from a state to the params to score, static. By default the average if one is kept, else the
        params (of a lookahead, the slow ones). Use it for optimizers that evaluate elsewhere, such as schedule-free.
      monitor: value that the best params and `patience` follow, static: "loss", or the name of a metric.
      monitor_mode: "min" if lower is better, as it is by default for the loss, "max" if higher is, static. A metric
        needs it.
      patience: stop after so many validations in a row that were not better than the best, static. Nothing of the state
        changes any more then, nor does it in later runs with this patience. A NaN is never better.
      micro_batches: parts to cut each batch into, as for `step`, static; a divisor of `batch_size`.
      ema_decay: decay of the average of the params, as for `step`, static.

    Returns:
      The state after the last step, and the `History`: [num_steps / log_every] rows, [num_steps / validate_every]
      scores. A step whose loss, gradient or update is not finite is skipped, as by `step`. Params and the state of the
      optimizer lie where they lay, spread as they were; the average and the best of the params, as these.

    Raises:
      ValueError: the arrays of `data` or of `validation` differ in their leading axis or hold no example; a number is
        not positive or not a multiple as said above; `validation` and `validate_every` do not come together, or
        `patience` without them; no metric is called `monitor`; or as for `step`.

    >>> from jprob.mle import init
    >>> x = jnp.array([1.0, 2.0, 6.0])
    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> optimizer = optax.sgd(0.5)
    >>> state = init(jnp.array(0.0), optimizer, jax.random.key(0))
    >>> state, history = run(nll, optimizer, state, x, num_steps=20, batch_size=3)
    >>> print(f"{state.params:.3f}", history.loss.shape)
    3.000 (20,)
    >>> more = {"validation": x + 1, "validate_every": 5, "patience": 1}
    >>> state, history = run(nll, optimizer, state, x, num_steps=20, batch_size=3, **more)
    >>> print(state.step, state.best.step, history.validation)
    30 25 [2.833... 2.833... inf inf]
    """
    numbers = batch_size, micro_batches, ema_decay, log_every, validate_every, patience
    training = Training("run", nll, optimizer, *numbers, validation_nll, evaluation_params, monitor, monitor_mode)
    _arguments.state("run", state)
    _arguments.training(training, validation, validation_weights, num_steps=num_steps)
    arguments = state, examples("run", "data", data, weights), held_out(training, validation, validation_weights)
    training = training._replace(places=sharding.places(data), validation_places=sharding.places(validation))
    mesh = _placement.explicit_mesh(arguments)
    with _placement.automatic_axes(mesh):
        after, history = _run(training, num_steps, *_placement.to_automatic(arguments, mesh))
    return sharding.put_back(spread_as(state, after), after, mesh), _placement.to_explicit(history, mesh)


@partial(jax.jit, static_argnums=(0, 1))
def _run(training: Training, num_steps: int, state: State, data: Any, validation: Any) -> tuple[State, History]:
    _arguments.optimizer_state(training, state)
    state = begin(training, state)
    size = objective.num_examples("run", "data", data)
    numbers = _order.batches(state.key, state.step, size, num_steps, training.batch_size)

    def train(state, numbers):
        if training.log_every == 1:
            return _steps(training, data, state, numbers)
        rows = numbers.reshape(-1, training.log_every, training.batch_size)
        return jax.lax.scan(partial(row, training, data), state, rows)

    def validated(state, numbers):
        state, metrics = train(state, numbers)
        state, means = validate(training, state, validation)
        return state, (metrics, means)

    if training.validate_every is None:
        state, metrics = train(state, numbers)
        return state, history_of(metrics)
    block = validated if training.patience is None else partial(_unless_stale, validated, training.patience)
    blocks = numbers.reshape(-1, training.validate_every, training.batch_size)
    state, (metrics, means) = jax.lax.scan(block, state, blocks)
    return state, history_of(jax.tree.map(jnp.ravel, metrics), means)


def _steps(training: Training, data: Any, state: State, numbers: Array) -> tuple[State, Metrics]:
    """A step for each row of numbers of examples."""
    size = objective.num_examples("run", "data", data)

    def taken(row, state, whole=False):
        batch, weights = take(data, row, size, not whole)
        return _update(training, state, sharding.spread(batch, training.places), weights)

    def one(state, row):
        short = size % row.size
        if state.model_state is None or not short:
            return taken(row, state)
        if short % training.micro_batches:
            fault = f"micro_batches must divide each batch of a model with a state, got {training.micro_batches}"
            raise ValueError(f"{training.function}: {fault} for the {short} examples of the last")
        # A model with a state, such as batch norm, must not see what fills up a short batch.
        return jax.lax.cond(row[-1] < size, *(partial(taken, part, whole=True) for part in (row, row[:short])), state)

    return _count(*jax.lax.scan(one, state, numbers))


def row(training: Training, data: Any, state: State, numbers: Array) -> tuple[State, Metrics]:
    """The state and the metrics after a row of steps, by the numbers of their examples, [log_every, batch_size]."""
    state, metrics = _steps(training, data, state, numbers)
    return state, summary(metrics) if training.log_every > 1 else jax.tree.map(lambda x: x[0], metrics)


def take(
    data: tuple[PyTree, Array | None], row: Int[Array, " batch"], size: int, may_be_short: bool = True
) -> tuple[PyTree, Array | None]:
    """The examples of these numbers, and their weights. The number `size`, which no example has, has weight 0."""
    data, of_all = data
    weights = None if of_all is None else of_all[jnp.minimum(row, size - 1)]
    if size % row.size and may_be_short:
        counted = row < size
        # A batch is filled up with its own first example: of a kind that `nll` can bear.
        row = jnp.where(counted, row, row[0])
        weights = counted.astype(jnp.float32) if weights is None else jnp.where(counted, weights, 0)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[row], data)
    return batch if of_all is None else objective.without_weightless(batch, weights), weights


def begin(training: Training, state: State) -> State:
    """The state with an average and a best, if they are asked for and not there yet."""
    if training.ema_decay is not None and state.average is None:
        state = with_average(state)
    if training.validate_every is None or state.best is not None:
        return state
    worst = jnp.array(-math.inf if training.monitor_mode == "max" else math.inf, jnp.float32)
    best = Best(training.evaluation_params(state), state.model_state, worst, state.step)
    return state._replace(best=jax.tree.map(jnp.copy, best))


def spread_as(before: State, after: State) -> State:
    """The arrays before, in the structure after: an average and a best of the params are to lie as these."""
    best, like = after.best, slow(before.params)
    if best is not None and jax.tree.structure(best.params) == jax.tree.structure(like):
        best = Best(like, before.model_state, before.step, before.step)
    return before._replace(average=after.average and optax.EmaState(before.step, before.params), best=best)


def validate(training: Training, state: Any, validation: Any) -> tuple[State, objective.Sums]:
    """The state with its best after one more validation, and the means over all validation data."""
    nll = Objective(training.function, training.validation_nll or training.nll)
    scored = training.evaluation_params(state)
    size = objective.num_examples("run", "validation", validation)
    length = min(size, training.batch_size // training.micro_batches)
    key = key_for_nll(state.key, 2**32 - 1)  # a number that no step has

    def one(total, number):
        start = jnp.minimum(number * length, size - length)
        batch, weights = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), validation)
        # The last batch begins early enough to be full, with examples that have counted already.
        counted = start + jnp.arange(length) >= number * length
        if weights is not None:
            weights = jnp.where(counted, weights, 0)
            batch = objective.without_weightless(batch, weights)
        batch, weights = sharding.spread(batch, training.validation_places), counted if weights is None else weights
        sums, _ = nll.sums(scored, state.model_state, batch, jax.random.fold_in(key, number), weights)
        return None, sums

    sums = jax.lax.scan(one, None, jnp.arange(-(-size // length)))[1]
    means = objective.means(jax.tree.map(partial(jnp.sum, axis=0), sums))
    means = means._replace(loss=jnp.where(means.weight == 0, jnp.nan, means.loss))  # no score, and not the best one
    named = {"loss": means.loss} | means.metrics
    if training.monitor not in named:
        raise ValueError(f"{training.function}: monitor must be one of {', '.join(named)}, got {training.monitor!r}")
    score = named[training.monitor].astype(state.best.score.dtype)
    better = score > state.best.score if training.monitor_mode == "max" else score < state.best.score
    new = Best(scored, state.model_state, score, state.step)
    best = jax.tree.map(partial(jnp.where, better), new, state.best)
    validations_since_best = jnp.where(better, 0, state.validations_since_best + 1)
    return state._replace(best=best, validations_since_best=validations_since_best), means


def _unless_stale(block, patience, state, rows):
    """The block, or nothing: for one member it is not computed then, under `vmap` it is selected away."""
    measured = jax.eval_shape(block, state, rows)[1]
    nothing = jax.tree.map(lambda x: jnp.full(x.shape, 0 if x.dtype == jnp.int32 else jnp.inf, x.dtype), measured)
    goes_on = state.validations_since_best < patience
    return jax.lax.cond(goes_on, block, lambda state, rows: (state, nothing), state, rows)


def _update(training: Training, state: State, batch: PyTree, weights: Array | None) -> tuple[State, Metrics]:
    """A step, but for counting it if it is skipped: `_count` does, for all steps at once and outside of the loop."""
    key = key_for_nll(state.key, state.step)

    def at(params):
        given = params, state.model_state, batch, key, weights
        return objective.loss_and_gradient(training.objective, given, training.micro_batches)

    means, gradient, model_state = at(fast(state.params))
    old = state.params, state.model_state, state.optimizer_state, state.average

    def loss_at(params, grad_fn=None, obj_fn=None):  # a line search of optax refuses what its function does not take
        return at(params)[0].loss

    def updated(gradient):
        extra = {"value": means.loss, "grad": gradient, "value_fn": loss_at, "obj_fn": loss_at}
        extra |= {"grad_fn": lambda params, *_: at(params)[1]}
        try:
            updates, optimizer_state = update_of(training.optimizer)(
                gradient, state.optimizer_state, state.params, **extra
            )
        except TypeError as error:
            if "keyword" not in str(error):
                raise
            fault = f"optimizer asks for what a step does not have: {error}".splitlines()[0]
            raise ValueError(f"{training.function}: {fault}") from None
        # All in one dtype, since strict promotion refuses the sum of two.
        sums = optax.apply_updates(*jax.tree.map(wide, (state.params, updates)))
        params = jax.tree.map(lambda p, new: new.astype(p.dtype), state.params, sums)
        average = state.average if training.ema_decay is None else _averaged(state.average, params, training.ema_decay)
        return (params, model_state, optimizer_state, average), updates

    new, updates = updated(gradient)
    objective.same_types(training.function, "an optimizer state", "the optimizer", old, new)
    measured = Metrics(means.loss, _norm(gradient), _norm(updates), state.skipped, means.weight, means.metrics)
    # A branch that computes the new state writes it over the old one. A finished state next to the old one would take
    # the memory of both. On a CPU it takes half as long again for a small model.
    again = _is_cheap(jax.make_jaxpr(updated)(gradient).jaxpr)
    new = jax.lax.cond(_finite(measured), lambda: updated(gradient)[0] if again else new, lambda: old)
    params, model_state, optimizer_state, average = new
    after = state._replace(params=params, model_state=model_state, optimizer_state=optimizer_state, average=average)
    return after._replace(step=state.step + 1), measured


def update_of(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The update of an optimizer, which leaves out the extra arguments that the optimizer does not take."""
    update = optax.with_extra_args_support(optimizer).update
    parameters = inspect.signature(update).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return update
    return lambda *args, **extra: update(*args, **{name: x for name, x in extra.items() if name in parameters})


def _is_cheap(jaxpr):
    """Whether a program has neither a loop nor a product of matrices, so that it may run twice."""
    costly = any(equation.primitive.name in ("while", "scan", "dot_general") for equation in jaxpr.eqns)
    return not costly and all(map(_is_cheap, subjaxprs(jaxpr)))


def _finite(measured):
    return jnp.isfinite(measured.loss) & jnp.isfinite(measured.gradient_norm) & jnp.isfinite(measured.update_norm)


def _count(state, measured):
    """The metrics of one step or many, and the state with the skipped ones counted."""
    skipped = 1 - _finite(measured).astype(jnp.int32)
    total = state.skipped + jnp.sum(skipped, dtype=jnp.int32)
    return state._replace(skipped=total), measured._replace(skipped=skipped)


def _norm(tree):
    """A product with itself is the cheapest sum of squares, all the more under `vmap`."""
    leaves = [wide(x) for x in jax.tree.leaves(tree)]
    # Joined, since a kernel for each takes longer than the sum of a small leaf.
    small = [x.ravel() for x in leaves if x.size <= _SMALL]
    leaves = [x for x in leaves if x.size > _SMALL] + ([jnp.concatenate(small)] if small else [])
    square = sum(jnp.tensordot(x, x, x.ndim, precision="highest") for x in leaves)
    # XLA makes |x| of the root of one square: finite although the square, as in Adam's state, is not.
    return jnp.where(jnp.isfinite(square), jnp.sqrt(square), square)


def _averaged(average, params, decay):
    count = average.count + 1
    # (1 - d) / (1 - d^n). As a pull towards the params it rounds to no bias; d a + (1 - d) p would, by u / (1 - d).
    share = (1 - decay) / -jnp.expm1(count.astype(float) * math.log(decay))
    ema = jax.tree.map(lambda a, p: a + share.astype(a.dtype) * (wide(p) - a), average.ema, params)
    return optax.EmaState(count, ema)


def summary(metrics: Metrics) -> Metrics:
    """A row of the history from its steps."""
    taken = metrics.skipped == 0

    def mean(weights, values):
        weights = jnp.where(taken, weights, 0).astype(values.dtype)
        total = jnp.sum(jnp.where(taken, weights * values, 0)) / objective.or_one(jnp.sum(weights))
        return jnp.where(jnp.any(taken), total, values[-1])

    by_weight = partial(mean, metrics.weight)
    norms = mean(1, metrics.gradient_norm), mean(1, metrics.update_norm)
    skipped, weight = jnp.sum(metrics.skipped, dtype=jnp.int32), jnp.sum(jnp.where(taken, metrics.weight, 0))
    return Metrics(by_weight(metrics.loss), *norms, skipped, weight, jax.tree.map(by_weight, metrics.metrics))


def history_of(metrics: Metrics, means: objective.Sums | None = None) -> History:
    """The history of these rows, and of the scores of these validations."""
    rows = metrics.loss, metrics.gradient_norm, metrics.update_norm, metrics.skipped, metrics.metrics
    return History(*rows, jnp.zeros(0), {}) if means is None else History(*rows, means.loss, means.metrics)


def examples(function: str, name: str, data: PyTree, weights: Any) -> tuple[PyTree, Array | None]:
    """Data and the weights of their examples, checked."""
    size = objective.num_examples(function, name, data)
    if weights is not None:
        weights = _checks.weights(function, f"the examples of {name}", (size,), jnp.asarray(weights))
    return data, weights


def held_out(training: Training, validation: Any, weights: Any) -> tuple[PyTree, Array | None] | None:
    """The validation data with their weights, if there are any."""
    return None if validation is None else examples(training.function, "validation", validation, weights)

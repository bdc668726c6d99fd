"""The training loop as pure functions: no input or output, no callbacks, nothing but arrays in and arrays out.

`step` takes one step and `run` takes many; all that they remember is a `State`. A step whose loss, gradient or update
is not finite changes no number of the params, the optimizer or the average, and is counted. What a program is not asked
for (validation, averaging, micro-batches, a short last batch) is not in it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float, Int, Key, PyTree, Real

from .. import _checks
from . import _arguments, _order, sharding

Nll = Callable[[PyTree, PyTree, Array], Array]


class Best(NamedTuple):
    """The params with the lowest validation score so far.

    Attributes:
      params: the params that were scored: the average where one is kept. Before any score, the params of the start.
      score: their mean negative log-likelihood on the validation data, in nats; inf before any score.
      step: `State.step` when they were scored.
    """

    params: PyTree
    score: Float[Array, "*members"]
    step: Int[Array, "*members"]


class State(NamedTuple):
    """All that training carries from step to step: one pytree, to be vmapped, sharded or saved as it is.

    Attributes:
      params: the parameters being fitted.
      optimizer_state: what the optimizer remembers of earlier steps.
      step: batches consumed so far, skipped ones included, int32, so at most 2^31 - 1. It says where in its epoch the
        run is, and which random numbers come next.
      key: the run's random key. It never changes: what is drawn depends on it and on the step alone.
      skipped: how many of the steps were skipped because something was not finite, int32.
      average: None until `average_decay` is first given. Then `average.ema` is the exponential average of the params
        over the `average.count` steps since that were not skipped, in float32 at least. It is free of the bias of its
        start: sum d^(n - i) p_i / sum d^(n - i), with decay d, over the params p_1 ... p_n after these steps.
      best: None until validation data are first given; then the best params since.
      stale: validations since the best one, int32. With `patience`, training ends when it gets there.
    """

    params: PyTree
    optimizer_state: PyTree
    step: Int[Array, "*members"]
    key: Key[Array, "*members"]
    skipped: Int[Array, "*members"]
    average: optax.EmaState | None
    best: Best | None
    stale: Int[Array, "*members"]


class Metrics(NamedTuple):
    """What a step measured.

    Attributes:
      loss: mean negative log-likelihood per example of its batch, before the update, in nats; in float32 at least.
      gradient_norm: Euclidean norm of the loss's gradient over all params, in float32 at least. It overflows above
        1e19 in float32, and then counts as not finite.
      update_norm: Euclidean norm, likewise, of the update that the optimizer made of it.
      skipped: 1 if one of the three is not finite, so that nothing was updated; else 0.
    """

    loss: Float[Array, "*steps"]
    gradient_norm: Float[Array, "*steps"]
    update_norm: Float[Array, "*steps"]
    skipped: Int[Array, "*steps"]


class History(NamedTuple):
    """What a run measured: a row for every `record_every` steps, a score for every `validate_every`.

    A row sums up those of its steps that were not skipped; if all were, it is the last one as it was, so that a NaN
    stays visible. Rows and scores after an early stop are NaN, with none skipped.

    Attributes:
      loss: mean negative log-likelihood per example, in nats. A short batch counts by its examples: the row of an epoch
        is the mean over all data.
      gradient_norm: mean norm of the gradient.
      update_norm: mean norm of the update.
      skipped: how many steps of the row were skipped, int32.
      validation: mean negative log-likelihood per example of all validation data; empty without validation.
    """

    loss: Float[Array, "*rows"]
    gradient_norm: Float[Array, "*rows"]
    update_norm: Float[Array, "*rows"]
    skipped: Int[Array, "*rows"]
    validation: Float[Array, "*scores"]


def init(params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> State:
    """State before the first step.

    Args:
      params: initial parameters, any pytree of floating-point arrays.
      optimizer: an optax gradient transformation.
      key: random key of the run: it orders the data and seeds whatever `nll` draws.

    Returns:
      A `State` with the params as given, step 0, and neither an average nor a best.

    Raises:
      ValueError: a leaf of `params` is not floating-point.

    >>> init(jnp.zeros(2), optax.sgd(0.1), jax.random.key(0)).step
    Array(0, dtype=int32)
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _checks.floating("init", **{f"params{jax.tree_util.keystr(path)}": jnp.asarray(leaf)})
    # Without weak types, which the first step would turn into others.
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
    return State(params, optimizer.init(params), _zero(), key, _zero(), None, None, _zero())


def step(
    nll: Nll,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: PyTree,
    *,
    weights: Real[Array, " batch"] | Bool[Array, " batch"] | None = None,
    micro_batches: int = 1,
    average_decay: float | None = None,
) -> tuple[State, Metrics]:
    """One step of the optimizer down the mean negative log-likelihood of a batch.

    Args:
      nll: `nll(params, batch, key) -> Array[batch]`, the negative log-likelihood of each example, in nats. `key` is a
        fresh one for each step, for dropout and the like.
      optimizer: an optax gradient transformation, the one that `init` was given.
      state: where training stands.
      batch: the examples, a pytree of arrays with the batch as leading axis.
      weights: how much each example counts, not negative; a mask is one. An example of weight 0 is as if it were not
        there: another takes its place before `nll` sees it, so that not even a NaN gets through. If all are 0, so are
        loss and gradient.
      micro_batches: take the batch in so many equal parts, one after the other, to save memory. Loss and gradient stay
        those of the whole batch, to rounding: sums over the parts are in float32 at least. For each part `nll` gets a
        key of its own.
      average_decay: decay d of the exponential average of the params, 0 < d < 1; it reaches back 1 / (1 - d) steps.
        None keeps none.

    Returns:
      The state after the step, and the loss, gradient norm and update norm that led to it. If one of these is not
      finite, the step counts as taken and as skipped, and params, optimizer state and average keep their bits.

    Raises:
      ValueError: the arrays of `batch` differ in their leading axis or hold no example, `weights` is not one number per
        example, `nll` does not return one floating-point number per example, `micro_batches` does not divide the batch,
        `average_decay` is out of range or not given though the state has an average, or the state is not one of this
        optimizer, or the optimizer changes the types of it.

    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> optimizer = optax.sgd(0.5)
    >>> state, metrics = step(nll, optimizer, init(jnp.array(0.0), optimizer, jax.random.key(0)), jnp.array([1.0, 3.0]))
    >>> print(state.params, metrics.loss)
    1.0 2.5
    """
    size = _num_examples("step", "batch", batch)
    _arguments.options("step", batch_size=size, micro_batches=micro_batches, average_decay=average_decay)
    _arguments.state("step", state, optimizer, average_decay)
    state = _begin(state, average_decay, validates=False)
    if weights is not None:
        weights = _checks.weights("step", "the examples", (size,), jnp.asarray(weights))
    losses, mesh = Losses("step", nll), sharding.explicit_mesh((state, batch, weights))
    with sharding.automatic_axes(mesh):
        began, batch, weights = sharding.automatic((state, batch, weights), mesh)
        if weights is not None:
            batch = _without_weightless(batch, weights)
        after, metrics = _count(*_update(losses, optimizer, micro_batches, average_decay, began, batch, weights))
    return sharding.put_back(state, after, mesh), sharding.explicit(metrics, mesh)


def run(
    nll: Nll,
    optimizer: optax.GradientTransformation,
    state: State,
    data: PyTree,
    *,
    num_steps: int,
    batch_size: int,
    record_every: int = 1,
    validation: PyTree | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    micro_batches: int = 1,
    average_decay: float | None = None,
) -> tuple[State, History]:
    """Takes `num_steps` steps over minibatches of `data`, as a `lax.scan` on the device.

    Every example comes once an epoch, in an order that follows from the key and the number of the epoch. An epoch ends
    with a short batch where `batch_size` does not divide the data; it counts its own examples alone. The position in
    the epoch follows from `state.step`, so that runs of a and of b steps one after the other are the run of a + b
    steps, bit for bit. `jax.vmap` trains many members at once, over keys, params, learning rates or data; each has its
    own order, and stops by itself.

    It is one program, which runs where its arguments lie. Data spread over a mesh by their leading axis give batches
    spread alike, if `batch_size` is a multiple of the devices there; params may be spread, too, and keys under `vmap`.
    Nothing else changes but roundings. Where the axes of the mesh are explicit, `nll` sees them as automatic, as it
    does in `step`: `jax.sharding.explicit_axes` lets it see them as they are. What comes out has them explicit. An
    array that `nll` closes over must not lie on explicit axes: leave it unplaced, place it on automatic ones, or make
    it a part of the params or the data.

    Args:
      nll: `nll(params, batch, key) -> Array[batch]`, the negative log-likelihood of each example, in nats. It is static
        like the optimizer: the same function again is no new compilation, a new lambda is one.
      optimizer: an optax gradient transformation, the one that `init` was given. Its hyperparameters may be traced:
        build it inside the function that is vmapped.
      state: where training stands: from `init`, or from an earlier `run` with the same data and batch size. The first
        run with validation adds `State.best` to it, the first with an average `State.average`.
      data: all examples, a pytree of arrays with the same leading axis. They stay on their device.
      num_steps: how many steps to take, static; a multiple of `record_every` and `validate_every`. The numbers of their
        examples take 4 bytes each; where that is too much, run in pieces, which costs no more.
      batch_size: examples per step, static.
      record_every: steps that make a row of the history, static.
      validation: examples to validate with, a pytree like `data`. They are scored with the average of the params where
        one is kept, else with the params, in batches of `batch_size / micro_batches` and with the same key each time.
      validate_every: steps from one validation to the next, counted from the start of this run, static; a multiple of
        `record_every`.
      patience: stop after so many validations in a row that were not better than the best, static. Nothing of the state
        changes any more then, nor does it in later runs with this patience. A NaN is never better.
      micro_batches: parts to cut each batch into, as for `step`, static; a divisor of `batch_size`.
      average_decay: decay of the average of the params, as for `step`, static.

    Returns:
      The state after the last step, and the `History`: [num_steps / record_every] rows, [num_steps / validate_every]
      scores. A step where loss, gradient or update is not finite is skipped, as by `step`. Params and the state of the
      optimizer lie where they lay, spread as they were; the average and the best of the params, as these.

    Raises:
      ValueError: the arrays of `data` or of `validation` differ in their leading axis or hold no example, a number is
        not positive or not a multiple as said above, `validation` and `validate_every` do not come together or
        `patience` without them, or whatever `step` raises.

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
    30 25 [2.833... 2.833... nan nan]
    """
    arguments = state, data, validation
    places, mesh = (sharding.places(data), sharding.places(validation)), sharding.explicit_mesh(arguments)
    with sharding.automatic_axes(mesh):
        after, history = _run(nll, optimizer, *sharding.automatic(arguments, mesh), places, num_steps, batch_size,
                              record_every, validate_every, patience, micro_batches, average_decay)  # fmt: skip
    return sharding.put_back(_spread_as(state, after), after, mesh), sharding.explicit(history, mesh)


@partial(jax.jit, static_argnums=(0, 1, *range(5, 13)))
def _run(nll, optimizer, state, data, validation, places, num_steps, batch_size, record_every, validate_every,
         patience, micro_batches, average_decay):  # fmt: skip
    _arguments.options("run", num_steps=num_steps, batch_size=batch_size, record_every=record_every,
                       validation=validation, validate_every=validate_every, patience=patience,
                       micro_batches=micro_batches, average_decay=average_decay)  # fmt: skip
    _arguments.state("run", state, optimizer, average_decay)
    size = _num_examples("run", "data", data)
    state = _begin(state, average_decay, validates=validation is not None)
    rows = _order.batches(_keys(state.key)[0], state.step, size, num_steps, batch_size)
    losses = Losses("run", nll)
    update = partial(_update, losses, optimizer, micro_batches, average_decay)

    def one(state, row):
        if size % batch_size == 0:
            return update(state, sharding.spread(jax.tree.map(lambda x: x[row], data), places[0]), None)
        counted = row < size
        # A batch is filled up with its own first example: with weight 0, but of a kind that `nll` can bear.
        filled = jax.tree.map(lambda x: x[jnp.where(counted, row, row[0])], data)
        return update(state, sharding.spread(filled, places[0]), counted)

    def record(state, rows):
        return _count(*jax.lax.scan(one, state, rows))

    def record_sums(state, rows):
        state, metrics = record(state, rows)
        return state, _summary(metrics, jnp.sum(rows < size, axis=-1))

    def train(state, rows):
        if record_every == 1:
            return record(state, rows)
        return jax.lax.scan(record_sums, state, rows.reshape(-1, record_every, batch_size))

    def train_and_validate(state, rows):
        state, metrics = train(state, rows)
        scored = state.params if state.average is None else _average_params(state)
        score = _score(losses, scored, validation, places[1], state.key, batch_size // micro_batches)
        return _judge(state, scored, score), (metrics, score)

    if validation is None:
        state, metrics = train(state, rows)
        return state, History(*metrics, validation=jnp.zeros(0))
    block = train_and_validate if patience is None else _unless_stale(train_and_validate, patience)
    state, (metrics, scores) = jax.lax.scan(block, state, rows.reshape(-1, validate_every, batch_size))
    return state, History(*(x.ravel() for x in metrics), validation=scores)


def _spread_as(before, after):
    """The arrays before, in the structure after: an average and a best of the params are to lie as these."""
    return before._replace(
        average=after.average and optax.EmaState(before.step, before.params),
        best=after.best and Best(before.params, before.step, before.step),
    )


def _keys(key):
    """Two independent keys: for the order of the data, and for what `nll` draws."""
    return jax.random.split(key)


def _zero():
    """A buffer of its own each time, so that a state can be donated."""
    return jnp.zeros((), jnp.int32)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _begin(state, average_decay, *, validates):
    """The state with an average and a best, where they are asked for and not there yet."""
    if average_decay is not None and state.average is None:
        state = state._replace(
            average=optax.EmaState(_zero(), jax.tree.map(lambda p: jnp.copy(_wide(p)), state.params))
        )
    if validates and state.best is None:
        params = jax.tree.map(jnp.copy, state.params)
        state = state._replace(best=Best(params, jnp.array(jnp.inf), jnp.copy(state.step)))
    return state


def _update(nll, optimizer, micro_batches, average_decay, state, batch, weights):
    """A step, but for counting it where it is skipped: `_count` does, for all steps at once and outside of the loop."""
    key = jax.random.fold_in(_keys(state.key)[1], state.step)
    loss, gradient = _loss_and_gradient(nll, state.params, batch, key, weights, micro_batches)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average if average_decay is None else _averaged(state.average, params, average_decay)
    measured = loss, _norm(gradient), _norm(updates)
    # Since the update has to be known first, the new state can be written over the old one without a copy.
    new, old = (params, optimizer_state, average), (state.params, state.optimizer_state, state.average)
    _arguments.same_types("step", old, new)
    params, optimizer_state, average = jax.tree.map(partial(jnp.where, _finite(measured)), new, old)
    state = state._replace(params=params, optimizer_state=optimizer_state, average=average, step=state.step + 1)
    return state, measured


def _finite(measured):
    return jax.tree.reduce(jnp.logical_and, jax.tree.map(jnp.isfinite, measured))


def _count(state, measured):
    """The metrics of one step or many, and the state with the skipped ones counted."""
    skipped = 1 - _finite(measured).astype(jnp.int32)
    total = state.skipped + jnp.sum(skipped, dtype=jnp.int32)
    return state._replace(skipped=total), Metrics(*measured, skipped=skipped)


def _loss_and_gradient(nll, params, batch, key, weights, micro_batches):
    if micro_batches == 1:
        return jax.value_and_grad(lambda params: _weighted_mean(nll(params, batch, key), weights))(params)
    # Examples far apart make a part: where devices share the batch, they share each part alike.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), (batch, weights))
    size = micro_batches * _num_examples("step", "batch", jax.tree.map(lambda x: x[0], parts))

    def add(gradient, part):
        number, (batch, weights) = part

        def objective(params):
            total, weight = _weighted_sum(nll(params, batch, jax.random.fold_in(key, number)), weights)
            return total / size, weight / size  # a gradient of the sum itself would overflow in float16

        shares, more = jax.value_and_grad(objective, has_aux=True)(params)
        return jax.tree.map(lambda a, g: a + _wide(g), gradient, more), shares

    zeros = jax.tree.map(lambda p: jnp.zeros_like(_wide(p)), params)
    gradient, shares = jax.lax.scan(add, zeros, (jnp.arange(micro_batches), parts))
    total, weight = jax.tree.map(jnp.sum, shares)
    weight = _or_one(weight)
    return total / weight, jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), gradient, params)


class Losses(NamedTuple):
    """`nll`, of which `function` demands one number per example; equal to another of the same two, as jit wants it."""

    function: str
    nll: Nll

    def __call__(self, params: PyTree, batch: PyTree, key: Array) -> Float[Array, " batch"]:
        """What `nll` gives."""
        size = _num_examples(self.function, "batch", batch)
        losses = jnp.asarray(self.nll(params, batch, key))
        if losses.shape != (size,):
            expected = f"nll must return one value for each of {size} examples"
            raise ValueError(f"{self.function}: {expected}, got {_checks.describe(losses)}")
        _checks.floating(self.function, **{"what nll returns": losses})
        return losses


def _without_weightless(examples, weights):
    """With the first example that counts in the place of those of weight 0: of a kind that `nll` can bear."""
    counted = jnp.where(weights > 0, jnp.arange(weights.size), jnp.argmax(weights > 0))
    return jax.tree.map(lambda x: x[counted], examples)


def _weighted_mean(losses, weights):
    total, weight = _weighted_sum(losses, weights)
    # Guarded before the division: a select after it would leave a NaN in the gradient.
    return total / _or_one(weight)


def _weighted_sum(losses, weights):
    """With the sum of the weights; in float32 at least: a sum of float16 losses would overflow."""
    losses = _wide(losses)
    if weights is None:
        return jnp.sum(losses), jnp.asarray(losses.size, losses.dtype)
    weights = weights.astype(losses.dtype)
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0)), jnp.sum(weights)


def _or_one(weight):
    return jnp.where(weight > 0, weight, 1)


def _norm(tree):
    """A product with itself is the cheapest sum of squares, all the more under `vmap`."""
    leaves = [_wide(x) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(jnp.tensordot(x, x, x.ndim, precision="highest") for x in leaves))


def _averaged(average, params, decay):
    count = average.count + 1
    # (1 - d) / (1 - d^n). As a pull towards the params it rounds to no bias; d a + (1 - d) p would, by u / (1 - d).
    share = (1 - decay) / -jnp.expm1(count * math.log(decay))
    ema = jax.tree.map(lambda a, p: a + share.astype(a.dtype) * (_wide(p) - a), average.ema, params)
    return optax.EmaState(count, ema)


def _average_params(state):
    return jax.tree.map(lambda a, p: a.astype(p.dtype), state.average.ema, state.params)


def _summary(metrics, sizes):
    """A row of the history from its steps, of which each has so many examples."""
    taken = metrics.skipped == 0

    def mean(values, weights):
        weights = jnp.where(taken, weights, 0).astype(values.dtype)
        total = jnp.sum(jnp.where(taken, weights * values, 0)) / _or_one(jnp.sum(weights))
        return jnp.where(jnp.any(taken), total, values[-1])

    means = mean(metrics.loss, sizes), mean(metrics.gradient_norm, 1), mean(metrics.update_norm, 1)
    return Metrics(*means, skipped=jnp.sum(metrics.skipped, dtype=jnp.int32))


def _score(nll, params, data, places, key, batch_size):
    size = _num_examples("run", "validation", data)
    length = min(size, batch_size)
    key = jax.random.fold_in(_keys(key)[1], 2**32 - 1)  # a number that no step has

    def one(_, number):
        start = jnp.minimum(number * length, size - length)
        batch = sharding.spread(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), data), places)
        # The last batch begins early enough to be full, with examples that have counted already.
        counted = start + jnp.arange(length) >= number * length
        return None, _weighted_sum(nll(params, batch, jax.random.fold_in(key, number)), counted)[0]

    return jnp.sum(jax.lax.scan(one, None, jnp.arange(-(-size // length)))[1]) / size


def _judge(state, scored, score):
    score = score.astype(state.best.score.dtype)  # which is as wide as any
    better = score < state.best.score
    best = jax.tree.map(partial(jnp.where, better), Best(scored, score, state.step), state.best)
    return state._replace(best=best, stale=jnp.where(better, 0, state.stale + 1))


def _unless_stale(block, patience):
    """The block, or nothing: for one member it is not computed then, under `vmap` it is selected away."""

    def guarded(state, rows):
        measured = jax.eval_shape(block, state, rows)[1]
        nothing = jax.tree.map(lambda x: jnp.full(x.shape, 0 if x.dtype == jnp.int32 else jnp.nan, x.dtype), measured)
        return jax.lax.cond(state.stale < patience, block, lambda state, rows: (state, nothing), state, rows)

    return guarded


def _num_examples(function, name, data):
    shapes = [jnp.shape(x) for x in jax.tree.leaves(data)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"{function}: expected {name} with one leading axis of examples, got shapes {shapes}")
    return sizes.pop()

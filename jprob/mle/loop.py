"""The training loop as pure functions: no input or output, no callbacks, nothing but arrays in and arrays out."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int, Key, PyTree

Nll = Callable[[PyTree, PyTree, Array], Array]


class State(NamedTuple):
    """All that training carries from step to step: one pytree, to be vmapped, sharded or saved as it is.

    Attributes:
      params: the parameters being fitted.
      optimizer_state: what the optimizer remembers of earlier steps.
      step: steps taken so far, int32, so at most 2^31 - 1. It says where in its epoch the run is, and which random
        numbers come next.
      key: the run's random key. It never changes: what is drawn depends on it and on the step alone.
    """

    params: PyTree
    optimizer_state: PyTree
    step: Int[Array, ""]
    key: Key[Array, ""]


class Metrics(NamedTuple):
    """What a step measured on its batch, before the update.

    Attributes:
      loss: mean negative log-likelihood per example, in nats.
      gradient_norm: Euclidean norm of its gradient over all params.
    """

    loss: Float[Array, "*steps"]
    gradient_norm: Float[Array, "*steps"]


def init(params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> State:
    """State before the first step.

    Args:
      params: initial parameters, any pytree of floating-point arrays.
      optimizer: an optax gradient transformation.
      key: random key of the run: it orders the data and seeds whatever `nll` draws.

    Returns:
      A `State` with the params as given and step 0.

    >>> init(jnp.zeros(2), optax.sgd(0.1), jax.random.key(0)).step
    Array(0, dtype=int32)
    """
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


def step(
    nll: Nll,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: PyTree,
    *,
    weights: Float[Array, "batch"] | None = None,
) -> tuple[State, Metrics]:
    """One step of the optimizer down the mean negative log-likelihood of a batch.

    Args:
      nll: `nll(params, batch, key) -> Array[batch]`, the negative log-likelihood of each example, in nats. `key` is a
        fresh one for each step, for dropout and the like.
      optimizer: an optax gradient transformation, the one that `init` was given.
      state: where training stands.
      batch: the examples, a pytree of arrays with the batch as leading axis.
      weights: how much each example counts, not negative. One with weight 0 is as if it were not there: another takes
        its place before `nll` sees it, so that not even a NaN gets through. If all are 0, so are loss and gradient.

    Returns:
      The state after the step, and the loss (in float32 at least) and gradient norm that led to it.

    Raises:
      ValueError: the arrays of `batch` differ in their leading axis or hold no example, `weights` is not one number per
        example, or `nll` does not return one value per example.

    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> optimizer = optax.sgd(0.5)
    >>> state, metrics = step(nll, optimizer, init(jnp.array(0.0), optimizer, jax.random.key(0)), jnp.array([1.0, 3.0]))
    >>> print(state.params, metrics.loss)
    1.0 2.5
    """
    size = _num_examples("step", "batch", batch)
    if weights is None:
        return _update(nll, optimizer, state, batch, jnp.ones(size))
    weights = jnp.asarray(weights)
    if weights.shape != (size,):
        raise ValueError(f"step: weights must be one number for each of {size} examples, got shape {weights.shape}")
    counted = jnp.where(weights > 0, jnp.arange(size), jnp.argmax(weights > 0))
    return _update(nll, optimizer, state, jax.tree.map(lambda x: x[counted], batch), weights)


@partial(jax.jit, static_argnames=("nll", "optimizer", "num_steps", "batch_size"))
def run(
    nll: Nll,
    optimizer: optax.GradientTransformation,
    state: State,
    data: PyTree,
    *,
    num_steps: int,
    batch_size: int,
) -> tuple[State, Metrics]:
    """Takes `num_steps` steps over minibatches of `data`, as one `lax.scan` on the device.

    Every example comes once an epoch, in an order that follows from the key and the number of the epoch. An epoch ends
    with a short batch where `batch_size` does not divide the data; it counts its own examples alone. The position in
    the epoch follows from `state.step`, so that runs of a and of b steps one after the other are the run of a + b
    steps, bit for bit. `jax.vmap` trains many members at once, over keys, params, learning rates or data; each has its
    own order.

    Args:
      nll: `nll(params, batch, key) -> Array[batch]`, the negative log-likelihood of each example, in nats.
      optimizer: an optax gradient transformation, the one that `init` was given. Its hyperparameters may be traced:
        build it inside the function that is vmapped.
      state: where training stands: from `init`, or from an earlier `run` with the same data and batch size.
      data: all examples, a pytree of arrays with the same leading axis. They stay on their device.
      num_steps: how many steps to take, static. The order of the examples takes 4 bytes for each example of each epoch;
        where that is too much, run in pieces.
      batch_size: examples per step, static.

    Returns:
      The state after the last step, and the metrics of each step, stacked: arrays of shape [num_steps].

    Raises:
      ValueError: the arrays of `data` differ in their leading axis or hold no example, `num_steps` or `batch_size` is
        not positive, or `nll` does not return one value per example.

    >>> x = jnp.array([1.0, 2.0, 6.0])
    >>> nll = lambda mean, x, key: jnp.square(x - mean) / 2
    >>> optimizer = optax.sgd(0.5)
    >>> state = init(jnp.array(0.0), optimizer, jax.random.key(0))
    >>> state, history = run(nll, optimizer, state, x, num_steps=20, batch_size=3)
    >>> print(f"{state.params:.3f}", history.loss.shape)
    3.000 (20,)
    """
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"run: {name} must be at least 1, got {value}")
    size = _num_examples("run", "data", data)
    steps_per_epoch = -(-size // batch_size)
    rows = _batches(state, size, steps_per_epoch, num_steps, batch_size)

    def one(state, row):
        counted = row < size
        # A batch is filled up with its own first example: with weight 0, but of a kind that `nll` can bear.
        batch = jax.tree.map(lambda x: x[jnp.where(counted, row, row[0])], data)
        return _update(nll, optimizer, state, batch, counted)

    return jax.lax.scan(one, state, rows)


def _keys(key):
    """Two independent keys: for the order of the data, and for what `nll` draws."""
    return jax.random.split(key)


def _update(nll, optimizer, state, batch, weights):
    key = jax.random.fold_in(_keys(state.key)[1], state.step)

    def loss(params):
        losses = jnp.asarray(nll(params, batch, key))
        if losses.shape != weights.shape:
            got = f"{losses.dtype}{list(losses.shape)}"
            raise ValueError(f"step: nll must return one value for each of {weights.size} examples, got {got}")
        return _weighted_mean(losses, weights)

    value, gradient = jax.value_and_grad(loss)(state.params)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, optimizer_state, state.step + 1, state.key), Metrics(value, optax.tree.norm(gradient))


def _weighted_mean(losses, weights):
    """In float32 at least: a sum of float16 losses would overflow."""
    dtype = jnp.promote_types(losses.dtype, jnp.float32)
    losses, weights = losses.astype(dtype), weights.astype(dtype)
    total = jnp.sum(weights)
    # Guarded before the division: a select after it would leave a NaN in the gradient.
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0)) / jnp.where(total > 0, total, 1)


def _num_examples(function, name, data):
    shapes = [jnp.shape(x) for x in jax.tree.leaves(data)]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"{function}: expected {name} with one leading axis of examples, got shapes {shapes}")
    return sizes.pop()


def _batches(state, size, steps_per_epoch, num_steps, batch_size):
    """Rows of example numbers, one row a step; the number `size` fills up the last batch of an epoch."""
    key = _keys(state.key)[0]
    missing = steps_per_epoch * batch_size - size

    def epoch_rows(epoch):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), size)
        return jnp.pad(order, (0, missing), constant_values=size).reshape(steps_per_epoch, batch_size)

    # A run that starts within an epoch may touch one epoch more than it is long.
    epochs = state.step // steps_per_epoch + jnp.arange((num_steps - 1) // steps_per_epoch + 2)
    rows = jax.lax.map(epoch_rows, epochs).reshape(-1, batch_size)
    return jax.lax.dynamic_slice_in_dim(rows, state.step % steps_per_epoch, num_steps)

"""The state that a training run carries from step to step, and its measurements."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int, Key, PyTree

from .. import _accurate, _checks
from . import _arguments


class Best(NamedTuple):
    """The params with the best validation score so far.

    Attributes:
      params: the params that were scored. Before any score, the params of the start.
      model_state: the model state that was scored with them, None without one.
      score: their validation loss, or the metric that `monitor` names; the worst value before any score.
      step: `State.step` when they were scored.
    """

    params: PyTree
    model_state: PyTree
    score: Float[Array, "*members"]
    step: Int[Array, "*members"]


class State(NamedTuple):
    """All that training carries from step to step: one pytree, to be vmapped, sharded or saved as it is.

    Attributes:
      params: the parameters being fitted.
      model_state: state that the model updates itself, such as the running statistics of batch norm. `nll` receives it
        as a fourth argument and returns the new one. None for a model without state.
      optimizer_state: the state of the optimizer.
      step: batches consumed so far, skipped ones included, int32, so at most 2^31 - 1. The step says where in its epoch
        the run is, and which random numbers come next.
      key: the run's random key. It never changes: what is drawn depends on the key and on the step alone.
      skipped: how many of the steps were skipped because something was not finite, int32.
      average: None unless an average of the params is kept. Then `average.ema` is their exponential average over the
        `average.count` steps since that were not skipped, in float32 at least. The average is free of the bias of its
        start: sum d^(n - i) p_i / sum d^(n - i), with decay d, over the params p_1 ... p_n after these steps.
      best: None until validation data are first given; then the best params since.
      validations_since_best: int32. Training with `patience` ends when it reaches that number.
    """

    params: PyTree
    model_state: PyTree
    optimizer_state: PyTree
    step: Int[Array, "*members"]
    key: Key[Array, "*members"]
    skipped: Int[Array, "*members"]
    average: optax.EmaState | None
    best: Best | None
    validations_since_best: Int[Array, "*members"]


class Metrics(NamedTuple):
    """Measurements of one step.

    Attributes:
      loss: weighted mean of the losses of its batch, before the update, in nats; in float32 at least.
      gradient_norm: Euclidean norm of the loss's gradient over all params, in float32 at least. It overflows above
        1e19 in float32, and then counts as not finite.
      update_norm: Euclidean norm, likewise, of the update that the optimizer made of the gradient.
      skipped: 1 if loss, gradient norm or update norm is not finite, so that nothing was updated; else 0.
      weight: the sum of the weights: the number of losses if none has a weight.
      metrics: weighted means of the metrics that `nll` returned, by name.
    """

    loss: Float[Array, "*steps"]
    gradient_norm: Float[Array, "*steps"]
    update_norm: Float[Array, "*steps"]
    skipped: Int[Array, "*steps"]
    weight: Float[Array, "*steps"]
    metrics: dict[str, Array]


class History(NamedTuple):
    """Measurements of a run: a row for every `log_every` steps, a score for every `validate_every`.

    A row sums up those of its steps that were not skipped. If all were, the row is the last one as it was: a NaN stays
    visible. Rows and scores after an early stop are inf, with no step skipped; a row that was measured has an
    inf only if a step was skipped.

    Attributes:
      loss: weighted mean loss over the row, in nats. A short batch counts by its weight: the row of an epoch is the
        mean over all data.
      gradient_norm: mean norm of the gradient.
      update_norm: mean norm of the update.
      skipped: how many steps of the row were skipped, int32.
      metrics: weighted means over the row of the metrics that `nll` returned, by name.
      validation: weighted mean loss over all validation data; empty without validation.
      validation_metrics: weighted means over all validation data of the metrics that the validation nll returned.
    """

    loss: Float[Array, "*rows"]
    gradient_norm: Float[Array, "*rows"]
    update_norm: Float[Array, "*rows"]
    skipped: Int[Array, "*rows"]
    metrics: dict[str, Array]
    validation: Float[Array, "*scores"]
    validation_metrics: dict[str, Array]


def init(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    model_state: PyTree = None,
    average: bool = False,
) -> State:
    """State before the first step.

    Args:
      params: initial parameters, any pytree of floating-point arrays.
      optimizer: an optax gradient transformation.
      key: random key of the run: it orders the data and seeds every draw of `nll`.
      model_state: state that the model updates itself, any pytree of arrays. `nll` then receives it as a fourth
        argument.
      average: whether to keep an average of the params from the start. The state then has one structure throughout, and
        `step(ema_decay=...)` may be the body of a scan. Otherwise the first step with a decay adds it.

    Returns:
      A `State` with the params as given, step 0, and no best. The state holds the arrays of the params and the key
      themselves: copy what you still need before you donate the state.

    Raises:
      ValueError: a leaf of `params` is not a floating-point array, or one of `model_state` is not an array.

    >>> init(jnp.zeros(2), optax.sgd(0.1), jax.random.key(0)).step
    Array(0, dtype=int32)
    """
    _check_leaves("params", params, jnp.floating, "eqx.partition(model, eqx.is_inexact_array) or nnx.split")
    _check_leaves("model_state", model_state, jnp.generic, "eqx.partition(state, eqx.is_array) or nnx.split")
    _arguments.key("init", key)
    params, model_state = jax.tree.map(strong, (params, model_state))
    state = State(params, model_state, optimizer.init(params), zero(), key, zero(), None, None, zero())
    return with_average(state) if average else state


def _check_leaves(name, tree, kind, cure):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
        dtype = jnp.result_type(leaf) if number else getattr(leaf, "dtype", None)
        if dtype is None or not (kind is jnp.generic or jnp.issubdtype(dtype, kind)):
            expected = "an array" if kind is jnp.generic else "a floating-point array"
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"init: {where} must be {expected}, got {_checks.describe(leaf)}; see {cure}")


def strong(x: Any) -> Array:
    """An array without a weak type, which the first step would turn into another."""
    return x if is_key(x) else jnp.asarray(x, jnp.result_type(x))


def zero() -> Int[Array, ""]:
    """A new buffer each time, so that a state can be donated."""
    return jnp.zeros((), jnp.int32)


def wide(x: Array) -> Array:
    """The array in float32 at least."""
    return x.astype(_accurate.compute_dtype(x))


def with_average(state: State) -> State:
    """The state with an average of the params, which has seen no step yet."""
    return state._replace(average=optax.EmaState(zero(), jax.tree.map(lambda p: jnp.copy(wide(p)), state.params)))


def averaged_params(state: State) -> PyTree:
    """The average of the params, in their dtypes; the params themselves if no average is kept."""
    if state.average is None:
        return slow(state.params)
    return slow(jax.tree.map(lambda a, p: a.astype(p.dtype), state.average.ema, state.params))


def fast(params: PyTree) -> PyTree:
    """The params that `nll` sees in training: of a lookahead, the fast ones."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def slow(params: PyTree) -> PyTree:
    """The params to evaluate: of a lookahead, the slow ones."""
    return params.slow if isinstance(params, optax.LookaheadParams) else params


def key_for_nll(key: Key[Array, ""], number: Int[Array, ""] | int) -> Key[Array, ""]:
    """The key for `nll` in the step of this number: a key of the kind of `key`, made by threefry.

    Another implementation may fold, under `vmap`, into the first key alone. To unwrap a key does not use it up, so one
    state may be trained from twice.
    """
    words = jax.random.key_data(key)
    threefry = jax.random.wrap_key_data(jnp.resize(words, (2,)), impl="threefry2x32")
    threefry = jax.random.split(reduce(jax.random.fold_in, words[2:], threefry))[1]
    made = jax.random.fold_in(threefry, number)
    made = jax.random.key_data(made) if words.size == 2 else jax.random.bits(made, words.shape, jnp.uint32)
    return jax.random.wrap_key_data(made, impl=jax.random.key_impl(key))


def is_key(x: Any) -> bool:
    """Whether an array is of typed random keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def joined(pieces: Sequence[History]) -> History:
    """One history of several pieces, in numpy arrays. Some have no rows, and some no scores."""
    rows = [piece[:5] for piece in pieces if piece.loss.size] or [pieces[0][:5]]
    scores = [piece[5:] for piece in pieces if piece.validation.size] or [pieces[-1][5:]]
    parts = [jax.tree.map(lambda *x: np.concatenate(x), *part) for part in (rows, scores)]
    return History(*parts[0], *parts[1])


_none: Any = np.zeros(0, np.float32)
NO_HISTORY = History(_none, _none, _none, _none.astype(np.int32), {}, _none, {})

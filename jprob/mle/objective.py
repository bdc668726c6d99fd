"""The objective of a step, a run and a validation: the checked results of `nll` and their weighted mean.

Sums over examples are kept as (sum of weight times value, sum of weights). Any split into micro-batches or over
devices gives the mean of the whole batch, also for weights of tokens.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key, PyTree, Real

from .. import _checks
from .state import strong, wide

Nll = Callable[..., Any]  # (params, batch, key) or (params, batch, key, model_state) to losses or `Output`


class Output(NamedTuple):
    """The result that `nll` may return instead of losses alone.

    Attributes:
      losses: negative log-likelihoods in nats, [batch, ...]: one per example, token or pixel.
      weights: how much each loss counts, not negative, in the shape of the losses; a mask is one. None counts all the
        same. A weight is a constant to the gradient.
      metrics: values in the shape of the losses, by name; their weighted means stand in the history.
      model_state: the new model state; None leaves the state as it is.
    """

    losses: Float[Array, "batch *rest"]
    weights: Real[Array, "batch *rest"] | Bool[Array, "batch *rest"] | None = None
    metrics: dict[str, Real[Array, "batch *rest"] | Bool[Array, "batch *rest"]] | None = None
    model_state: PyTree = None


class Sums(NamedTuple):
    """Sums over examples, which add up over batches, or the means that follow from them.

    Attributes:
      loss: of weight times loss, in float32 at least.
      weight: of the weights.
      metrics: of weight times metric, by name.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class Objective(NamedTuple):
    """`nll`, whose results `function` checks; equal to another of the same two, as jit wants it."""

    function: str
    nll: Nll

    def sums(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: Key[Array, ""], weights: Array | None
    ) -> tuple[Sums, PyTree]:
        """Sums over the batch, with a weight per example or none, and the new model state."""
        out = self._output(params, model_state, batch, key)
        losses, w = wide(out.losses), out.weights
        if weights is not None:
            weights = weights.astype(losses.dtype).reshape(-1, *[1] * (losses.ndim - 1))
            w = jnp.broadcast_to(weights, losses.shape) if w is None else w.astype(losses.dtype) * weights
        w = None if w is None else jax.lax.stop_gradient(w.astype(losses.dtype))

        def total(values):
            return jnp.sum(values if w is None else _product(w, values))

        weight = jnp.asarray(losses.size, losses.dtype) if w is None else jnp.sum(w)
        metrics = {name: total(jnp.asarray(x).astype(losses.dtype)) for name, x in (out.metrics or {}).items()}
        return Sums(total(losses), weight, metrics), out.model_state

    def mean(
        self, params: PyTree, model_state: PyTree, batch: PyTree, key: Key[Array, ""], weights: Array | None
    ) -> tuple[Float[Array, ""], tuple[Sums, PyTree]]:
        """The mean loss; next to it the sums, and the new model state."""
        sums, after = self.sums(params, model_state, batch, key, weights)
        return sums.loss / or_one(sums.weight), (sums, after)

    def of_examples(self, params: PyTree, batch: PyTree, key: Key[Array, ""]) -> Float[Array, " batch"]:
        """The loss of each example: a weighted sum if it has several."""
        out = self._output(params, None, batch, key)
        losses = wide(out.losses)
        if out.weights is not None:
            losses = _product(out.weights.astype(losses.dtype), losses)
        return jnp.sum(losses, axis=tuple(range(1, losses.ndim)))

    def _output(self, params, model_state, batch, key) -> Output:
        size = num_examples(self.function, "batch", batch)
        key = jax.random.clone(key)  # a full batch is evaluated with the same key again and again
        # New containers: those of Flax know in which trace they were made, and may be changed in that alone.
        params, model_state = jax.tree.map(lambda x: x, (params, model_state))
        given = (params, batch, key) if model_state is None else (params, batch, key, model_state)
        try:
            out = self.nll(*given)
        except Exception as error:
            if type(error).__name__ != "TraceContextError":
                raise
            cure = "pass it by nnx.split, and use nnx.merge(..., copy=True) inside"
            raise ValueError(f"{self.function}: nll changes a Flax module that it closes over; {cure}") from None
        if not isinstance(out, Output):
            if not hasattr(out, "dtype") or jnp.shape(out) != (size,):
                expected = f"one loss for each of {size} examples, or mle.Output"
                raise ValueError(f"{self.function}: nll must return {expected}, got {_checks.describe(out)}")
            out = Output(jnp.asarray(out))
        _checks.floating(self.function, **{"what nll returns": out.losses})
        if out.losses.shape[:1] != (size,):
            expected = f"losses with the leading axis of {size} examples"
            raise ValueError(f"{self.function}: nll must return {expected}, got {_checks.describe(out.losses)}")
        metrics = out.metrics or {}
        odd = [x for x in metrics.values() if not hasattr(x, "shape")] if isinstance(metrics, dict) else [metrics]
        if odd:
            expected = f"a dict from names to arrays, got {_checks.describe(odd[0])}"
            raise ValueError(f"{self.function}: metrics of nll must be {expected}")
        for name, value in metrics.items():
            _checks.same_shape(self.function, "losses", f"metrics[{name!r}]", out.losses.shape, jnp.asarray(value))
        if out.weights is not None:
            out = out._replace(weights=_checks.weights(self.function, "losses", out.losses.shape, out.weights))
        if out.model_state is None:
            return out._replace(model_state=model_state)
        if model_state is None:
            raise ValueError(f"{self.function}: nll returned a model_state; give init one to start from")
        same_types(self.function, "a model_state", "nll", model_state, out.model_state)
        return out._replace(model_state=jax.tree.map(strong, out.model_state))


def loss_and_gradient(objective: Objective, given: tuple[Any, ...], micro_batches: int) -> tuple[Sums, PyTree, PyTree]:
    """Means over the batch, the gradient of the mean loss, and the new model state.

    Micro-batches run one after the other, each with another key, and hand on the model state.

    Args:
      objective: what gives the losses.
      given: its arguments: params, model state, batch, key, and a weight per example or none.
      micro_batches: parts of the batch.
    """
    if micro_batches == 1:
        (_, (sums, after)), gradient = jax.value_and_grad(objective.mean, has_aux=True)(*given)
        return means(sums), gradient, after
    params, model_state, batch, key, weights = given
    # Examples far apart make a part, so that devices that share the batch share each part alike.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), (batch, weights))
    scale = 1 / num_examples(objective.function, "batch", batch)

    def add(carry, part):
        gradient, model_state = carry
        number, (batch, weights) = part

        def share(params):
            sums, after = objective.sums(params, model_state, batch, jax.random.fold_in(key, number), weights)
            return sums.loss * scale, (sums, after)  # a gradient of the sum itself would overflow in float16

        (_, (sums, after)), more = jax.value_and_grad(share, has_aux=True)(params)
        return (jax.tree.map(lambda a, g: a + wide(g), gradient, more), after), sums

    start = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params), model_state
    (gradient, after), sums = jax.lax.scan(add, start, (jnp.arange(micro_batches), parts))
    sums = jax.tree.map(partial(jnp.sum, axis=0), sums)
    divisor = or_one(sums.weight * jnp.asarray(scale, sums.weight.dtype))
    gradient = jax.tree.map(lambda g, p: (g / divisor.astype(g.dtype)).astype(p.dtype), gradient, params)
    return means(sums), gradient, after


def means(sums: Sums) -> Sums:
    """The means that follow from sums, and the weight."""
    divisor = or_one(sums.weight)
    return jax.tree.map(lambda total: total / divisor, sums)._replace(weight=sums.weight)


def without_weightless(examples: PyTree, weights: Any) -> PyTree:
    """The examples, with the first one that counts instead of those of weight 0, so that NaN padding is safe."""
    counted = jnp.where(weights != 0, jnp.arange(weights.size), jnp.argmax(weights != 0))
    return jax.tree.map(lambda x: jnp.asarray(x)[counted], examples)


def or_one(weight: Array) -> Array:
    """The weight, or 1 if it is 0: guarded before a division, since a select after it leaves a NaN in the gradient."""
    return jnp.where(weight == 0, 1, weight)


def num_examples(function: str, name: str, data: PyTree) -> int:
    """The length of the leading axis that all arrays share."""
    leaves = jax.tree.leaves(data, is_leaf=lambda x: isinstance(x, Iterator))
    for leaf in leaves:
        if not hasattr(leaf, "shape"):
            expected = "arrays with one leading axis of examples"
            raise ValueError(f"{function}: {name} must be {expected}, got {_checks.describe(leaf)}")
    shapes = [tuple(x.shape) for x in leaves]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"{function}: expected {name} with one leading axis of examples, got shapes {shapes}")
    return sizes.pop()


def same_types(function: str, what: str, who: str, old: PyTree, new: PyTree) -> None:
    """`new` has the structure, shapes and dtypes of `old`: a loop must end with the types it began with."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        expected = f"{what} of the structure {jax.tree.structure(old)}"
        raise ValueError(f"{function}: expected {expected}, {who} gave {jax.tree.structure(new)}")
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
        if (jnp.shape(before), before.dtype) != (jnp.shape(after), jnp.result_type(after)):
            leaf = jax.tree_util.keystr(path)
            types = f"{_checks.describe(before)} at {leaf or 'its only leaf'}, {who} gave {_checks.describe(after)}"
            raise ValueError(f"{function}: expected {what} with {types}")


def _product(weights, values):
    """Selected, so that a loss of weight 0 may be NaN."""
    return jnp.where(weights == 0, 0, weights * values)

"""Weighted examples: their sums by an index, ratios of sums, shares, means and deviations."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from . import _accurate, _checks

_LARGEST = 2**24  # partial sums: 64 MiB of float32


def weighted(function: str, x: Array, axis: int, weights: Any, name: str = "x") -> tuple[Array, Array, Array, int]:
    """Observations, weights of their shape, whether each row is valid, and the axis from the front.

    A row is not valid with a weight that is negative or infinite. It is not valid with an observation that counts and
    is not finite. All of these are 0 here: 0 * inf is NaN.
    """
    _checks.floating(function, **{name: x})
    axis = _checks.axis_of(function, name, x, axis, "observation")
    weights = jnp.ones((), bool) if weights is None else weights
    _checks.real(function, weights=weights)
    _checks.broadcasts(function, "weights", weights, x, name)
    x, w = (jnp.broadcast_to(v, x.shape).astype(_accurate.compute_dtype(x, weights)) for v in (x, weights))
    _checks.expect(w >= 0, w, f"{function}: weight {{value}} is negative")
    finite, right = jnp.isfinite(x), (w >= 0) & (w < jnp.inf)
    valid = jnp.all(right & (finite | (w == 0)), axis=axis)
    return jnp.where(finite, x, 0), jnp.where(right, w, 0), valid, axis


def deviations(x: Array, w: Array, axis: int) -> tuple[Array, Array, Array]:
    """Shares `w / sum w` (0 where no weight is), the mean, and the deviations from it before it is rounded."""
    total = jnp.sum(w, axis=axis, keepdims=True)
    share = w / jnp.where(total == 0, 1, total)
    rough = jnp.sum(share * x, axis=axis, keepdims=True)
    deviation = x - rough
    rest = jnp.sum(share * deviation, axis=axis, keepdims=True)
    return share, rough + rest, deviation - rest


def sum_by(index: Array, values: Array, size: int) -> Array:
    """Sums of `values[i]` by index: row k, in [0, size), is the sum over all i with index[i] = k.

    `index` has shape [n], each entry in [0, size), and `values` [n, ...]. Added one after the other, 10^7 equal floats
    lose 9 % of their sum. So b = sqrt(n) blocks are added apart, and then their sums. The error is 2 sqrt(n) u, and
    more where `size` leaves room for fewer blocks.
    """
    n, blocks = index.shape[0], 1
    if jnp.issubdtype(values.dtype, jnp.floating):
        blocks = max(1, min(math.isqrt(n), _LARGEST // max(1, size * math.prod(values.shape[1:]))))
    place = index + size * (jnp.arange(n, dtype=index.dtype) % blocks)
    partial = jnp.zeros((blocks * size, *values.shape[1:]), values.dtype).at[place].add(values)
    return jnp.sum(partial.reshape(blocks, size, *values.shape[1:]), axis=0)


def ratio(part: Array, total: Array) -> Array:
    """part / total, and 0 with a gradient of 0 where there is nothing to divide by."""
    # The inner select keeps 0 / 0 out of the gradient.
    return jnp.where(total == 0, 0, part / jnp.where(total == 0, 1, total))

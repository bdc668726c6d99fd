"""Expectations: the mean of a quantity under a distribution, and how far the quantity strays from it.

Over finitely many outcomes both are sums, and exact. Outcome i has the value v_i and the probability p_i, p the softmax
of logits. The fair die has logits 0, values 1 to 6, mean 3.5 and variance 35 / 12. Otherwise the mean of n draws is an
estimate. Its standard error is the standard deviation of the quantity over sqrt(n): a hundred times the draws for one
more digit.

All sums are over distances from one of the values, not over the values: so neither a large offset common to all
values, nor a probability within u of 1, costs a digit. Computed in float32 at least (float64 where an input has it). u
is half the spacing at 1 of that dtype. R is the largest gap between finite logits of a row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key, Real

from . import _accurate, _checks, _placement, gaussian


class Estimate(NamedTuple):
    """An estimated mean, and the standard deviation of its error."""

    mean: Array
    standard_error: Array


@_checks.public(static=("axis",))
def mean(
    values: Real[Array, "*#shape"] | Bool[Array, "*#shape"], logits: Float[Array, "*shape"], *, axis: int = -1
) -> Float[Array, "*rest"]:
    """Expected value sum_i p_i v_i under p = softmax(logits).

    Gradients: p_i in value i, and p_i (v_i - mean) in logit i.

    Args:
      values: v, one real number per outcome, broadcast to the shape of the logits. True and False count 1 and 0.
      logits: unnormalised log-probabilities of the outcomes; -inf marks an impossible one, whose value does not count.
      axis: the axis of the outcomes; it is summed away.

    Returns:
      One value per row, in the unit of the values, at least float32: inf where a possible outcome has that value; NaN
      where +inf and -inf are both possible, or no outcome is. All of these have gradient 0. Error at most (16 + R) u of
      sum_i p_i |v_i - v_top|, plus 2 u of |v_top|; a gradient entry likewise. v_top is the value of the most probable
      outcome.

    Raises:
      ValueError: the logits are not floating-point, `axis` is out of range, or the values are not real or do not
        broadcast.

    Source: Cover and Thomas (2006), Elements of Information Theory, 2.1.

    >>> print(mean(jnp.arange(1, 7), jnp.zeros(6)))
    3.5
    """
    v, z, axis, infinite, possible = _canonical("mean", values, logits, axis)
    return jnp.squeeze(_accurate.nan_unless(possible, _mean(v, z, axis) + infinite), axis)


@_checks.public(static=("axis",))
def variance(
    values: Real[Array, "*#shape"] | Bool[Array, "*#shape"], logits: Float[Array, "*shape"], *, axis: int = -1
) -> Float[Array, "*rest"]:
    """Variance sum_i p_i (v_i - mean)^2 under p = softmax(logits).

    Gradients: 2 p_i (v_i - mean) in value i, and p_i ((v_i - mean)^2 - variance) in logit i.

    Args:
      values: v, one real number per outcome, broadcast to the shape of the logits. True and False count 1 and 0.
      logits: unnormalised log-probabilities of the outcomes; -inf marks an impossible one, whose value does not count.
      axis: the axis of the outcomes; it is summed away.

    Returns:
      One value per row, in the square of the values' unit, at least float32, never negative: 0 where all possible
      outcomes have one value; NaN, with gradient 0, where a possible outcome is infinite, or none is possible. Relative
      error at most (32 + 2 R) u, also with a large common offset or one nearly certain outcome. The error of a gradient
      entry is relative to the sum of the magnitudes of its terms.

    Raises:
      ValueError: the logits are not floating-point, `axis` is out of range, or the values are not real or do not
        broadcast.

    >>> print(12 * variance(jnp.arange(1, 7), jnp.zeros(6)))
    35.0
    >>> print(variance(jnp.array([10000.0, 10001.0]), jnp.zeros(2)))
    0.25
    """
    v, z, axis, infinite, possible = _canonical("variance", values, logits, axis)
    return jnp.squeeze(_accurate.nan_unless(possible & (infinite == 0), _variance(v, z, axis)), axis)


@_checks.public(static=("fn", "sample", "num_samples"))
def monte_carlo(
    fn: Callable[[Any], Array], sample: Callable[[Array], Any], key: Key[Array, ""], *, num_samples: int
) -> Estimate:
    """Monte Carlo estimate of the expected value of fn(x) over draws x = sample(key), with its standard error.

    `sample` draws once from one key. `fn` sees that one draw, an array or any tree of arrays. Both are mapped here over
    `num_samples` keys. A function of jprob becomes a sampler by fixing its arguments:
    `lambda key: gaussian.sample(key, loc, scale)`. The estimate is differentiable in what such a lambda closes over, so
    far as the sampler is. Within `jit` all is one program. Outside of it a function defined once compiles once, and a
    new lambda compiles again.

    Args:
      fn: from a draw to an array of real numbers or bool (the mean is then a probability).
      sample: from a key to a draw.
      key: a random key.
      num_samples: how many draws, static, at least 2. They are in memory all at once.

    Returns:
      Estimate(mean, standard_error), each in the shape of fn's result, at least float32: the mean, and the root of
      sum (f - mean)^2 / (n (n - 1)). The arithmetic adds (16 + log2 n) u of |mean| + standard deviation to the error of
      chance; the standard error keeps its digits where |mean| is far larger, and is 0 where fn is constant.

    Raises:
      ValueError: num_samples is less than 2, fn or sample is no function, or fn's result is no array of real numbers.

    Source: Owen (2013), Monte Carlo theory, methods and examples, 2.

    >>> draw = lambda key: gaussian.sample(key, 0.0, 1.0)
    >>> within, error = monte_carlo(lambda x: jnp.abs(x) < 1, draw, jax.random.key(0), num_samples=100_000)
    >>> print(f"{within:.2f} +- {error:.4f}")
    0.68 +- 0.0015
    """
    for name, value in (("fn", fn), ("sample", sample)):
        if not callable(value):
            raise ValueError(f"monte_carlo: {name} must be a function, got {_checks.describe(value)}")
    if not isinstance(num_samples, int) or not 2 <= num_samples < 2**31:
        raise ValueError(f"monte_carlo: num_samples must be an integer in [2, 2^31), got {num_samples!r}")
    values = jax.vmap(lambda one: fn(sample(one)))(jax.random.split(key, num_samples))
    _checks.real("monte_carlo", **{"what fn returns": values})
    loc, scale = gaussian.fit(values.astype(_accurate.compute_dtype(values)), axis=0)
    return Estimate(loc, scale / (num_samples - 1) ** 0.5)


def _canonical(function, values, logits, axis):
    """Values and logits of one shape in the dtype computed in, and the axis from the front.

    Two more results: the sum of the infinite values of a row (0 if there are none), and whether an outcome is possible.
    A row that has no finite mean has values and logits of 0.
    """
    axis = _checks.class_axis(function, logits, axis)
    _checks.real(function, values=values)
    _checks.broadcasts(function, "values", values, logits)
    dtype = _accurate.compute_dtype(logits, values)
    z, v = (jnp.broadcast_to(x, logits.shape).astype(dtype) for x in (logits, values))
    v = jnp.where(z == -jnp.inf, 0, v)  # what cannot happen must not be seen: 0 * inf is NaN
    infinite = jax.lax.stop_gradient(_accurate.total(jnp.where(jnp.isfinite(v), 0, v), axis))
    possible = jnp.isfinite(jnp.max(z, axis=axis, keepdims=True))
    usual = possible & jnp.isfinite(infinite)
    return jnp.where(usual, v, 0), jnp.where(usual, z, 0), axis, infinite, possible


def _centre(v, z, axis):
    """The value of the most probable outcome."""
    return _placement.entries(v, jnp.argmax(z, axis=axis, keepdims=True), axis)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _mean(v, z, axis):
    centre = _centre(v, z, axis)
    return centre + _accurate.total(_accurate.multiply_no_nan(_accurate.softmax(z, axis), v - centre), axis)


@_mean.defjvp
def _mean_jvp(axis, primals, tangents):
    """sum_i p_i (dv_i + (v_i - mean) dz_i)."""
    (v, z), (dv, dz) = primals, tangents
    p = _accurate.softmax(z, axis)
    return _mean(v, z, axis), _accurate.total(p * dv + _accurate.multiply_no_nan(p, _spread(v, z, axis)) * dz, axis)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _spread(v, z, axis):
    """v_i - mean, from distances to the most probable value: for that one minus a sum over the others alone."""
    distance = v - _centre(v, z, axis)
    return distance - _accurate.total(_accurate.multiply_no_nan(_accurate.softmax(z, axis), distance), axis)


@_spread.defjvp
def _spread_jvp(axis, primals, tangents):
    """d (v_i - mean) = dv_i - sum_j p_j dv_j - sum_j p_j (v_j - mean) dz_j."""
    (v, z), (dv, dz) = primals, tangents
    p, spread = _accurate.softmax(z, axis), _spread(v, z, axis)
    return spread, _accurate.centred(p, dv, axis) - _accurate.total(_accurate.multiply_no_nan(p, spread) * dz, axis)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _variance(v, z, axis):
    return _accurate.total(_accurate.multiply_no_nan(_accurate.softmax(z, axis), jnp.square(_spread(v, z, axis))), axis)


@_variance.defjvp
def _variance_jvp(axis, primals, tangents):
    """sum_i p_i (2 (v_i - mean) dv_i + ((v_i - mean)^2 - variance) dz_i)."""
    (v, z), (dv, dz) = primals, tangents
    p, spread, out = _accurate.softmax(z, axis), _spread(v, z, axis), _variance(v, z, axis)
    slope = _accurate.multiply_no_nan(p, jnp.square(spread) - out)
    return out, _accurate.total(2 * _accurate.multiply_no_nan(p, spread) * dv + slope * dz, axis)

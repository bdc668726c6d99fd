"""The Gaussian (normal) distribution of one real number, given by its mean `loc` and standard deviation `scale`.

Its density is exp(-r^2 / 2) / (scale sqrt(2 pi)) with r = (x - loc) / scale, the distance from the mean in standard
deviations. Its negative log-likelihood is squared error divided by 2 scale^2, plus log scale: with a fixed scale,
maximum likelihood is least squares.

A scale is a standard deviation, never a variance: the square of 1e-30 is 0 in float32, and every formula here
standardises before it squares, so that every normal number of the dtype is a scale that works, from the smallest
(1.2e-38 in float32) to the largest (3.4e38). One below may be flushed to 0 by the device, and is then not positive. A
value or gradient is right wherever it is a normal number, up to half the largest. What is undefined is NaN: an infinite
scale, and x - loc where both are the same infinity.

Arguments broadcast against each other. Computed in float32 at least (float64 where an input has it); u is half the
spacing at 1 of that dtype.
"""

import math
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from . import _accurate, _checks


@_checks.public()
def log_prob(
    x: Float[Array, "*#shape"],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] | None = None,
    *,
    log_scale: float | Float[Array, "*#shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Log-density -r^2 / 2 - log scale - log(2 pi) / 2 with r = (x - loc) / scale.

    Gradients: -r / scale in x, r / scale in loc, (r^2 - 1) / scale in scale, r^2 - 1 in log_scale.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive and finite, in the unit of x; 1 where neither it nor `log_scale` is given.
      log_scale: its logarithm, of at most 170 either way: the form for a network that predicts the scale.

    Returns:
      The log-density (in nats, per unit of x) in the shape all arguments broadcast to, at least float32; -inf at
      x = +-inf; NaN for a scale that is not positive and finite. Error at most 8 u of |r^2 / 2| + |log scale| +
      log(2 pi) / 2, since a log-density may pass through 0; of each gradient entry 8 u of itself, also that of r^2 - 1
      near one standard deviation, where the digits that x - loc rounds off come back. With `log_scale`, both
      (8 + |log_scale|) u, but for r^2 - 1: relative to r^2 + 1.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or both scale and log_scale are given.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 1.2.4.

    >>> print(f"{log_prob(jnp.array(0.0)):.6f}")
    -0.918939
    >>> print(f"{log_prob(jnp.array(1e-30), 0.0, 1e-30):.4f}")
    67.6586
    """
    x, loc, spread = _given("log_prob", x, loc, scale, log_scale)
    return _log_prob(x, loc, spread) if log_scale is None else _log_prob_log_scale(x - loc, spread)


_HALF_LOG_2PI = math.log(2 * math.pi) / 2


@jax.custom_jvp
def _log_prob(x, loc, scale):
    """-r^2 / 2 - log scale - log(2 pi) / 2, r = (x - loc) / scale."""
    _, unit_scale, a, b = _in_units(scale, x, loc)
    return -jnp.square((a - b) / unit_scale) / 2 - jnp.log(scale) - _HALF_LOG_2PI


@_log_prob.defjvp
def _log_prob_jvp(primals, tangents):
    """-(r / scale) (d x - d loc) + ((r^2 - 1) / scale) d scale."""
    (x, loc, scale), (d_x, d_loc, d_scale) = primals, tangents
    unit, scale, x, loc = _in_units(scale, x, loc)
    # Times the inverse: XLA turns a division of a quotient into one by scale * scale, which leaves the dtype's range.
    inverse = 1 / scale
    below, above = _distances(x, loc, scale)
    slope = -((x - loc) / scale * inverse) * (d_x - d_loc) + below * (above * inverse) * d_scale
    return _log_prob(*primals), slope * unit


@jax.custom_jvp
def _log_prob_log_scale(offset, log_scale):
    return -jnp.square(_over_scale(offset, log_scale)) / 2 - log_scale - _HALF_LOG_2PI


def _over_scale(x, log_scale):
    """x / scale in two steps: exp(-log_scale) itself leaves float32 at 88, where 0 / scale is still 0."""
    half = jnp.exp(-log_scale / 2)
    return x * half * half


@_log_prob_log_scale.defjvp
def _log_prob_log_scale_jvp(primals, tangents):
    """-(r / scale) d offset + (r - 1) (r + 1) d log_scale, r = offset / scale."""
    (offset, log_scale), (d_offset, d_log_scale) = primals, tangents
    r = _over_scale(offset, log_scale)
    slope = -_over_scale(r, log_scale) * d_offset + (r - 1) * (r + 1) * d_log_scale
    return _log_prob_log_scale(offset, log_scale), slope


class Parameters(NamedTuple):
    """What a Gaussian is given by."""

    loc: Array  # mean
    scale: Array  # standard deviation


@_checks.public()
def prob(
    x: Float[Array, "*#shape"],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] | None = None,
    *,
    log_scale: float | Float[Array, "*#shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Density exp(-r^2 / 2) / (scale sqrt(2 pi)) with r = (x - loc) / scale.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive and finite, in the unit of x; 1 where neither it nor `log_scale` is given.
      log_scale: its logarithm, of at most 170 either way.

    Returns:
      The density (per unit of x; it may exceed 1) in the shape all arguments broadcast to, at least float32; 0, with
      gradient 0, at x = +-inf (with `scale`, in float32 from r = 18.6 on); NaN for a scale that is not positive and
      finite. Relative error at most (16 + 3 r^2) u, and with `log_scale` (16 + 4 |log_scale|) (1 + r^2) u: the
      exponential turns the rounding of r into one of that size. So for each gradient entry; with `log_scale` that of
      log_scale is relative to (r^2 + 1) times the density. Where the density overflows it is inf, and its gradient
      inf, of either sign, or 0.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or both scale and log_scale are given.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 1.2.4.

    >>> print(f"{prob(jnp.array(0.0)):.4f}")
    0.3989
    """
    x, loc, spread = _given("prob", x, loc, scale, log_scale)
    if log_scale is not None:
        return _prob_log_scale(x - loc, spread)
    unit, spread, x, loc = _in_units(spread, x, loc)
    return _prob(x, loc, spread) * unit


@_checks.public()
def cdf(
    x: Float[Array, "*#shape"],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] = 1.0,
) -> Float[Array, "*shape"]:
    """Probability Phi(r) = erfc(-r / sqrt 2) / 2 of a value at most x, with r = (x - loc) / scale.

    The probability of a value above x is `cdf(loc - x, 0, scale)`, with all its digits.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive and finite, in the unit of x.

    Returns:
      A probability in the shape all arguments broadcast to, at least float32: 0 at -inf, 1 at inf, NaN for an invalid
      scale. Relative error at most (16 + 3 r^2) u on the lower side, 16 u on the upper; so for the gradient,
      the density, on both sides. Below 1e-38 (r = -12.9) float32 has no normal number: use `log_cdf`.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    Source: Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.2.

    >>> print(cdf(jnp.array([-jnp.inf, 0.0, jnp.inf])))
    [0.  0.5 1. ]
    """
    x, loc, scale = _given("cdf", x, loc, scale)
    _, scale, x, loc = _in_units(scale, x, loc)
    return _cdf(x - loc, scale)


@_checks.public()
def log_cdf(
    x: Float[Array, "*#shape"],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] = 1.0,
) -> Float[Array, "*shape"]:
    """Log-probability log Phi(r) of a value at most x, with r = (x - loc) / scale.

    Far below the mean it is -r^2 / 2 - log(-r sqrt(2 pi)) and a little less; far above it is minus the probability of
    a value above x. The gradient is the density divided by Phi, near -r / scale in the lower tail.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive and finite, in the unit of x.

    Returns:
      A log-probability in nats, never positive, in the shape all arguments broadcast to, at least float32: -inf at
      -inf, 0 at inf, NaN for an invalid scale. Relative error at most 16 u on the lower side (also 1e18
      standard deviations below the mean), (16 + 3 r^2) u on the upper; the gradient likewise, with 48 u on the lower.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    Source: the continued fraction of Laplace, Abramowitz and Stegun (1964), 26.2.14.

    >>> print(f"{log_cdf(jnp.array(-30.0)):.4f}")
    -454.3213
    """
    x, loc, scale = _given("log_cdf", x, loc, scale)
    _, scale, x, loc = _in_units(scale, x, loc)
    return _log_cdf(x - loc, scale)


@_checks.public()
def quantile(
    q: Float[Array, "*#shape"],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] = 1.0,
) -> Float[Array, "*shape"]:
    """The value that is not exceeded with probability q: the inverse of `cdf`.

    The gradient in q is 1 / density. For an upper tail probability p below u use the mirror image,
    `2 * loc - quantile(p, loc, scale)`: 1 - p is rounded to 1.

    Args:
      q: probability in [0, 1], floating-point.
      loc: mean.
      scale: standard deviation, positive and finite, in the unit of loc.

    Returns:
      A value in the unit of loc, in the shape all arguments broadcast to, at least float32: -inf at q = 0, inf at
      q = 1; NaN for q outside [0, 1] or an invalid scale. Error at most 16 u of |loc| + |value - loc|; of the gradient
      in q at most 32 u of itself, in every tail.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    Source: Moshier, Cephes Mathematical Library, ndtri.

    >>> print(f"{quantile(jnp.array(0.975)):.4f}")
    1.9600
    """
    q, loc, scale = _given("quantile", q, loc, scale, name="q")
    inside = (q >= 0) & (q <= 1)
    _checks.expect(inside, q, "quantile: q {value} is outside [0, 1]")
    return loc + scale * _quantile(_accurate.nan_unless(inside, q))


@_checks.public()
def interval_prob(
    low: Float[Array, "*#shape"],
    high: Float[Array, "*#shape"],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] = 1.0,
) -> Float[Array, "*shape"]:
    """Probability of a value between low and high: 68 %, 95 %, 99.7 % within 1, 2, 3 standard deviations of the mean.

    `cdf(high) - cdf(low)` would lose every digit above the mean and for a narrow interval. Here a narrow interval is
    its width times the mean density in it, and a wide one is a difference on the side where both terms are small.

    Args:
      low: lower end, floating-point; -inf for none.
      high: upper end, floating-point, at least `low`; inf for none.
      loc: mean, in the unit of low and high.
      scale: standard deviation, positive and finite, in the same unit.

    Returns:
      A probability in the shape all arguments broadcast to, at least float32, never negative: 0 where low = high; NaN
      where low > high, or for an invalid scale. Relative error at most (24 + 3 r^2) u, r the distance from
      the mean to the nearest point of the interval in standard deviations, however narrow. Gradient: the density at
      high, minus that at low; their difference in loc keeps its digits too.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    >>> print(interval_prob(-jnp.arange(1.0, 4.0), jnp.arange(1.0, 4.0)))
    [0.6826895 0.9544997 0.9973002]
    >>> print(f"{interval_prob(jnp.array(5.0), jnp.array(5.0000005)):.6e}")
    7.089230e-13
    """
    low, high, loc, scale = _given("interval_prob", low, loc, scale, name="low", high=high)
    ordered = ~(low > high)
    _checks.expect(ordered, low, "interval_prob: low {value} is above high")
    _, scale, low, high, loc = _in_units(scale, low, _accurate.nan_unless(ordered, high), loc)
    return _interval_prob(low, high, loc, scale)


@_checks.public()
def entropy(scale: float | Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Differential entropy log scale + (1 + log(2 pi)) / 2, in nats.

    Args:
      scale: standard deviation, positive and finite.

    Returns:
      One value per scale, at least float32, of either sign (it depends on the unit of x); NaN for a scale that is not
      positive and finite. Error at most 4 u of |log scale| + 1.42.

    Raises:
      ValueError: the scale is complex.

    Source: Cover and Thomas (2006), Elements of Information Theory, 8.1.

    >>> print(f"{entropy(1.0):.4f}")
    1.4189
    """
    (scale,) = _checks.broadcast_together("entropy", _accurate.compute_dtype(scale), scale=scale)
    return jnp.log(_positive("entropy", "scale", scale)) + (0.5 + _HALF_LOG_2PI)


@_checks.public()
def kl_divergence(
    p_loc: float | Float[Array, "*#shape"],
    p_scale: float | Float[Array, "*#shape"],
    q_loc: float | Float[Array, "*#shape"],
    q_scale: float | Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """KL(p || q) = (e^(2 d) - 1 - 2 d) / 2 + ((p_loc - q_loc) / q_scale)^2 / 2, d = log(p_scale / q_scale), in nats.

    Args:
      p_loc: mean of p, the distribution that holds.
      p_scale: its standard deviation, positive and finite.
      q_loc: mean of q, the distribution that is believed.
      q_scale: its standard deviation, positive and finite.

    Returns:
      One value per pair, in the shape all arguments broadcast to, at least float32, never negative: 0 where p = q; NaN
      for an invalid scale. Relative error at most 16 u, also where p and q nearly agree: both terms are
      positive, and neither is a difference of close numbers. So for the gradient in loc and p_scale; in q_scale it is
      a sum of two terms, with that error relative to the sum of their magnitudes.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    Source: Kullback and Leibler (1951), Annals of Mathematical Statistics 22(1).

    >>> print(f"{kl_divergence(0.0, 1.0, 1.0, 1.0):.4f}")
    0.5000
    >>> print(f"{kl_divergence(jnp.array(1e-4), 1.0, 0.0, 1.0):.4e}")
    5.0000e-09
    """
    p_loc, p_scale, q_loc, q_scale = _pair("kl_divergence", p_loc, p_scale, q_loc, q_scale)
    _, scale, p_loc, q_loc = _in_units(q_scale, p_loc, q_loc)
    _, _, p_scale, q_scale = _in_units(jnp.minimum(p_scale, q_scale), p_scale, q_scale)
    return _scale_divergence(p_scale, q_scale) + _half_square(p_loc - q_loc, scale)


@_checks.public()
def cross_entropy(
    p_loc: float | Float[Array, "*#shape"],
    p_scale: float | Float[Array, "*#shape"],
    q_loc: float | Float[Array, "*#shape"],
    q_scale: float | Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """Mean of -log q(x) under p, the entropy of p + KL(p || q): what q costs per draw from p, in nats.

    It is log q_scale + log(2 pi) / 2 + ((p_scale / q_scale)^2 + ((p_loc - q_loc) / q_scale)^2) / 2.

    Args:
      p_loc: mean of p, the distribution that holds.
      p_scale: its standard deviation; 0 is a single observation, for which this is `nll`.
      q_loc: mean of q, the distribution that is believed.
      q_scale: its standard deviation, positive and finite.

    Returns:
      One value per pair, in the shape all arguments broadcast to, at least float32, of either sign; NaN for a p_scale
      that is negative or a q_scale that is not positive and finite. Error at most 8 u of the sum of the magnitudes of
      its terms; of the gradient, 16 u likewise, and in q it is 0 exactly where q = p.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    Source: Cover and Thomas (2006), Elements of Information Theory, 8.

    >>> print(f"{cross_entropy(0.0, 1.0, 0.0, 1.0):.4f} {entropy(1.0):.4f}")
    1.4189 1.4189
    """
    p_loc, p_scale, q_loc, q_scale = _pair("cross_entropy", p_loc, p_scale, q_loc, q_scale, p_may_be_0=True)
    unit, q_scale, p_loc, p_scale, q_loc = _in_units(q_scale, p_loc, p_scale, q_loc)
    return _cross_entropy(p_loc - q_loc, p_scale, q_scale) - jnp.log(unit)


@_checks.public(static=("beta",))
def nll(
    x: Float[Array, "*#shape"],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] | None = None,
    *,
    log_scale: float | Float[Array, "*#shape"] | None = None,
    beta: float = 0.0,
) -> Float[Array, "*shape"]:
    """Negative log-likelihood -log_prob times scale^(2 beta), the weight held constant under differentiation.

    With beta = 0 the gradient in loc is -r / scale, so that a network which predicts a large scale where it fits badly
    hardly learns loc there. With beta = 1 it is that of squared error, loc - x, and 0.5 lies between. The optimum is
    the same for every beta, since the weight does not see the gradient.

    Args:
      x: observation, floating-point.
      loc: predicted mean, in the unit of x.
      scale: predicted standard deviation, positive and finite; 1 where neither it nor `log_scale` is given.
      log_scale: its logarithm, of at most 170 either way.
      beta: exponent of the weight, static, in [0, 1].

    Returns:
      One value per observation in nats (times unit^(2 beta)), at least float32, of either sign; inf at x = +-inf; NaN
      for a scale that is not positive and finite. Error at most 8 u of the sum of the magnitudes of the terms of
      `log_prob` (times the weight), and of each gradient entry 8 u of itself; with `log_scale` (8 + |log_scale|) u,
      and that of log_scale relative to r^2 + 1 times the weight. For beta other than 0, 1/2 and 1 it grows by
      8 + 2 |log scale|. Both live where the weight itself is beyond the dtype.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, both scale and log_scale are given, or beta is
        outside [0, 1].

    Source: Seitzer et al. (2022), On the Pitfalls of Heteroscedastic Uncertainty Estimation, ICLR.

    >>> print(f"{nll(jnp.array(3.0), 1.0, 2.0):.4f} {nll(jnp.array(3.0), 1.0, 2.0, beta=0.5):.4f}")
    2.1121 4.2242
    >>> print(jax.grad(lambda loc: nll(jnp.array(3.0), loc, 2.0, beta=1.0))(1.0))
    -2.0
    """
    if not isinstance(beta, int | float) or not 0 <= beta <= 1:
        raise ValueError(f"nll: beta must be in [0, 1], got {beta}")
    x, loc, spread = _given("nll", x, loc, scale, log_scale)
    return _nll(x, loc, spread, beta) if log_scale is None else _nll_log_scale(x - loc, spread, beta)


@_checks.public(static=("axis",))
def fit(x: Float[Array, "*shape"], *, axis: int = -1, weights: Float[Array, "*#shape"] | None = None) -> Parameters:
    """Maximum-likelihood fit: the weighted mean, and the root of the weighted mean square deviation from it.

    The sum of squares is divided by the total weight, not by n - 1: that is where the likelihood is highest.

    Args:
      x: observations, floating-point.
      axis: the axis of the observations; it is summed away.
      weights: how often each counts, not negative, broadcast to the shape of x. One of weight 0 does not count, even
        where it is not finite. Only their ratios matter.

    Returns:
      Parameters(loc, scale), one Gaussian per row, at least float32. Where all observations are equal the scale is 0
      exactly, with gradient 0. Without any weight nothing is determined: NaN, with gradient 0. A negative weight gives
      NaN. With n observations, the error is at most (16 + log2 n) u: of loc relative to |loc| + scale, of scale
      relative to itself, also where |loc| is far larger (then each deviation is an exact difference).

    Raises:
      ValueError: x is not floating-point, `axis` is out of range or empty, or the weights do not broadcast.

    Source: the corrected two-pass algorithm, Chan, Golub and LeVeque (1983), The American Statistician 37(3).

    >>> print(fit(jnp.array([1e4 + 1, 1e4 + 2, 1e4 + 3, 1e4 + 4])))
    Parameters(loc=Array(10002.5, dtype=float32), scale=Array(1.118034, dtype=float32))
    """
    x, w, axis = _weighted("fit", x, axis, weights)
    loc, scale = _fit(x, w, axis)
    none = jnp.where(jnp.sum(w, axis=axis) == 0, jnp.nan, 0)
    return Parameters(jnp.squeeze(loc, axis) + none, jnp.squeeze(scale, axis) + none)


@_checks.public(static=("shape",))
def sample(
    key: Key[Array, ""],
    loc: float | Float[Array, "*#shape"] = 0.0,
    scale: float | Float[Array, "*#shape"] = 1.0,
    *,
    shape: tuple[int, ...] | None = None,
) -> Float[Array, "*shape"]:
    """Draws loc + scale * standard normal noise: differentiable in loc (1) and scale (the noise).

    Args:
      key: a random key. The same key gives the same draws, for one shape and dtype.
      loc: mean.
      scale: standard deviation, not negative.
      shape: of the result, static: it ends in the shape that loc and scale broadcast to, which is the default.

    Returns:
      Independent draws of the given shape, at least float32; NaN for a negative scale. The noise is as exact as
      `jax.random.normal` (it reaches 5.4 standard deviations in float32), and what follows adds 2 u.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or `shape` does not end in theirs.

    >>> print(sample(jax.random.key(0), 5.0, 1e-3, shape=(2, 3)).shape)
    (2, 3)
    """
    loc, scale = _checks.broadcast_together("sample", _accurate.compute_dtype(loc, scale), loc=loc, scale=scale)
    _checks.expect(scale >= 0, scale, "sample: scale {value} is negative")
    shape = _checks.sample_shape("sample", shape, loc.shape, "loc and scale")
    return loc + _accurate.nan_unless(scale >= 0, scale) * jax.random.normal(key, shape, loc.dtype)


def _positive(function, name, scale):
    valid = (scale > 0) & (scale < jnp.inf)
    _checks.expect(valid, scale, f"{function}: {name} {{value}} is not positive and finite")
    return _accurate.nan_unless(valid, scale)


def _given(function, x, loc, scale, log_scale=None, *, name="x", **others):
    """Arguments as arrays of one shape, in the dtype computed in; NaN for a scale that is not positive and finite."""
    if log_scale is not None and scale is not None:
        raise ValueError(f"{function}: expected scale or log_scale, got both")
    _checks.floating(function, **{name: x}, **others)
    spread = {"scale": 1.0 if scale is None else scale} if log_scale is None else {"log_scale": log_scale}
    given = {**others, "loc": loc} | spread
    dtype = _accurate.compute_dtype(x, *given.values())
    *arrays, spread = _checks.broadcast_together(function, dtype, **{name: x}, **given)
    return *arrays, _positive(function, "scale", spread) if log_scale is None else spread


def _in_units(scale, *points):
    """A unit, and the scale and the points times it: nearer to 1 where sums and inverses would leave the range."""
    sizes = [jnp.where(jnp.isinf(point), 0, jnp.abs(point)) for point in points]
    largest = reduce(jnp.maximum, sizes, scale)
    # Points of 2^128 may be as far apart as 2^129; at the other end, so may a difference of two be too small.
    unit = jnp.where(scale > 2.0**64, 2.0**-8, jnp.where(largest < 2.0**-64, 2.0**60, 1)).astype(scale.dtype)
    return unit, scale * unit, *(point * unit for point in points)


def _distances(x, loc, scale):
    """r - 1 and r + 1 with r = (x - loc) / scale, each with all its digits: also with those that x - loc rounds off."""
    offset, lost = _accurate.difference(x, loc)
    lost = jax.lax.stop_gradient(jnp.where(jnp.isfinite(lost), lost, 0))
    return ((offset - scale) + lost) / scale, ((offset + scale) + lost) / scale


def _pair(function, p_loc, p_scale, q_loc, q_scale, p_may_be_0=False):
    given = {"p_loc": p_loc, "p_scale": p_scale, "q_loc": q_loc, "q_scale": q_scale}
    p_loc, p_scale, q_loc, q_scale = _checks.broadcast_together(
        function, _accurate.compute_dtype(*given.values()), **given
    )
    if p_may_be_0:
        _checks.expect(p_scale >= 0, p_scale, f"{function}: p_scale {{value}} is negative")
        p_scale = _accurate.nan_unless(p_scale >= 0, p_scale)
    else:
        p_scale = _positive(function, "p_scale", p_scale)
    return p_loc, p_scale, q_loc, _positive(function, "q_scale", q_scale)


def _weighted(function, x, axis, weights):
    """Observations and weights in the dtype computed in, and the axis from the front."""
    _checks.floating(function, x=x)
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim or x.shape[axis] == 0:
        raise ValueError(f"{function}: axis must be an axis of x {_checks.describe(x)} that is not empty, got {axis!r}")
    axis %= x.ndim
    if weights is None:
        x = x.astype(_accurate.compute_dtype(x))
        return x, jnp.ones_like(x), axis
    _checks.floating(function, weights=weights)
    dtype = _accurate.compute_dtype(x, weights)
    if weights.ndim > x.ndim or jnp.broadcast_shapes(weights.shape, x.shape) != x.shape:
        raise ValueError(f"{function}: weights must broadcast to {list(x.shape)} of x, got {_checks.describe(weights)}")
    _checks.expect(weights >= 0, weights, f"{function}: weight {{value}} is negative")
    w = jnp.broadcast_to(weights, x.shape).astype(dtype)
    w = _accurate.nan_unless(w >= 0, w)
    x = x.astype(dtype)
    # 0 * inf is NaN: what has no weight must not be seen.
    return jnp.where((w == 0) & ~jnp.isfinite(x), 0, x), w, axis


def _densities(offset, scale):
    """p and p r for the density p at r = offset / scale."""
    # Where r is infinite the density is 0 with slope 0, and 0 * inf is NaN.
    infinite = jnp.isinf(offset / scale)
    r = _accurate.divide(jnp.where(infinite, 0, offset), scale)
    # Half of the exponential at a time: at a scale of 1e-30 the density is normal where exp(-r^2 / 2) is not.
    half = jnp.where(infinite, 0, jnp.exp(-jnp.square(r) / 4))
    rest = half * (1 / scale) * math.exp(-_HALF_LOG_2PI)
    return half * rest, half * r * rest


@jax.custom_jvp
def _prob(x, loc, scale):
    """exp(-r^2 / 2) / (scale sqrt(2 pi)), r = (x - loc) / scale."""
    return _densities(x - loc, scale)[0]


@_prob.defjvp
def _prob_jvp(primals, tangents):
    """p ((r^2 - 1) d scale - r (d x - d loc)) / scale."""
    (x, loc, scale), (d_x, d_loc, d_scale) = primals, tangents
    half = jnp.exp(-jnp.square(_accurate.divide(x - loc, scale)) / 4)
    x = jnp.where(half == 0, loc, x)
    inverse = 1 / scale
    rest = half * inverse * math.exp(-_HALF_LOG_2PI)
    below, above = _distances(x, loc, scale)
    toward = half * ((x - loc) * inverse) * inverse * rest
    away = half * (below * above) * inverse * rest
    return _prob(*primals), away * d_scale - toward * (d_x - d_loc)


@jax.custom_jvp
def _prob_log_scale(offset, log_scale):
    return jnp.exp(-jnp.square(_over_scale(offset, log_scale)) / 2 - log_scale - _HALF_LOG_2PI)


@_prob_log_scale.defjvp
def _prob_log_scale_jvp(primals, tangents):
    """p ((r^2 - 1) d log_scale - (r / scale) d offset)."""
    (offset, log_scale), (d_offset, d_log_scale) = primals, tangents
    r = _over_scale(offset, log_scale)
    # The square root of p and the fourth of p / scale: beside them a factor of 0 stays 0 where p itself is inf.
    root = jnp.exp((-jnp.square(r) / 2 - log_scale - _HALF_LOG_2PI) / 2)
    steep = jnp.exp((-jnp.square(r) / 2 - 2 * log_scale - _HALF_LOG_2PI) / 4)
    r = jnp.where(steep + root == 0, 0, r)
    toward = r * steep * steep * steep * steep
    slope = (root * (r - 1)) * (root * (r + 1)) * d_log_scale - toward * d_offset
    return _prob_log_scale(offset, log_scale), slope


@jax.custom_jvp
def _cdf(offset, scale):
    return jax.scipy.special.erfc(-(offset / scale) * math.sqrt(0.5)) / 2


@_cdf.defjvp
def _cdf_jvp(primals, tangents):
    """p (d offset - r d scale), p the density."""
    (offset, scale), (d_offset, d_scale) = primals, tangents
    p, p_r = _densities(offset, scale)
    return _cdf(offset, scale), p * d_offset - p_r * d_scale


# From here on down, log Phi and the slope of it come from the continued fraction; nearer, from erfc.
_TAIL = -4.0


def _near_hazard(r):
    """phi(r) / Phi(r) by its definition, down to the tail."""
    near = jnp.maximum(r, _TAIL)
    density = jnp.exp(-jnp.square(near) / 2 - _HALF_LOG_2PI)
    return density / (jax.scipy.special.erfc(-near * math.sqrt(0.5)) / 2)


def _hazard_excess(r):
    """h + r of the hazard h = phi(r) / Phi(r), the slope of log Phi: near 1 / |r| far below 0.

    With x = -r, h = x + 1 / (x + 2 / (x + 3 / (x + ...))). The fraction is written in 1 / x^2, so that no x overflows.
    """
    inverse = 1 / jnp.maximum(-r, -_TAIL)
    square = jnp.square(inverse)
    tail = jnp.ones_like(r)
    for n in range(40 if r.dtype == jnp.float64 else 12, 1, -1):
        tail = 1 + n * square / tail
    return jnp.where(r < _TAIL, inverse / tail, _near_hazard(r) + jnp.minimum(r, jnp.finfo(r.dtype).max))


@jax.custom_jvp
def _hazard(r):
    """phi(r) / Phi(r). The derivative is -h (h + r)."""
    return jnp.where(r < _TAIL, _hazard_excess(jnp.minimum(r, _TAIL)) - r, _near_hazard(r))


@_hazard.defjvp
def _hazard_jvp(primals, tangents):
    (r,), (dr,) = primals, tangents
    hazard = _hazard(r)
    return hazard, -hazard * _excess_hazard(r) * dr


@jax.custom_jvp
def _excess_hazard(r):
    return _hazard_excess(r)


@_excess_hazard.defjvp
def _excess_hazard_jvp(primals, tangents):
    """d (h + r) = (1 - h (h + r)) dr."""
    (r,), (dr,) = primals, tangents
    excess = _excess_hazard(r)
    return excess, (1 - _hazard(r) * excess) * dr


@jax.custom_jvp
def _log_cdf(offset, scale):
    """log Phi(r): of the complement well above 0, through the hazard in the lower tail."""
    r = offset / scale
    upper = jnp.log1p(-jax.scipy.special.erfc(jnp.maximum(r, 0) * math.sqrt(0.5)) / 2)
    lower = jnp.log(jax.scipy.special.erfc(-jnp.maximum(r, _TAIL) * math.sqrt(0.5)) / 2)
    # -r^2 / 2 - log h - log(2 pi) / 2: h is at least 4 here, so that all terms have one sign.
    tail = -jnp.square(r) / 2 - jnp.log(_hazard(jnp.minimum(r, _TAIL))) - _HALF_LOG_2PI
    # Not from 0 on: between -0.42 and -0.36 XLA's float64 log1p errs by 240 u.
    return jnp.where(r < _TAIL, tail, jnp.where(r < 0.6, lower, upper))


@_log_cdf.defjvp
def _log_cdf_jvp(primals, tangents):
    """h (d offset - r d scale) / scale; above 0, where h may be below the smallest number, from the density."""
    (offset, scale), (d_offset, d_scale) = primals, tangents
    above = offset > 0
    p, p_r = _densities(jnp.where(above, offset, 0), scale)
    r = _accurate.divide(jnp.where(above, 0, offset), scale)
    hazard = _hazard(r) * (1 / scale)
    total = _cdf(jnp.where(above, offset, 0), scale)
    upper = (p * d_offset - p_r * d_scale) / total
    return _log_cdf(offset, scale), jnp.where(above, upper, hazard * d_offset - hazard * r * d_scale)


@jax.custom_jvp
def _quantile(q):
    return jax.scipy.special.ndtri(q)


@_quantile.defjvp
def _quantile_jvp(primals, tangents):
    """dq / phi(r), with phi = q h of the hazard h: exp(r^2 / 2) would turn the rounding of r into r^2 times as much."""
    (q,), (dq,) = primals, tangents
    r, tail = _quantile(q), jnp.minimum(q, 1 - q)
    return r, dq / (tail * _hazard(jnp.where(tail > 0, -jnp.abs(r), 0)))


def _mean_density(middle, width):
    """Mean over s in [-1/2, 1/2] of exp(-(middle width s + (width s)^2 / 2)), by the rule of Gauss and Legendre."""
    nodes, node_weights = np.polynomial.legendre.leggauss(10 if middle.dtype == jnp.float64 else 6)
    step = [width * (node / 2) for node in nodes.tolist()]
    terms = [w / 2 * jnp.exp(-s * (middle + s / 2)) for w, s in zip(node_weights.tolist(), step, strict=True)]
    return sum(terms[1:], terms[0])


@jax.custom_jvp
def _interval_prob(low, high, loc, scale):
    a, b = (low - loc) / scale, (high - loc) / scale
    # Mirrored, so that the end nearer to the mean, if both are on one side, is a.
    a, b = jnp.where(a > 0, a, -b), jnp.where(a > 0, b, -a)
    width = (high - low) / scale
    middle = a + width / 2
    narrow = width * jnp.maximum(1, jnp.abs(middle)) <= 2
    erf, erfc, root = jax.scipy.special.erf, jax.scipy.special.erfc, math.sqrt(0.5)
    wide = jnp.where(a < 0, erf(b * root) - erf(a * root), erfc(a * root) - erfc(b * root)) / 2
    density = jnp.exp(-jnp.square(middle) / 2 - _HALF_LOG_2PI)
    return jnp.where(narrow, density * width * _mean_density(middle, width), wide)


@_interval_prob.defjvp
def _interval_prob_jvp(primals, tangents):
    """p_high d high - p_low d low - (p_high - p_low) d loc - (b p_high - a p_low) d scale, p the density at an end.

    p_high - p_low = p_low expm1(-(b^2 - a^2) / 2), from the higher of the two, where they are close.
    """
    (low, high, loc, scale), (d_low, d_high, d_loc, d_scale) = primals, tangents
    p_low, p_high = _prob(low, loc, scale), _prob(high, loc, scale)
    low, high = jnp.where(p_low == 0, loc, low), jnp.where(p_high == 0, loc, high)
    a, b = _accurate.divide(low - loc, scale), _accurate.divide(high - loc, scale)
    width = _accurate.divide(high - low, scale)
    exponent = width * (a + width / 2)
    close = (p_low > 0) & (p_high > 0) & (jnp.abs(exponent) < 1)
    exponent = jnp.where(close, exponent, 0)
    near = jnp.where(exponent > 0, p_low * jnp.expm1(-exponent), -p_high * jnp.expm1(exponent))
    drop = jnp.where(close, near, p_high - p_low)
    stretch = jnp.where(close, a * drop + width * p_high, b * p_high - a * p_low)
    slope = p_high * d_high - p_low * d_low - drop * d_loc - stretch * d_scale
    return _interval_prob(*primals), slope


@jax.custom_jvp
def _half_square(offset, scale):
    return jnp.square(offset / scale) / 2


@_half_square.defjvp
def _half_square_jvp(primals, tangents):
    """r (d offset - r d scale) / scale, r = offset / scale."""
    (offset, scale), (d_offset, d_scale) = primals, tangents
    # The inverse, since XLA would make offset / scale / scale the quotient by a square, which leaves the range.
    inverse = 1 / scale
    r = offset * inverse
    return _half_square(offset, scale), r * inverse * d_offset - r * (r * inverse) * d_scale


@jax.custom_jvp
def _scale_divergence(p, q):
    """(e^(2 d) - 1 - 2 d) / 2 with d = log(p / q)."""
    ratio, (below, above) = p / q, _distances(p, 0, q)
    near = jnp.abs(below) < 0.2
    d = jnp.log1p(jnp.where(near, below, 0))
    usable = (ratio > jnp.finfo(p.dtype).tiny) & (ratio < jnp.finfo(p.dtype).max)
    far = jnp.where(usable, jnp.log(ratio), jnp.log(p) - jnp.log(q))
    return jnp.where(near, _accurate.exp_remainder(2 * d) / 2, below * above / 2 - far)


@_scale_divergence.defjvp
def _scale_divergence_jvp(primals, tangents):
    """((p / q)^2 - 1) (d p / p - d q / q)."""
    (p, q), (dp, dq) = primals, tangents
    below, above = _distances(p, 0, q)
    # ((p / q)^2 - 1) / p without the square: it overflows for a narrow q where the quotient does not.
    slope = below * (above * (1 / p)) * dp - below * (above * (1 / q)) * dq
    return _scale_divergence(p, q), slope


@jax.custom_jvp
def _cross_entropy(offset, p_scale, q_scale):
    squares = jnp.square(p_scale / q_scale) + jnp.square(offset / q_scale)
    return squares / 2 + jnp.log(q_scale) + _HALF_LOG_2PI


@_cross_entropy.defjvp
def _cross_entropy_jvp(primals, tangents):
    """(offset d offset + p d p) / q^2 - ((p / q)^2 - 1 + (offset / q)^2) d q / q."""
    (offset, p, q), (d_offset, dp, dq) = primals, tangents
    inverse, (below, above) = 1 / q, _distances(p, 0, q)
    r = offset * inverse
    slope = (r * inverse) * d_offset + (p * inverse * inverse) * dp - (below * above + r * r) * inverse * dq
    return _cross_entropy(offset, p, q), slope


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _nll(x, loc, scale, beta):
    """(r scale^beta)^2 / 2 + scale^(2 beta) (log scale + log(2 pi) / 2): r^2 may be infinite where the first is not."""
    _, unit_scale, a, b = _in_units(scale, x, loc)
    r = (a - b) / unit_scale
    return jnp.square(r * scale**beta) / 2 + scale ** (2 * beta) * (jnp.log(scale) + _HALF_LOG_2PI)


@_nll.defjvp
def _nll_jvp(beta, primals, tangents):
    """scale^(2 beta - 1) (r (d x - d loc) - (r^2 - 1) d scale), the power constant but for the -1."""
    (x, loc, scale), (d_x, d_loc, d_scale) = primals, tangents
    unit, scale, x, loc = _in_units(scale, x, loc)
    fixed = jax.lax.stop_gradient(scale)
    weight = fixed ** (2 * beta - 1) * _accurate.divide(fixed, scale)
    below, above = _distances(x, loc, scale)
    slope = weight * _accurate.divide(x - loc, scale) * (d_x - d_loc) - (weight * below) * above * d_scale
    slope *= unit ** (1 - 2 * beta)
    return _nll(*primals, beta), slope


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _nll_log_scale(offset, log_scale, beta):
    r, weight = _over_scale(offset, (1 - beta) * log_scale), -2 * beta * log_scale
    return jnp.square(r) / 2 + _over_scale(log_scale + _HALF_LOG_2PI, weight)


@_nll_log_scale.defjvp
def _nll_log_scale_jvp(beta, primals, tangents):
    """scale^(2 beta) ((r / scale) d offset - (r^2 - 1) d log_scale), the power constant."""
    (offset, log_scale), (d_offset, d_log_scale) = primals, tangents
    fixed = beta * jax.lax.stop_gradient(log_scale)
    # r and 1 times scale^beta.
    r, one = _over_scale(offset, log_scale - fixed), jnp.exp(fixed)
    slope = _over_scale(r, log_scale - fixed) * d_offset - (r - one) * (r + one) * d_log_scale
    return _nll_log_scale(offset, log_scale, beta), slope


def _deviations(x, w, axis):
    """Shares w / sum w (0 where no weight is), the mean, and the deviations from it before it is rounded."""
    total = jnp.sum(w, axis=axis, keepdims=True)
    share = w / jnp.where(total == 0, 1, total)
    rough = jnp.sum(share * x, axis=axis, keepdims=True)
    deviation = x - rough
    rest = jnp.sum(share * deviation, axis=axis, keepdims=True)
    return share, rough + rest, deviation - rest


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _fit(x, w, axis):
    share, loc, deviation = _deviations(x, w, axis)
    # In units of the largest: the square of 1e-30 is 0.
    unit = jnp.max(jnp.where(w == 0, 0, jnp.abs(deviation)), axis=axis, keepdims=True)
    scaled = deviation / jnp.where(unit == 0, 1, unit)
    return loc, unit * jnp.sqrt(jnp.sum(_accurate.weigh(share, jnp.square(scaled)), axis=axis, keepdims=True))


@_fit.defjvp
def _fit_jvp(axis, primals, tangents):
    """d loc = sum_i share_i dx_i + (x_i - loc) dw_i / W, with W the sum of the weights.

    d scale = sum_i share_i z_i dx_i + scale (z_i^2 - 1) dw_i / (2 W).
    z_i = (x_i - loc) / scale, and 0 where the scale is 0: there it has a corner, whose slopes have the mean 0.
    """
    (x, w), (dx, dw) = primals, tangents
    loc, scale = _fit(x, w, axis)
    share, _, deviation = _deviations(x, w, axis)
    total = jnp.sum(w, axis=axis, keepdims=True)
    dw = dw / jnp.where(total == 0, 1, total)
    spread = scale > 0
    z = jnp.where(spread, _accurate.divide(deviation, jnp.where(spread, scale, 1)), 0)
    d_loc = jnp.sum(share * dx + deviation * dw, axis=axis, keepdims=True)
    d_scale = jnp.sum(share * z * dx + scale * (z - 1) * (z + 1) / 2 * dw, axis=axis, keepdims=True)
    return (loc, scale), (d_loc, d_scale)

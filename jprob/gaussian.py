"""The Gaussian (normal) distribution of one real number, given by its mean `loc` and standard deviation `scale`.

Its density is exp(-r^2 / 2) / (scale sqrt(2 pi)) with r = (x - loc) / scale. r is the distance from the mean in
standard deviations. Its negative log-likelihood is squared error divided by 2 scale^2, plus log scale: with a fixed
scale, maximum likelihood is least squares.

A scale is a standard deviation, never a variance: the square of 1e-30 is 0 in float32. Every normal number of the dtype
works as a scale, from the smallest (1.2e-38 in float32) to the largest (3.4e38). A smaller one counts as 0, and is not
positive. A value or gradient is right wherever it is a normal number, up to half the largest.

Arguments broadcast as numpy's do. The result has the shape of one of them, unless all of them but plain numbers have
equally many axes. [3] and [3, 1] are refused; write an outer product as [n, 1] and [1, m].

An invalid scale gives NaN, as does x - loc where both are the same infinity. No such row has a NaN gradient: it is 0
there, and finite for infinite x. So `jnp.where(mask, loss, 0)` is safe for any values in the masked rows.

Computed in float32 at least (float64 where an input has it); u is half the spacing at 1 of that dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key, Real

from . import _accurate, _checks, _gaussian, _weights

_Points = Float[Array, "*#shape"]  # one per example
_Numbers = float | Real[Array, "*#shape"]  # one per example, or one for all of them


class Parameters(NamedTuple):
    """The parameters of a Gaussian."""

    loc: Array  # mean
    scale: Array  # standard deviation


@_checks.public()
def log_prob(
    x: _Points, loc: _Numbers = 0.0, scale: _Numbers | None = None, *, log_scale: _Numbers | None = None
) -> Float[Array, "*shape"]:
    """Log-density -r^2 / 2 - log scale - log(2 pi) / 2 with r = (x - loc) / scale.

    Gradients: -r / scale in x, r / scale in loc, (r^2 - 1) / scale in scale; r^2 - 1 in log_scale.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive and finite, in the unit of x; 1 where neither it nor `log_scale` is given.
      log_scale: its logarithm, the form for a network that predicts the scale. Beyond 87 either way (708 in float64), r
        is that of the nearest scale in the range. So the gradient leads back.

    Returns:
      The log-density (in nats, per unit of x) in the shape all arguments broadcast to, at least float32; -inf at
      x = +-inf; NaN for a scale that is not positive and finite. Error at most 8 u of the sum of the terms'
      magnitudes: a log-density may pass through 0. Each gradient entry has 8 u of itself. So has r^2 - 1 near one
      standard deviation, where the digits that x - loc rounds off come back. `log_scale` makes both
      (8 + |log_scale|) u, and that of r^2 - 1 relative to r^2 + 1. At x = +-inf the gradient is that of -log scale
      alone.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or both scale and log_scale are given.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 1.2.4.

    >>> print(f"{log_prob(jnp.array(0.0)):.6f}")
    -0.918939
    >>> print(f"{log_prob(jnp.array(1e-30), 0.0, 1e-30):.4f}")
    67.6586
    """
    *given, ok, _ = _given("log_prob", scale, log_scale, loc, x=x)
    return _accurate.nan_unless(ok, _gaussian.log_prob(*given))


@_checks.public()
def prob(
    x: _Points, loc: _Numbers = 0.0, scale: _Numbers | None = None, *, log_scale: _Numbers | None = None
) -> Float[Array, "*shape"]:
    """Probability density exp(-r^2 / 2) / (scale sqrt(2 pi)) with r = (x - loc) / scale.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive and finite, in the unit of x; 1 where neither it nor `log_scale` is given.
      log_scale: its logarithm, as in `log_prob`.

    Returns:
      The density (per unit of x; it may exceed 1) in the shape all arguments broadcast to, at least float32; 0, with
      gradient 0, at x = +-inf (with `scale`, in float32 from r = 18.6 on); NaN for a scale that is not positive and
      finite. Relative error at most (16 + 3 r^2) u, and with `log_scale` (16 + 4 |log_scale|) (1 + r^2) u: the
      exponential turns the rounding of r into one of that size. So for each gradient entry; with `log_scale` that of
      log_scale is relative to (r^2 + 1) times the density.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or both scale and log_scale are given.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, 1.2.4.

    >>> print(f"{prob(jnp.array(0.0)):.4f}")
    0.3989
    """
    *given, ok, unit = _given("prob", scale, log_scale, loc, x=x)
    return _accurate.nan_unless(ok, _gaussian.prob(*given) * unit)


@_checks.public()
def cdf(x: _Points, loc: _Numbers = 0.0, scale: _Numbers = 1.0) -> Float[Array, "*shape"]:
    """Cumulative distribution function Phi(r) = erfc(-r / sqrt 2) / 2 with r = (x - loc) / scale.

    This is the probability of a value at most x.

    The probability of a value above x is `cdf(loc - x, 0, scale)`, with all its digits.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive and finite, in the unit of x.

    Returns:
      A probability in the shape all arguments broadcast to, at least float32: 0 at -inf, 1 at inf, NaN for an invalid
      scale. Relative error at most (16 + 3 r^2) u on the lower side, 16 u on the upper. The same holds for the
      gradient, which is the density, on both sides. Below 1e-38 (r = -12.9) float32 has no normal number: use
      `log_cdf`.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    Source: Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.2.

    >>> print(cdf(jnp.array([-jnp.inf, 0.0, jnp.inf])))
    [0.  0.5 1. ]
    """
    x, loc, scale, _, ok, _ = _given("cdf", scale, None, loc, x=x)
    return _accurate.nan_unless(ok, _gaussian.cdf(x - loc, scale))


@_checks.public()
def log_cdf(x: _Points, loc: _Numbers = 0.0, scale: _Numbers = 1.0) -> Float[Array, "*shape"]:
    """Logarithm of the cumulative distribution function, log Phi(r) with r = (x - loc) / scale.

    Far below the mean it is a little less than -r^2 / 2 - log(-r sqrt(2 pi)). Far above the mean it is minus the
    probability of a value above x. The gradient is the density divided by Phi, near -r / scale in the lower tail.

    Args:
      x: where to evaluate, floating-point.
      loc: mean, in the unit of x.
      scale: standard deviation, positive and finite, in the unit of x.

    Returns:
      A log-probability in nats, never positive, in the shape all arguments broadcast to, at least float32: -inf at
      -inf, 0 at inf, NaN for an invalid scale. Relative error at most 16 u on the lower side, also 1e18 standard
      deviations below the mean; (16 + 3 r^2) u on the upper. The gradient likewise, with 48 u on the lower.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    Source: the continued fraction of Laplace, Abramowitz and Stegun (1964), 26.2.14.

    >>> print(f"{log_cdf(jnp.array(-30.0)):.4f}")
    -454.3213
    """
    x, loc, scale, _, ok, _ = _given("log_cdf", scale, None, loc, x=x)
    return _accurate.nan_unless(ok, _gaussian.log_cdf(x - loc, scale))


@_checks.public()
def quantile(q: _Points, loc: _Numbers = 0.0, scale: _Numbers = 1.0) -> Float[Array, "*shape"]:
    """Quantile: the value that is not exceeded with probability q, the inverse of `cdf`.

    The gradient in q is 1 / density. For an upper tail probability p below u, 1 - p is rounded to 1. Use the mirror
    image `2 * loc - quantile(p, loc, scale)` there.

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
    _checks.floating("quantile", q=q)
    q, loc, scale = _checks.broadcast_together("quantile", q=q, loc=loc, scale=scale)
    scale, _, ok = _valid("quantile", "scale", scale)
    possible, inside = (q >= 0) & (q <= 1), (q > 0) & (q < 1)
    _checks.expect(possible, q, "quantile: q {value} is outside [0, 1]")
    value = loc + scale * _gaussian.quantile(jnp.where(inside, q, 0.5))
    return _accurate.nan_unless(ok & possible, jnp.where(inside, value, jnp.where(q < 0.5, -jnp.inf, jnp.inf)))


@_checks.public()
def interval_prob(low: _Points, high: _Points, loc: _Numbers = 0.0, scale: _Numbers = 1.0) -> Float[Array, "*shape"]:
    """Probability of a value between low and high: 68 %, 95 %, 99.7 % within 1, 2, 3 standard deviations of the mean.

    `cdf(high) - cdf(low)` would lose every digit above the mean and for a narrow interval. Here a narrow interval is
    its width times the mean density in it. A wide one is a difference on the side where both terms are small.

    Args:
      low: lower end, floating-point; -inf for none.
      high: upper end, floating-point, at least `low`; inf for none.
      loc: mean, in the unit of low and high.
      scale: standard deviation, positive and finite, in the same unit.

    Returns:
      A probability in the shape all arguments broadcast to, at least float32, never negative: 0 where low = high; NaN
      where low > high, or for an invalid scale. Relative error at most (24 + 3 r^2) u, however narrow the interval. r
      is the distance from the mean to its nearest point in standard deviations. Gradient: the density at high, minus
      that at low; their difference in loc keeps its digits too.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    >>> print(interval_prob(-jnp.arange(1.0, 4.0), jnp.arange(1.0, 4.0)))
    [0.6826895 0.9544997 0.9973002]
    >>> print(f"{interval_prob(jnp.array(5.0), jnp.array(5.0000005)):.6e}")
    7.089230e-13
    """
    given, ok = _interval("interval_prob", low, high, loc, scale)
    return _accurate.nan_unless(ok, _gaussian.interval_prob(*given))


@_checks.public()
def log_interval_prob(
    low: _Points, high: _Points, loc: _Numbers = 0.0, scale: _Numbers = 1.0
) -> Float[Array, "*shape"]:
    """Log-probability of a value between low and high: exact in both tails, however far, narrow or wide.

    This is the likelihood of an observation that is known up to an interval: censored, rounded or binned. The gradient
    in an end is the density there divided by the probability. A gradient in a tail is near the distance from the mean.

    Args:
      low: lower end, floating-point; -inf for none.
      high: upper end, floating-point, at least `low`; inf for none.
      loc: mean, in the unit of low and high.
      scale: standard deviation, positive and finite, in the same unit.

    Returns:
      A log-probability in nats, never positive, in the shape of the broadcast arguments, at least float32: -inf with
      gradient 0 if low = high; NaN if low > high, or for an invalid scale. Relative error at most 24 u; (24 + 3 r^2) u
      if the interval contains the mean, r the distance of its nearer end.

      A gradient entry has an error of (24 + 3 k) u. The density at its end is a factor e^k below that at the mean; in a
      tail, below that at the nearer end. An entry in scale has that relative to the sum of the magnitudes of the terms.
      So has one in loc, if the interval contains the mean. An entry is 0 once it is below the smallest normal number
      over scale.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    >>> print(f"{log_interval_prob(jnp.array(14.0), jnp.array(20.0)):.4f}")
    -101.5630
    """
    given, ok = _interval("log_interval_prob", low, high, loc, scale)
    return _accurate.nan_unless(ok, _gaussian.log_interval_prob(*given))


@_checks.public()
def entropy(scale: float | Real[Array, "*shape"]) -> Float[Array, "*shape"]:
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
    _, log_scale, ok = _valid("entropy", "scale", *_checks.broadcast_together("entropy", scale=scale))
    return _accurate.nan_unless(ok, log_scale + (0.5 + _gaussian.HALF_LOG_2PI))


@_checks.public()
def kl_divergence(
    p_loc: _Numbers,
    p_scale: _Numbers | None = None,
    q_loc: _Numbers = 0.0,
    q_scale: _Numbers | None = None,
    *,
    p_log_scale: _Numbers | None = None,
    q_log_scale: _Numbers | None = None,
) -> Float[Array, "*shape"]:
    """Kullback-Leibler divergence KL(p || q), in nats.

    The value is `(e^(2 d) - 1 - 2 d) / 2 + ((p_loc - q_loc) / q_scale)^2 / 2` with d = log(p_scale / q_scale).

    Args:
      p_loc: mean of p, the reference.
      p_scale: its standard deviation, positive and finite; 1 if neither it nor `p_log_scale` is given.
      q_loc: mean of q, the approximation, or the prior of a variational autoencoder.
      q_scale: its standard deviation, positive and finite; 1 if neither it nor `q_log_scale` is given.
      p_log_scale: logarithm of p_scale, as in `log_prob`.
      q_log_scale: logarithm of q_scale.

    Returns:
      One value per pair, in the shape all arguments broadcast to, at least float32, never negative: 0 where p = q; NaN
      for an invalid scale. Relative error at most 16 u, also where p and q nearly agree: both terms are positive, and
      neither is a difference of close numbers. The same holds for the gradient in loc and p_scale. That in q_scale is a
      sum of two terms, with that error relative to the sum of their magnitudes. A log_scale adds 4 |log_scale| u; d is
      then the difference of the logarithms. Overflow gives inf, with gradient 0 in the scales.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or a scale is given twice.

    Source: Kullback and Leibler (1951), Annals of Mathematical Statistics 22(1).

    >>> print(f"{kl_divergence(0.0, 1.0, 1.0, 1.0):.4f}")
    0.5000
    >>> print(f"{kl_divergence(jnp.array(1e-4), 1.0, 0.0, 1.0):.4e}")
    5.0000e-09
    >>> print(f"{kl_divergence(0.5, p_log_scale=-0.1):.4f}")  # of a latent code from the standard normal
    0.1344
    """
    p_name, p_value = _either("kl_divergence", "p_", p_scale, p_log_scale)
    q_name, q_value = _either("kl_divergence", "q_", q_scale, q_log_scale)
    given = {"p_loc": p_loc, p_name: p_value, "q_loc": q_loc, q_name: q_value}
    p_loc, p, q_loc, q = _checks.broadcast_together("kl_divergence", **given)
    p, p_log, p_ok = _valid("kl_divergence", p_name, p)
    q, q_log, q_ok = _valid("kl_divergence", q_name, q)
    _, scale, p_loc, q_loc = _gaussian.in_units(q, p_loc, q_loc)
    if p_log_scale is None and q_log_scale is None:
        _, _, p, q = _gaussian.in_units(jnp.minimum(p, q), p, q)
        d, below = _gaussian.log_ratio(p, q), _gaussian.distances(p, 0, q)[0]
    else:
        d = p_log - q_log
        below = jnp.expm1(d)
    value = _gaussian.scale_divergence(d, below) + _gaussian.half_square(p_loc - q_loc, scale, q_log)
    return _accurate.nan_unless(p_ok & q_ok, value)


@_checks.public()
def cross_entropy(p_loc: _Numbers, p_scale: _Numbers, q_loc: _Numbers, q_scale: _Numbers) -> Float[Array, "*shape"]:
    """Cross-entropy: the mean of -log q(x) under p, which is the entropy of p + KL(p || q), in nats.

    The value is `log q_scale + log(2 pi) / 2 + ((p_scale / q_scale)^2 + ((p_loc - q_loc) / q_scale)^2) / 2`.

    Args:
      p_loc: mean of p, the reference.
      p_scale: its standard deviation, finite; 0 is a single observation, for which this is `nll`.
      q_loc: mean of q, the approximation.
      q_scale: its standard deviation, positive and finite.

    Returns:
      One value per pair, in the shape all arguments broadcast to, at least float32, of either sign; NaN for a p_scale
      that is negative or infinite, or a q_scale that is not positive and finite. Error at most 8 u of the sum of the
      magnitudes of its terms. The gradient has 16 u likewise, and in q it is 0 exactly where q = p.

    Raises:
      ValueError: an argument is complex, or the shapes do not broadcast.

    Source: Cover and Thomas (2006), Elements of Information Theory, 8.

    >>> print(f"{cross_entropy(0.0, 1.0, 0.0, 1.0):.4f} {entropy(1.0):.4f}")
    1.4189 1.4189
    """
    given = {"p_loc": p_loc, "p_scale": p_scale, "q_loc": q_loc, "q_scale": q_scale}
    p_loc, p_scale, q_loc, q_scale = _checks.broadcast_together("cross_entropy", **given)
    p_ok = _checks.FINITE_NOT_NEGATIVE.holds(p_scale)
    _checks.expect(p_ok, p_scale, "cross_entropy: p_scale {value} is not finite and at least 0")
    q_scale, q_log_scale, q_ok = _valid("cross_entropy", "q_scale", q_scale)
    _, q_scale, p_loc, p_scale, q_loc = _gaussian.in_units(q_scale, p_loc, jnp.where(p_ok, p_scale, 0), q_loc)
    distance = _gaussian.half_square(p_loc - q_loc, q_scale, q_log_scale)
    value = _gaussian.scale_cost(p_scale, q_scale, q_log_scale) + distance + _gaussian.HALF_LOG_2PI
    return _accurate.nan_unless(p_ok & q_ok, value)


@_checks.public(beta=_checks.UNIT_INTERVAL)
def nll(
    x: _Points,
    loc: _Numbers = 0.0,
    scale: _Numbers | None = None,
    *,
    log_scale: _Numbers | None = None,
    beta: float | Real[Array, ""] = 0.0,
) -> Float[Array, "*shape"]:
    """Negative log-likelihood -log_prob times scale^(2 beta), the weight held constant under differentiation.

    beta = 0 gives the gradient -r / scale in loc. A network may then predict a large scale where it fits badly, and
    hardly learn loc there. beta = 1 gives the gradient of squared error, loc - x, and 0.5 lies between. The optimum is
    the same for every beta, since the weight does not see the gradient.

    Args:
      x: observation, floating-point.
      loc: predicted mean, in the unit of x.
      scale: predicted standard deviation, positive and finite; 1 where neither it nor `log_scale` is given.
      log_scale: its logarithm, as in `log_prob`.
      beta: exponent of the weight, in [0, 1]: a number, traced, so that it may be annealed.

    Returns:
      One value per observation in nats (times unit^(2 beta)), at least float32, of either sign; inf at x = +-inf; NaN
      for a scale that is not positive and finite, or a traced beta outside [0, 1]. Error at most 8 u of the sum of the
      magnitudes of the terms of `log_prob` (times the weight). Each gradient entry has 8 u of itself. `log_scale` makes
      both (8 + |log_scale|) u. The error of the gradient in log_scale is relative to r^2 + 1 times the weight. A beta
      above 0 adds 8 + 2 |log scale|, for weights that are normal numbers.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or both scale and log_scale are given; or beta is
        not one number or outside [0, 1].

    Source: Seitzer et al. (2022), On the Pitfalls of Heteroscedastic Uncertainty Estimation, ICLR.

    >>> print(f"{nll(jnp.array(3.0), 1.0, 2.0):.4f} {nll(jnp.array(3.0), 1.0, 2.0, beta=0.5):.4f}")
    2.1121 4.2242
    >>> print(jax.grad(lambda loc: nll(jnp.array(3.0), loc, 2.0, beta=1.0))(1.0))
    -2.0
    """
    *given, ok, _ = _given("nll", scale, log_scale, loc, x=x)
    value = -_gaussian.log_prob(*given)
    if not (isinstance(beta, float) and beta == 0):
        beta = _checks.number("nll", "beta", beta, _checks.UNIT_INTERVAL, value.dtype)
        inside = ~jnp.isnan(beta)
        value *= jax.lax.stop_gradient(_gaussian.scale_of(2 * jnp.where(inside, beta, 0) * given[-1]))
        ok &= inside
    return _accurate.nan_unless(ok, value)


@_checks.public(static=("axis",))
def fit(
    x: Float[Array, "*shape"], *, axis: int = -1, weights: Real[Array, "*#shape"] | Bool[Array, "*#shape"] | None = None
) -> Parameters:
    """Maximum-likelihood fit: the weighted mean, and the root of the weighted mean square deviation from it.

    The sum of squares is divided by the total weight, not by n - 1: that is where the likelihood is highest.

    Args:
      x: observations, floating-point.
      axis: the axis of the observations; it is summed away.
      weights: how often each counts, real numbers or bool, not negative, broadcast to the shape of x. An observation
        of weight 0 does not count, even if it is not finite. Only the ratios of weights matter.

    Returns:
      Parameters(loc, scale), one Gaussian per row, at least float32. The scale is 0 exactly, with gradient 0, where all
      observations are equal. Without any weight nothing is determined: NaN, with gradient 0. The same holds for a
      negative or infinite weight, or an infinite observation. The error for n observations is at most (16 + log2 n) u.
      That of loc is relative to |loc| + scale, that of scale to itself. The bound of scale holds also where |loc| is
      far larger: each deviation is then an exact difference.

    Raises:
      ValueError: x is not floating-point, `axis` is out of range or empty, or the weights do not broadcast.

    Source: the corrected two-pass algorithm, Chan, Golub and LeVeque (1983), The American Statistician 37(3).

    >>> print(fit(jnp.array([1e4 + 1, 1e4 + 2, 1e4 + 3, 1e4 + 4])))
    Parameters(loc=Array(10002.5, dtype=float32), scale=Array(1.118034, dtype=float32))
    """
    x, w, ok, axis = _weights.weighted("fit", x, axis, weights)
    ok &= jnp.sum(w, axis=axis) > 0
    return Parameters(*(_accurate.nan_unless(ok, jnp.squeeze(v, axis)) for v in _gaussian.fit(x, w, axis)))


@_checks.public(static=("shape",))
def sample(
    key: Key[Array, ""],
    loc: _Numbers = 0.0,
    scale: _Numbers | None = None,
    *,
    log_scale: _Numbers | None = None,
    shape: tuple[int, ...] | None = None,
) -> Float[Array, "*shape"]:
    """Draws loc + scale * standard normal noise: differentiable in loc (1) and scale (the noise).

    Args:
      key: a random key. The same key gives the same draws, for one shape and dtype.
      loc: mean.
      scale: standard deviation, not negative; 1 if neither it nor `log_scale` is given.
      log_scale: its logarithm, as in `log_prob`: the reparametrised draw of a variational autoencoder.
      shape: of the result, static: it ends in the shape that loc and scale broadcast to, which is the default.

    Returns:
      Independent draws of the given shape, at least float32; NaN for a negative scale. The noise is as exact as
      `jax.random.normal` (it reaches 5.4 standard deviations in float32), and what follows adds 2 u.

    Raises:
      ValueError: an argument is complex, the shapes do not broadcast, or `shape` does not end in theirs; or both scale
        and log_scale are given.

    >>> print(sample(jax.random.key(0), 5.0, 1e-3, shape=(2, 3)).shape)
    (2, 3)
    """
    name, value = _either("sample", "", scale, log_scale)
    loc, scale = _checks.broadcast_together("sample", **{"loc": loc, name: value})
    shape = _checks.sample_shape("sample", shape, loc.shape, "loc and scale")
    if log_scale is None:
        ok = scale >= 0
        _checks.expect(ok, scale, "sample: scale {value} is negative")
    else:
        scale, _, ok = _valid("sample", "log_scale", scale)
    noise = jax.random.normal(key, shape, loc.dtype)
    loc, scale, ok = (jnp.broadcast_to(value, shape) for value in (loc, scale, ok))
    return _accurate.nan_unless(ok, loc + jnp.where(ok, scale, 0) * noise)


def _either(function, prefix, scale, log_scale):
    """The scale or its logarithm, after its name: the scale 1 where none is given."""
    if log_scale is None:
        return f"{prefix}scale", 1.0 if scale is None else scale
    if scale is not None:
        raise ValueError(f"{function}: expected {prefix}scale or {prefix}log_scale, got both")
    return f"{prefix}log_scale", log_scale


def _valid(function, name, spread):
    """A scale, its logarithm, and whether they are valid: else they are those of the scale 1."""
    if name.endswith("log_scale"):
        ok = jnp.isfinite(spread)
        _checks.expect(ok, spread, f"{function}: {name} {{value}} is not finite")
        log_scale = jnp.where(ok, spread, 0)
        return _gaussian.scale_of(log_scale), log_scale, ok
    ok = _checks.FINITE_POSITIVE.holds(spread)
    _checks.expect(ok, spread, f"{function}: {name} {{value}} is not positive and finite")
    scale = jnp.where(ok, spread, 1)
    return scale, jnp.log(scale), ok


def _given(function, scale, log_scale, loc, **points):
    """Points, loc and scale in one unit, the logarithm of the scale, whether it is valid, and the unit."""
    _checks.floating(function, **points)
    name, value = _either(function, "", scale, log_scale)
    *points, scale = _checks.broadcast_together(function, **points, **{"loc": loc, name: value})
    scale, log_scale, ok = _valid(function, name, scale)
    unit, scale, *points = _gaussian.in_units(scale, *points)
    return *points, scale, log_scale, ok, unit


def _interval(function, low, high, loc, scale):
    """Ends, loc and scale in one unit, and whether they are valid."""
    low, high, loc, scale, _, ok, _ = _given(function, scale, None, loc, low=low, high=high)
    ordered = ~(low > high)
    _checks.expect(ordered, low, f"{function}: low {{value}} is above high")
    return (low, jnp.where(ordered, high, low), loc, scale), ok & ordered
